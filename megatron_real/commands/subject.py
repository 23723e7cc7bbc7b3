"""What a command's word for a model stands for: files, a run's export, or a run's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_real.config.locate import is_run_directory, weights_directory
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.saved import saved

_WHOLE = ("evaluation.max_problems=0",)
"""A run may look at a part of its held-out problems. A benchmark is evaluated as a whole unless a word says otherwise."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated: where its configuration is, and the words that lead from that to its weights."""

    config: Path
    """YAML file, or directory of HF weights."""
    words: tuple[str, ...] = ()
    """Settings of the configuration that the weights of a run need."""
    label: str = ""
    """What its results are called; "" for the name of model.path."""

    @classmethod
    def of(cls, word: str) -> Subject:
        """Finds the configuration of what a word names.

        Args:
            word: a YAML file, a directory of HF weights, a hub id that is cached, a run directory (its export, else
                its newest checkpoint), the export of a run, or one of its checkpoints.

        Raises:
            ValueError: a run that has neither exported nor saved anything.
        """
        path = Path(word)
        run = RunDirectory(path)
        if is_run_directory(path):
            if run.weights.is_dir():
                return cls.of(str(run.weights))
            return cls.of(str(checkpoint_of_run(path)))
        if is_run_directory(path.parent) and path == RunDirectory(path.parent).weights:
            made_by = RunDirectory(path.parent)
            of_export = (f"model.path={path}", "model.weights=", *_WHOLE)
            return cls(made_by.config, of_export, path.parent.name)
        owner = path.parent.parent
        if is_run_directory(owner) and path.parent == RunDirectory(owner).checkpoints:
            of_checkpoint = (f"model.weights={path}", *_WHOLE)
            return cls(RunDirectory(owner).config, of_checkpoint, f"{owner.name}-{path.name}")
        return cls(path if path.exists() else Path(weights_directory(word, "the model")))

    def name(self, model_path: str) -> str:
        """Returns what the results are called."""
        return self.label or results_name(Path(model_path).resolve())


def checkpoint_of_run(path: Path) -> Path:
    """Returns the newest whole checkpoint of a run directory; another directory as it is.

    Raises:
        ValueError: the run has none.
    """
    if not is_run_directory(path):
        return path
    whole = [one.path for one in saved(RunDirectory(path).checkpoints) if not one.incomplete()]
    if not whole:
        raise ValueError(f"{path} has no whole checkpoint yet; let the run save one")
    return whole[0]  # the newest comes first


def hf_config_of(checkpoint: Path) -> Path | None:
    """Returns the HF directory whose model a run's checkpoint is of; None for a checkpoint of no run."""
    import yaml

    owner = RunDirectory(checkpoint.parent.parent)
    if not is_run_directory(owner.path):
        return None
    config = yaml.safe_load(owner.config.read_text(encoding="utf-8"))
    return Path(config["model"]["path"])


def results_name(model: Path) -> str:
    """What the results of a model are called: as its run, where a run exported it, which calls all of them hf."""
    return model.parent.name if model.name == "hf" else model.name
