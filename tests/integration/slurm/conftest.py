"""The private cluster, and runs on it by the scripts of examples/ as they are."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import zygote
from tests.integration.conftest import ROOT, num_rows
from tests.integration.slurm import cluster as slurm
from tests.integration.slurm.cluster import Cluster, with_deadline

OVERRIDES = (
    "model.dtype=fp32", "rollout.engine=transformers", "trainer.steps=12",
    "trainer.tensorboard=false", "data.suffix=", "data.max_prompt_tokens=16",
    "rollout.num_prompts=16", "rollout.chunk_prompts=8", "rollout.temperature=1.0",
    "rollout.max_response_tokens=8", "labels.workers=1", "labels.require_think=false",
    "batch.minibatch_prompts=4", "batch.max_tokens=2048", "optimizer.lr=5e-5", "evaluation.every=5",
    "evaluation.max_problems=20", "evaluation.samples=1", "checkpoint.every=3", "parallel.tp=1",
    "parallel.sp=false",
)  # fmt: skip
# Bounds for a machine that is far busier than two lanes make it; a job that has ended ends the
# wait.
START_SECONDS = 600.0
RUN_SECONDS = 900.0
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes."""
    if reason := slurm.missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


class Run:
    """A run directory, and the jobs that work on it.

    Example:
        run = Run(cluster, base, tmp_path / "run")
        job = run.submit("--nodes=1")
        run.wait_for_row(4)
        run.wait_for_end(job)
    """

    def __init__(self, cluster: Cluster, base: Path, directory: Path, *words: str) -> None:
        """`words`: more settings of the configuration."""
        self.cluster = cluster
        self.directory = directory
        self.log = directory.with_name(f"{directory.name}-job.log")
        self._jobs: list[str] = []
        self._settings = {
            "SBATCH_PARTITION": "main",
            "SBATCH_GPUS_PER_NODE": "1",
            "SBATCH_OUTPUT": str(self.log),
            "MODEL": str(base),
            "MEGATRON": f"{directory}-megatron",
            "TRAIN": f"{base}/train.jsonl",
            "HELDOUT": f"{base}/heldout.jsonl",
            "RUN_DIR": str(directory),
            "VENV": sys.prefix,
            "OVERRIDES": " ".join([*OVERRIDES, *words]),
            "OMP_NUM_THREADS": "1",
        }

    def submit(self, *options: str) -> str:
        """Submits the 7B script, unmodified; returns the job's number."""
        words = ["sbatch", "--parsable", *options, "examples/real_7b.sh"]
        job = self.cluster.run(*words, environment=self._settings).strip()
        self._jobs.append(job)
        return job

    def wait_for_row(self, number: int) -> None:
        """Until the run has written its `number`-th row of metrics."""
        metrics = self.directory / "metrics.jsonl"
        self.watch_for(lambda: num_rows(metrics) >= number, f"row {number}")

    def watch_for(self, happened: Callable[[], object], what: str) -> None:
        """As `wait_for`, for what files show, and perhaps for a moment only.

        Between two questions to Slurm a short run writes several rows, or its last one.
        """
        self.wait_for(lambda: with_deadline(happened, 0.5, pause=0.01), what, pause=0.0)

    def wait_for(
        self,
        happened: Callable[[], object],
        what: str,
        seconds: float = START_SECONDS,
        pause: float = 0.5,
    ) -> None:
        """As Cluster.wait_for, but no longer than a job is there;
        shows all logs where nothing happens.
        """

        def seen() -> str:
            if happened():
                return what
            return "the job's end" if self._over() else ""

        try:
            first_seen = self.cluster.wait_for(seen, what, seconds=seconds, pause=pause)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.all_logs()}") from None
        # It may have been the last that the job did.
        assert first_seen == what or happened(), f"the job ended: no {what}\n{self.all_logs()}"

    def wait_for_end(self, job: str, state: str = "COMPLETED") -> None:
        """Until Slurm has no more to do for the job."""

        def end() -> str:
            state = self.cluster.fields(job)["JobState"]
            return state if state in ENDS else ""

        # Asked once: Slurm may start the job again.
        ended_as = self.cluster.wait_for(end, f"end of {job}", seconds=RUN_SECONDS)
        assert ended_as == state, self.all_logs()

    def wait_for_restart(self, job: str, number: int, *, seconds: float = START_SECONDS) -> None:
        """Until Slurm has started the job again so often, or is about to."""
        self.wait_for(
            lambda: self.restarts(job) == number, f"restart {number} of job {job}", seconds
        )

    def wait_for_life(self, life: str) -> None:
        """Until status.json is of this job and restart."""
        self.wait_for(lambda: f'"{life}"' in self.status(), f"status of {life}")

    def _over(self) -> bool:
        """Whether no job is left that could make anything happen."""
        return all(self.cluster.fields(job)["JobState"] in ENDS for job in self._jobs)

    def restarts(self, job: str) -> int:
        """Returns how often Slurm has started the job again."""
        return int(self.cluster.fields(job)["Restarts"])

    def output(self) -> str:
        """Returns the jobs' log."""
        if not self.log.exists():
            return ""
        return self.log.read_text()

    def all_logs(self) -> str:
        """The jobs' log and the ends of the logs that torchrun and the ranks wrote,
        for a failure.
        """
        logs = [
            f"{file.relative_to(self.directory)}:\n{file.read_text(errors='replace')[-1500:]}"
            for file in sorted((self.directory / "logs").rglob("*.log"))
            if file.stat().st_size
        ]
        return "\n".join([self.output(), *logs])

    def status(self) -> str:
        """Returns the content of status.json."""
        file = self.directory / "status.json"
        if not file.exists():
            return ""
        return file.read_text()

    def ranks(self) -> dict[int, int]:
        """The pid of each rank that trains; verifiers and so on have its environment too."""
        ranks = {}
        for pid, values in self._processes("RANK").items():
            with contextlib.suppress(OSError):  # it may have ended
                if b"\0train\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    ranks[int(values["RANK"])] = pid
        return ranks

    def ask_to_stop(self, job: str, *options: str) -> None:
        """Has Slurm send its warning to the ranks.

        They are held until it has reached them all: a short run may end sooner.
        """
        ranks = self.ranks().values()
        assert ranks, f"no rank is left to be asked\n{self.all_logs()}"
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        try:
            self.cluster.run("scancel", "--signal=USR1", *options, job)
            self.wait_for(
                lambda: all(_is_pending(signal.SIGUSR1, pid) for pid in ranks),
                "warning of every rank",
            )
        finally:
            for pid in ranks:
                os.kill(pid, signal.SIGCONT)

    def kill(self, *, script: bool) -> None:
        """Sends SIGKILL to all ranks and launchers, with `script` to the job's script too."""
        # The script itself is in the job, but in none of its steps.
        variable = "SLURM_JOB_ID" if script else "SLURM_STEP_ID"
        for pid in self._processes(variable):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _processes(self, variable: str) -> dict[int, dict[str, str]]:
        """{pid: environment} of the processes that work in this directory and have a variable."""
        environments = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it may have ended
                words = (process / "environ").read_text(errors="replace").split("\0")
                values = dict(word.split("=", 1) for word in words if "=" in word)
                if values.get("RUN_DIR") == str(self.directory) and variable in values:
                    environments[int(process.name)] = values
        return environments


def _is_pending(number: int, pid: int) -> bool:
    """Whether a signal waits for a process that is held."""
    (mask,) = re.findall(r"^ShdPnd:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.fixture
def run(cluster: Cluster, base: Path, tmp_path: Path) -> Run:
    """A run directory of its own."""
    return Run(cluster, base, tmp_path / "run")


@pytest.fixture(scope="session")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by two processes that nobody disturbs, without Slurm and from the HF weights."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    paths = (
        f"model.path={base}",
        f"data.train={base}/train.jsonl",
        f"data.heldout={base}/heldout.jsonl",
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "megatron_real",
        "train", "examples/configs/real_7b.yaml", f"trainer.run_dir={run_dir}", *paths, *OVERRIDES,
    ]  # fmt: skip
    done = zygote.run(command, cwd=ROOT, capture_output=True, text=True, timeout=RUN_SECONDS)
    assert done.returncode == 0, done.stderr
    return run_dir
