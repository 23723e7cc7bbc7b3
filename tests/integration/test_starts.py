"""A start that is refused does not change the run directory, and status.json has the true state
after every end.

The runs are made in this process, one after the other, by the command line's own function: a start
takes a second then, and several runs in one process are supported.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_real import cli
from megatron_real.checkpoint import saver
from megatron_real.runs import saved
from tests.integration.conftest import CONFIG, ROOT, rows

WORDS = (
    "trainer.steps=3", "rollout.num_prompts=4", "rollout.group_size=4", "batch.minibatch_prompts=2",
    "checkpoint.every=2", "checkpoint.asynchronous=false", "trainer.tensorboard=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model before its warm-up, and some of its sums."""
    sys.path.insert(0, str(ROOT / "tools"))
    import make_tiny_model

    out = tmp_path_factory.mktemp("untrained") / "base"
    make_tiny_model.new_model().save_pretrained(out)
    make_tiny_model.new_tokenizer().save_pretrained(out)
    pairs = [(12, 34), (50, 27), (61, 18), (40, 41), (23, 32)]
    make_tiny_model.write_rows(out / "train.jsonl", make_tiny_model.rows_of(pairs, "train"))
    return out


class Runs:
    """Starts runs on one model and in one directory."""

    def __init__(self, base: Path, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.base = base
        self.directory = directory
        self.output = ""
        """All that the last start printed."""
        self._capsys = capsys

    def train(self, *words: str) -> int:
        """Starts the run; returns the exit code, and keeps the output."""
        paths = [f"model.path={self.base}", f"data.train={self.base}/train.jsonl", "data.heldout="]
        run = ["train", str(CONFIG), f"trainer.run_dir={self.directory}", *paths, *WORDS, *words]
        code = cli.main(run)
        stdout, stderr = self._capsys.readouterr()
        self.output = stdout + stderr
        assert "Traceback" not in self.output
        return code

    @property
    def status(self) -> dict[str, Any]:
        """status.json."""
        status: dict[str, Any] = json.loads((self.directory / "status.json").read_text())
        return status

    def content(self, *, without: str = "") -> dict[str, str]:
        """A digest of every file of the run directory but the lock's, by its name."""
        files = [path for path in self.directory.rglob("*") if path.is_file()]
        return {
            str(path.relative_to(self.directory)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
            if path.name != without and path.parent.name != "owners"
        }

    def become(self, other: Path) -> None:
        """Continues in a copy of another run's directory."""
        shutil.copytree(other, self.directory)


@pytest.fixture
def runs(
    untrained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Runs:
    """Their curves are not drawn, which takes longer than all else; those of `finished` are."""
    monkeypatch.setattr("megatron_real.runs.reporter.plot_curves", lambda *_, **__: None)
    return Runs(untrained, tmp_path / "run", capsys)


@pytest.fixture(scope="module")
def finished(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, with checkpoints after the second and the third, and its curves."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    paths = [f"model.path={untrained}", f"data.train={untrained}/train.jsonl", "data.heldout="]
    assert cli.main(["train", str(CONFIG), f"trainer.run_dir={directory}", *paths, *WORDS]) == 0
    assert (directory / "curves.png").stat().st_size > 10_000
    return directory


REFUSED = {
    "a setting that may not change": ["trainer.seed=2", "rollout.temperature=0.7"],
    "missing data": ["data.train=/nonexistent.jsonl", "trainer.steps=4"],
    "an unknown verifier": ["labels.verifier=/nonexistent.py:judge", "trainer.steps=4"],
}


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_a_refused_start_changes_nothing_but_the_status(
    runs: Runs, finished: Path, words: list[str]
) -> None:
    runs.become(finished)
    before = runs.content(without="status.json")
    assert runs.train(*words) == 2
    assert runs.content(without="status.json") == before
    assert runs.status["state"] == "failed" and runs.status["reason"] in runs.output
    assert runs.status["before"]["state"] == "finished", "what the run itself has come to"


@pytest.mark.parametrize("words", REFUSED.values(), ids=REFUSED)
def test_a_refused_first_start_leaves_no_directory(runs: Runs, words: list[str]) -> None:
    if "trainer.seed=2" in words:
        words = ["data.train=/nonexistent.jsonl", "trainer.seed=2"]
    assert runs.train(*words) == 2
    assert not runs.directory.exists()


def test_a_refused_start_in_a_job_s_directory_is_a_failure(runs: Runs) -> None:
    """The Slurm scripts make RUN/logs beforehand, and ask status.json whether to requeue."""
    (runs.directory / "logs").mkdir(parents=True)
    assert runs.train("data.train=/nonexistent.jsonl") == 2
    assert runs.status["state"] == "failed" and "/nonexistent.jsonl" in runs.status["reason"]
    assert set(runs.content()) == {"status.json"}
    assert runs.train() == 0, runs.output
    assert runs.status["state"] == "finished"


def test_a_directory_of_other_files_is_not_written_to(runs: Runs) -> None:
    runs.directory.mkdir()
    (runs.directory / "thesis.tex").write_text("x")
    assert runs.train() == 2
    assert "is not a run directory, and it is not empty (thesis.tex)" in runs.output
    assert set(runs.content()) == {"thesis.tex"}


def test_a_finished_run_reports_that_there_is_nothing_to_do(runs: Runs, finished: Path) -> None:
    runs.become(finished)
    before = runs.content()
    assert runs.train("optimizer.lr=1e-6") == 0
    assert (
        "has finished its 3 steps, and there is nothing to do; raise trainer.steps" in runs.output
    )
    assert runs.content() == before
    assert runs.train("trainer.steps=4", "optimizer.lr=1e-6") == 0, runs.output
    assert "trainer.steps: 3 -> 4; optimizer.lr: 5e-05 -> 1e-06" in runs.output
    assert [row["step"] for row in rows(runs.directory / "metrics.jsonl")] == [1, 2, 3, 4]


def test_the_configuration_of_every_life_is_kept(runs: Runs, finished: Path) -> None:
    runs.become(finished)
    assert runs.train("trainer.steps=4", "optimizer.lr=1e-6") == 0, runs.output
    lives = [json.loads(file.read_text()) for file in sorted((runs.directory / "lives").iterdir())]
    assert [life["config"]["optimizer"]["lr"] for life in lives] == [5e-5, 1e-6]
    assert [life["from"] for life in lives] == ["the start", "step_3"]


def test_rollouts_drawn_otherwise_are_not_trained_on_after_a_refusal(runs: Runs) -> None:
    """A run that was killed with a chunk of step 3 on disk is started at another temperature:
    first a start that is refused, then one that is accepted.
    """
    assert runs.train("trainer.steps=2") == 0
    chunk = runs.directory / "rollouts/chunk-00003-0-00000.parquet"
    shutil.copy(runs.directory / "rollouts/step-00002.parquet", chunk)
    assert runs.train("rollout.temperature=0.3", "trainer.seed=5") == 2
    assert chunk.exists()
    assert runs.train("rollout.temperature=0.3") == 0, runs.output
    assert "not sampled again" not in runs.output
    assert "rollout.temperature: 1.0 -> 0.3" in runs.output


def cut_short(directory: Path) -> None:
    """Makes a run directory what a kill before the first checkpoint leaves."""
    shutil.rmtree(directory / "checkpoints")
    shutil.rmtree(directory / "hf")
    status = {"state": "running", "reason": "", "time": "", "life": ".0"}
    (directory / "status.json").write_text(json.dumps(status))


def test_a_setting_may_change_before_the_first_checkpoint(runs: Runs, finished: Path) -> None:
    """docs/cluster.md advises it after an out-of-memory."""
    runs.become(finished)
    cut_short(runs.directory)
    assert runs.train("trainer.seed=2") == 2
    assert "trainer.seed was 1 and is now 2" in runs.output
    assert runs.train("batch.max_tokens=2048") == 0, runs.output
    assert "batch.max_tokens: 4096 -> 2048" in runs.output
    assert "an earlier life ended before its first checkpoint" in runs.output
    assert [row["step"] for row in rows(runs.directory / "metrics.jsonl")] == [1, 2, 3]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(
    runs: Runs, finished: Path
) -> None:
    runs.become(finished)
    for whole in saved.saved(runs.directory / "checkpoints"):
        (whole.path / "state.pt").write_bytes(b"")
    before = runs.content(without="status.json")
    assert runs.train("trainer.steps=4") == 2
    assert "no whole checkpoint of" in runs.output and "step_3: state.pt has 0 bytes" in runs.output
    assert "its 3 steps are not thrown away unasked" in runs.output
    assert runs.content(without="status.json") == before


def test_an_unreadable_checkpoint_is_refused_in_one_sentence(
    runs: Runs, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    runs.become(finished)
    before = runs.content(without="status.json")
    with monkeypatch.context() as patched:
        patched.setattr(saved, "checksum", denied)
        assert runs.train("trainer.steps=4") == 2
    assert "cannot be read (Permission denied); nothing was changed" in runs.output
    assert runs.content(without="status.json") == before
    assert runs.train("trainer.steps=4") == 0, runs.output
    assert "resuming after step 3" in runs.output


def test_a_truncated_configuration_is_refused_in_one_sentence(runs: Runs, finished: Path) -> None:
    runs.become(finished)
    config = runs.directory / "config.yaml"
    config.write_bytes(config.read_bytes()[:5])
    assert runs.train("trainer.steps=4") == 2
    assert f"{config} is not a whole configuration" in runs.output and "lives" in runs.output


def test_rows_that_were_cut_or_deleted_are_reported(runs: Runs, finished: Path) -> None:
    """The next row stands on a line of its own, and the curves are drawn."""
    runs.become(finished)
    metrics = runs.directory / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-200])
    assert runs.train("trainer.steps=4") == 0, runs.output
    assert "rows of finished steps are lost, and its last row was cut" in runs.output
    assert [row["step"] for row in rows(metrics)] == [1, 2, 4]
    metrics.unlink()
    assert runs.train("trainer.steps=5") == 0, runs.output
    assert "WARNING: metrics.jsonl has 0 bytes" in runs.output
    assert [row["step"] for row in rows(metrics)] == [5]


def test_curves_that_cannot_be_drawn_end_no_run(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no fonts here")

    monkeypatch.setattr("megatron_real.runs.reporter.plot_curves", broken)
    assert runs.train() == 0
    assert "WARNING: curves.png could not be drawn: no fonts here" in runs.output
    assert runs.status["state"] == "finished"


def test_ruined_weights_fail_and_name_the_checkpoint_before(runs: Runs, finished: Path) -> None:
    """With one update of lr 1e30 a step, the next that reads the weights is a sync or a
    checkpoint.
    """
    runs.become(finished)
    words = ["trainer.steps=5", "optimizer.lr=1e30", "batch.minibatch_prompts=4"]
    assert runs.train(*words, "objective.one_class_groups=keep") == 1
    assert "the policy is ruined after step 4" in runs.output
    assert "the last good checkpoint is step_3, from before that" in runs.output
    assert runs.status["state"] == "failed"
    newest, *_ = saved.saved(runs.directory / "checkpoints")
    assert str(newest.position) == "step_3"


def full() -> OSError:
    return OSError(28, "No space left on device")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """From the second row of metrics on, no file can be made or grow;
    what is there can be overwritten.
    """
    from megatron_real.runs import metrics, status
    from megatron_real.runs.rows import append_row

    written = []

    def append_row_until_full(file: Path, row: dict[str, Any]) -> None:
        written.append(row)
        if len(written) > 1:
            monkeypatch.setattr(status, "write_whole", no_room)
            raise full()
        append_row(file, row)

    def no_room(*_: Any) -> None:
        raise full()

    monkeypatch.setattr(metrics, "append_row", append_row_until_full)
    yield
    assert len(written) > 1, "the disk was never full"


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_fails_the_run_with_the_reason(runs: Runs) -> None:
    assert runs.train() == 1
    assert "No space left on device" in runs.output
    assert runs.status["state"] == "failed" and "No space left" in runs.status["reason"]


def test_a_last_checkpoint_that_fails_is_no_success(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With on_failure=stop the run has failed; without, its last line names the checkpoint."""

    def commit_until_full(folder: Path, position: saved.Position, *args: Any) -> saved.Saved:
        if position.step == 3:
            raise full()
        return saved.commit(folder, position, *args)

    monkeypatch.setattr(saver, "commit", commit_until_full)
    assert runs.train("checkpoint.on_failure=stop") == 1
    assert "checkpoint step_3 could not be saved" in runs.output
    assert "the last good checkpoint is step_2" in runs.status["reason"]
    assert runs.status["state"] == "failed"
    assert runs.train() == 0
    assert runs.status["state"] == "finished"
    assert "checkpoint step_3 could not be saved" in runs.status["reason"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new checkpoint is whole whatever becomes of the old one, and the next start goes on."""

    def busy(path: Path, **_: Any) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(saved, "shutil", types.SimpleNamespace(rmtree=busy))
        words = ["checkpoint.on_failure=stop", "checkpoint.keep=1", "checkpoint.every=1"]
        assert runs.train(*words) == 0, runs.output
        assert "step_1.deleted could not be deleted" in runs.output
        assert "could not be saved" not in runs.output
        assert runs.train(*words, "trainer.steps=4") == 0, runs.output
        assert "nothing reads it, so the run goes on" in runs.output
    assert runs.train(*words, "trainer.steps=5") == 0, runs.output
    assert not saved.left_behind(runs.directory / "checkpoints")


def test_a_run_that_learns_nothing_warns(runs: Runs) -> None:
    """A verifier that finds everything wrong makes groups of one class only."""
    own = runs.base / "none.py"
    own.write_text("def judge(text, answers, metadata):\n    return 0.0\n")
    assert runs.train(f"labels.verifier={own}:judge") == 0, runs.output
    assert "WARNING: step 1 taught nothing" in runs.output
    assert "none of the 3 steps taught anything" in runs.status["reason"]


def test_memory_that_is_nearly_used_up_saves_and_stops(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on, as after a time limit."""
    looks = iter([False, False, True])
    monkeypatch.setattr(
        "megatron_real.supervision.stop.MemoryGuard.nearly_full", lambda _: next(looks, False)
    )
    assert runs.train() == 75
    assert "for the memory of this machine's job is nearly used up" in runs.output
    assert runs.status["state"] == "stopped"
    assert runs.train() == 0, runs.output
    figures = rows(runs.directory / "metrics.jsonl")
    assert [row["step"] for row in figures] == [1, 2, 3]
    assert all(row["memory/resident_gib_max"] > 0.1 for row in figures)


WANDB = """
import json, pathlib

class Run:
    def __init__(self, file): self.file = file
    def define_metric(self, *words, **options): pass
    def log(self, values):
        with open(self.file, "a") as out: out.write(json.dumps(values["step"]) + "\\n")
        if pathlib.Path(self.file).with_name("unreachable").exists():
            raise OSError("no route to host")
    def finish(self): pass

def init(*, id, resume, dir, **options):
    here = pathlib.Path(__file__).parent
    if (here / "no_key").exists():
        raise RuntimeError("No API key configured. Use `wandb login` to log in.")
    assert resume == "allow"
    with open(here / "ids", "a") as out: out.write(id + "\\n")
    return Run(here / "logged")
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of that name, whose service can be without a key or out of reach."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    return folder


def test_wandb_keeps_one_run_over_all_lives(runs: Runs, wandb: Path) -> None:
    """A second life logs to the run of the first, and continues its steps."""
    assert runs.train("trainer.wandb=true", "trainer.steps=2") == 0, runs.output
    assert runs.train("trainer.wandb=true", "trainer.steps=3") == 0, runs.output
    first, second = (wandb / "ids").read_text().split()
    assert first == second
    assert (wandb / "logged").read_text().split() == ["1", "2", "3"]


@pytest.mark.parametrize("trouble", ["no_key", "unreachable"])
def test_wandb_ends_no_run(runs: Runs, wandb: Path, trouble: str) -> None:
    (wandb / trouble).touch()
    assert runs.train("trainer.wandb=true") == 0, runs.output
    assert runs.output.count("WARNING: Weights & Biases is left out") == 1
    assert len(rows(runs.directory / "metrics.jsonl")) == 3
    assert runs.status["state"] == "finished"


def test_wandb_that_is_not_installed_is_refused(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert runs.train("trainer.wandb=true") == 2
    assert "wandb is not installed" in runs.output
    assert not runs.directory.exists()


def test_a_pipe_without_a_reader_is_no_error(untrained: Path) -> None:
    """`plan | head`: the pipe has no reader any more when the output is flushed."""
    reader, writer = os.pipe()
    os.close(reader)
    plan = [sys.executable, "-m", "megatron_real", "plan", str(CONFIG), f"model.path={untrained}"]
    try:
        done = subprocess.run(
            [*plan, "--gpus", "1"], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=240
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_dry_run_prints_what_would_be_done_and_writes_nothing(
    runs: Runs, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert runs.train("--dry-run") == 0
    assert f"run        {runs.directory}, new\n" in runs.output
    assert not runs.directory.exists()
    with monkeypatch.context() as narrow:
        narrow.setenv("COLUMNS", "80")
        assert runs.train("--dry-run") == 0
        wide = [line for line in runs.output.splitlines() if len(line) > 80 and "/" not in line]
        assert not wide
    runs.become(finished)
    before = runs.content()
    assert runs.train("--dry-run", "optimizer.lr=1e-4") == 0
    assert "goes on from step_3; changed: optimizer.lr: 5e-05 -> 0.0001\n" in runs.output
    assert runs.train("--dry-run", "trainer.seed=5") == 2
    assert runs.content() == before
