"""The layout of a run directory: the one place that knows its file names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from megatron_real.runs.parts import UNFINISHED


class RunDirectory:
    """Paths below a run's directory.

    The first rank writes all of them; on several nodes the first rank of each node writes a part of
    the rollouts. Every rank may read.

    config.yaml                  the whole configuration
    metrics.jsonl                one row per step
    evaluations.jsonl            one row per evaluation
    heldout/step-00012.json      right answers to each held-out problem
    rollouts/step-00012.parquet  every rollout of step 12
    rollouts/chunk-*             parts of a step that is not finished
    hf/                          trained weights
    checkpoints/                 step_12/ and so on, and latest
    status.json                  running, stopped, crashed, ...
    lives/life-0001.json         what each life was started with
    owners/                      whose run this is, and was
    curves.png                   the run at a glance
    logs/run.log                 what the terminal showed, with times
    servers/                     what vLLM servers said
    tensorboard/                 event files
    wandb.json, mlflow.json,     the run's id in Weights & Biases, in MLflow,
    trackio.json                 and in Trackio
    profile/                     a trace per profiled step
    dumps/step-00012-update-1/   batch of a skipped update
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
        self.heldout = self.path / "heldout"
        self.lives = self.path / "lives"
        self.owners = self.path / "owners"

    def read_config(self, remedy: str) -> dict[str, Any]:
        """Returns the configuration that config.yaml holds.

        Raises:
            ValueError: it is not there, cannot be read, or is no table; ends with `remedy`.
        """
        try:
            config = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{self.config} cannot be read ({reason}); {remedy}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{self.config} is no configuration; {remedy}")
        return config

    def foreign_files(self) -> list[str]:
        """Returns the names of a directory that no run has written to.

        There are none for a run's directory, or one that a job has prepared.
        """
        names = sorted(path.name for path in self.path.iterdir())
        # Any of them tells a run's directory: a run that was killed early has only some.
        marks = {self.status.name, self.owners.name, self.metrics.name, self.checkpoints.name}
        if marks & set(names):
            return []
        # A job script may have made the log's folder and written the configuration before.
        return [name for name in names if name not in (self.log.parent.name, self.config.name)]

    def life(self, number: int) -> Path:
        """Returns the file that says what a life of the run was started with."""
        return self.lives / f"life-{number:04d}.json"

    def tracker(self, setting: str) -> Path:
        """Returns the file with the run's id in a tracker.

        Args:
            setting: the tracker's name in the configuration.
        """
        return self.path / f"{setting}.json"

    def heldout_answers(self, step: int) -> Path:
        """Returns the file that says how many right answers each problem got after a step."""
        return self.heldout / f"step-{step:05d}.json"

    def rollouts(self, step: int) -> Path:
        """Returns where the rollouts of a step are written.

        It is a file, or a directory of parts (parts.py).
        """
        return self.path / "rollouts" / f"step-{step:05d}.parquet"

    def saved_rollouts(self, step: int) -> Path:
        """Returns where the rollouts of a step can be read."""
        return _existing(self.rollouts(step))

    def chunk(self, step: int, draw: int, first_prompt: int) -> Path:
        """Returns where a chunk of a step's rollouts is kept until the step is finished."""
        return self.path / "rollouts" / f"chunk-{step:05d}-{draw}-{first_prompt:05d}.parquet"

    def saved_chunk(self, step: int, draw: int, first_prompt: int) -> Path:
        """Returns where a chunk of a step's rollouts can be read."""
        return _existing(self.chunk(step, draw, first_prompt))

    def chunks(self, step: int) -> list[Path]:
        """Returns the chunks of a step that are there."""
        return self._files_of_rollouts(f"chunk-{step:05d}-*")

    def kept_rollouts(self) -> list[tuple[int, Path]]:
        """Returns (step, file) of every file of rollouts, whole steps and chunks."""
        files = [*self._files_of_rollouts("step-*"), *self._files_of_rollouts("chunk-*")]
        # Five digits or more: sorted as numbers, since names of six digits sort before them.
        return sorted((int(file.stem.split("-")[1]), file) for file in files)

    def saved_steps(self) -> list[int]:
        """Returns the steps whose rollouts are there as a whole, in order."""
        files = self._files_of_rollouts("step-*")
        return sorted({int(file.stem.removeprefix("step-")) for file in files})

    def unfinished_rollouts(self) -> list[Path]:
        """Returns the files that a process has left which ended while it wrote rollouts."""
        return sorted(self.path.glob(f"rollouts/*{UNFINISHED}"))

    def _files_of_rollouts(self, pattern: str) -> list[Path]:
        files = sorted(self.path.glob(f"rollouts/{pattern}"))
        # A file that is being written ends in .new, and is no chunk or step yet.
        return [file for file in files if file.suffix in (".parquet", ".jsonl")]

    def dump(self, step: int, update: int) -> RunDirectory:
        """Returns a run directory of one step, for the batch of a skipped update.

        rollout.replay takes it.
        """
        return RunDirectory(self.dumps / f"step-{step:05d}-update-{update}")


def _existing(file: Path) -> Path:
    """Returns the file, or the one that an earlier version has written in its place."""
    earlier = file.with_suffix(".jsonl")
    # A run that went on under this version may have both: its newer file counts.
    if earlier.is_file() and not file.exists():
        return earlier
    return file
