"""What a command's word for a model stands for: files, a run's export, or a run's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_real.config.locate import is_run_directory, weights_directory
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.saved import saved

# A run may look at a part of its held-out problems. A benchmark is evaluated as a whole unless a
# word says otherwise.
_WHOLE = "evaluation.max_problems=0"


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a configuration, and the overrides that lead from it to the weights."""

    config: Path
    """YAML file, or directory of HF weights."""
    overrides: tuple[str, ...] = ()
    """Settings of the configuration that the weights of a run need."""
    label: str = ""
    """What its results are called; "" for the name of model.path."""

    @classmethod
    def of(cls, word: str) -> Subject:
        """Finds the configuration of what a word names.

        Args:
            word: a YAML file, a directory of HF weights, a hub id that is cached, a run directory
                (its export, else its newest checkpoint), the export of a run, or one of its
                checkpoints.

        Raises:
            ValueError: a run that has neither exported nor saved anything.
        """
        path = Path(word)
        run = RunDirectory(path)
        if is_run_directory(path):
            if run.weights.is_dir():
                return cls.of(str(run.weights))
            return cls.of(str(checkpoint_of_run(path)))

        # The export of a run: its settings are those of the run.
        parent = RunDirectory(path.parent)
        if is_run_directory(parent.path) and path == parent.weights:
            # The export's own config and tokenizer, and no checkpoint beside it.
            overrides = (f"model.path={path}", "model.weights=", _WHOLE)
            return cls(parent.config, overrides, parent.path.name)

        # RUN/checkpoints/step_N: the run is two levels up.
        owner = RunDirectory(path.parent.parent)
        if is_run_directory(owner.path) and path.parent == owner.checkpoints:
            label = f"{owner.path.name}-{path.name}"
            return cls(owner.config, (f"model.weights={path}", _WHOLE), label)

        # Not a file here: perhaps a hub id in the cache.
        if not path.exists():
            path = Path(weights_directory(word, "the model"))
        return cls(path)

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
    for checkpoint in saved(RunDirectory(path).checkpoints):  # the newest first
        if not checkpoint.incomplete():
            return checkpoint.path
    raise ValueError(f"{path} has no whole checkpoint yet; let the run save one")


def hf_config_of(checkpoint: Path) -> Path | None:
    """Returns the HF directory of a run's model, by one of its checkpoints; None without a run."""
    owner = RunDirectory(checkpoint.parent.parent)
    if not is_run_directory(owner.path):
        return None
    config = owner.read_config("the run's model is not known; give --hf-config")
    return Path(config["model"]["path"])


def results_name(model: Path) -> str:
    """Returns what the results of a model are called: as its directory, or as the run it is of."""
    # Every run calls its export hf.
    if model.name == "hf":
        return model.parent.name
    return model.name
