"""Where a run's figures go beside its own files: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from megatron_real.disk import write_whole
from megatron_real.runs.directory import RunDirectory


class Tracker(Protocol):
    """Takes the figures of steps. Whatever it raises, it is left out from then on, and the run goes on."""

    name: str
    """As people call it."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Finite figures of one step, or of an evaluation after so many steps."""

    def close(self) -> None:
        """Flushes everything."""


class TensorBoardTracker:
    """Event files in the run directory."""

    name = "TensorBoard"

    def __init__(
        self,
        directory: RunDirectory,
        first_step: int | None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Opens a new file of events.

        Args:
            first_step: of a resumed run; what an earlier life wrote from there on is not shown.
            config: the run's configuration, shown as text and as hyperparameters.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(directory.tensorboard), purge_step=first_step)
        if config is not None:
            self._show(config)

    def _show(self, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        settings = dict(_flat(config))
        lines = (f"    {name}: {value}" for name, value in settings.items())
        self._events.add_text("configuration", "\n".join(lines))
        # SummaryWriter.add_hparams would open a second run beside this one.
        for summary in hparams(settings, {"reward/mean": 0.0, "heldout/pass_at_1": 0.0}):
            self._events._get_file_writer().add_summary(summary)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes and flushes, so that an interrupted run keeps every row."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """Ends the file."""
        self._events.close()


class WandbTracker:
    """One run of Weights & Biases for all lives of a run: its id is in the run directory."""

    name = "Weights & Biases"

    def __init__(self, directory: RunDirectory, config: Mapping[str, Any]) -> None:
        """`config`: the run's configuration."""
        import wandb as client

        self._run = client.init(
            id=_identity(directory),
            resume="allow",
            config=dict(config),
            dir=str(directory.path),
            name=directory.path.name,
        )
        # Steps are made again after a kill, and W&B drops figures of a step below its last one. Our
        # own `step` is the axis instead.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the figures."""
        self._run.log({**values, "step": step})

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every setting; what is neither text nor number as text."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            yield f"{prefix}{name}", value if plain else str(value)


def check_wandb() -> None:
    """Raises ValueError where wandb is asked for and not installed."""
    try:
        importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            "trainer.wandb=true, but wandb is not installed; pip install wandb, or set trainer.wandb=false"
        ) from error


def _identity(directory: RunDirectory) -> str:
    """The id that the run's first life has drawn."""
    try:
        values = json.loads(directory.wandb.read_text(encoding="utf-8"))
        return str(values["id"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        identity = uuid.uuid4().hex[:12]
        write_whole(directory.wandb, json.dumps({"id": identity}) + "\n")
        return identity
