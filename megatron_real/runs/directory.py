"""The layout of a run directory: the one place that knows its file names."""

from __future__ import annotations

from pathlib import Path


class RunDirectory:
    """Paths below a run's directory. The first rank writes all of them; every rank may read.

    config.yaml      the whole configuration          rollouts/step-00012.jsonl   every rollout of step 12
    metrics.jsonl    one row per step                 evaluations.jsonl           one row per evaluation
    curves.png       the run at a glance              hf/                         trained weights
    tensorboard/     event files                      logs/run.log                what the terminal showed, with times
    profile/         a trace per profiled step        dumps/step-00012-update-1/  batch of a skipped update
    checkpoints/     step_12/ and so on, and latest   status.json                 running, stopped, crashed, ...
    lock             whose run this is                rollouts/chunk-*            parts of a step that is not finished
    servers/         what vLLM servers said
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.curves = self.path / "curves.png"
        self.weights = self.path / "hf"
        self.tensorboard = self.path / "tensorboard"
        self.log = self.path / "logs" / "run.log"
        self.profile = self.path / "profile"
        self.dumps = self.path / "dumps"
        self.checkpoints = self.path / "checkpoints"
        self.status = self.path / "status.json"
        self.lock = self.path / "lock"

    def claim(self, *, exist_ok: bool = False) -> None:
        """Makes the directory for a new run; `exist_ok` goes on in the directory of an earlier one.

        Raises:
            ValueError: it holds the metrics of a run already, or is a file.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; give another trainer.run_dir")
        # A run that was stopped in its first step may have evaluated but has no metrics yet.
        if not exist_ok and (self.metrics.exists() or self.evaluations.exists()):
            raise ValueError(f"{self.path} holds a run already; give another trainer.run_dir or delete it")
        self.path.mkdir(parents=True, exist_ok=True)

    def server_log(self, number: int) -> Path:
        """What a vLLM server of the run says."""
        return self.path / "servers" / f"server-{number}.log"

    def rollouts(self, step: int) -> Path:
        """Where the rollouts of a step are."""
        return self.path / "rollouts" / f"step-{step:05d}.jsonl"

    def chunk(self, step: int, draw: int, first_prompt: int) -> Path:
        """Where a chunk of a step's rollouts is until the step is finished."""
        return self.path / "rollouts" / f"chunk-{step:05d}-{draw}-{first_prompt:05d}.jsonl"

    def chunks(self, step: int) -> list[Path]:
        """The chunks of a step that are there."""
        return sorted(self.path.glob(f"rollouts/chunk-{step:05d}-*.jsonl"))

    def kept_rollouts(self) -> list[tuple[int, Path]]:
        """(step, file) of every file of rollouts, whole steps and chunks."""
        files = [*self.path.glob("rollouts/step-*.jsonl"), *self.path.glob("rollouts/chunk-*.jsonl")]
        return sorted((int(file.stem.split("-")[1]), file) for file in files)

    def dump(self, step: int, update: int) -> RunDirectory:
        """A run directory of one step, whose rollouts are the batch of a skipped update: rollout.replay takes it."""
        return RunDirectory(self.dumps / f"step-{step:05d}-update-{update}")
