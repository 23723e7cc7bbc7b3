"""The layout of a run directory: the one place that knows its file names."""

from __future__ import annotations

from pathlib import Path


class RunDirectory:
    """Paths below a run's directory.

    config.yaml      the whole configuration          rollouts/step-00012.jsonl   every rollout of step 12
    metrics.jsonl    one row per step                 evaluations.jsonl           one row per evaluation
    curves.png       the run at a glance              hf/                         trained weights
    tensorboard/     event files                      profile/, dumps/            traces; batches of skipped updates
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.curves = self.path / "curves.png"
        self.weights = self.path / "hf"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.dumps = self.path / "dumps"

    def claim(self) -> None:
        """Makes the directory for a new run.

        Raises:
            ValueError: it holds a run already.
        """
        if self.metrics.exists():
            raise ValueError(f"{self.path} holds a run already; give another trainer.run_dir or delete it")
        self.path.mkdir(parents=True, exist_ok=True)

    def rollouts(self, step: int) -> Path:
        """Where the rollouts of a step are."""
        return self.path / "rollouts" / f"step-{step:05d}.jsonl"

    def dump(self, step: int, update: int) -> Path:
        """Where the rollouts of a skipped update are, readable like those of a step."""
        return self.dumps / f"step-{step:05d}-update-{update}.jsonl"
