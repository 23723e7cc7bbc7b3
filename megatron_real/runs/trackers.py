"""Where a run's figures go beside its own files: TensorBoard, Weights & Biases, MLflow, Trackio.

A tracker is a class of the form of `Tracker` and a row in `TRACKERS`; its setting is
`trainer.NAME`. Each one gets the configuration, the path of the run directory, and the figures of
steps and evaluations. The run's own files are the record: a tracker that raises is left out from
then on.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar, Protocol

from megatron_real.disk import write_whole
from megatron_real.runs.directory import RunDirectory


class Tracker(Protocol):
    """Takes the figures of steps.

    If it raises, it is left out from then on, and the run goes on.
    """

    name: ClassVar[str]
    """The name by which people know it."""
    package: ClassVar[str]
    """The package that is imported."""
    installed_by: ClassVar[str]
    """The package that pip installs."""

    def __init__(
        self, directory: RunDirectory, config: Mapping[str, Any], first_step: int | None
    ) -> None:
        """Opens the tracker.

        Args:
            directory: the run's directory.
            config: the run's configuration, in which secrets are written as they were given
                (`${oc.env:HF_TOKEN}`).
            first_step: the first step of a resumed run; what an earlier life wrote from there on is
                made again. None for a new run.
        """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the finite figures of a step, or of an evaluation after `step` steps."""

    def close(self) -> None:
        """Flushes everything."""


class TensorBoardTracker:
    """Event files in the run directory."""

    name: ClassVar[str] = "TensorBoard"
    package: ClassVar[str] = "tensorboard"
    installed_by: ClassVar[str] = "tensorboard"

    def __init__(
        self, directory: RunDirectory, config: Mapping[str, Any], first_step: int | None
    ) -> None:
        """Opens a new file of events.

        What an earlier life wrote from `first_step` on is not shown.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._events = SummaryWriter(str(directory.tensorboard), purge_step=first_step)
        self._show(directory, config)

    def _show(self, directory: RunDirectory, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        settings = dict(_flat(config))
        lines = (f"    {name}: {value}" for name, value in settings.items())
        self._events.add_text("configuration", "\n".join(lines))
        self._events.add_text("run directory", f"    {directory.path.resolve()}")
        # SummaryWriter.add_hparams would open a second run beside this one. hparams() takes only
        # the names of the metrics; the zeros are ignored.
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

    name: ClassVar[str] = "Weights & Biases"
    package: ClassVar[str] = "wandb"
    installed_by: ClassVar[str] = "wandb"

    def __init__(
        self, directory: RunDirectory, config: Mapping[str, Any], first_step: int | None
    ) -> None:
        """Begins the run, or goes on with it.

        WANDB_MODE=offline writes to the run directory alone.
        """
        import wandb as client

        self._run = client.init(
            # With resume="allow" W&B goes on with the run of this id, or begins it.
            id=_identity(directory, "wandb"),
            resume="allow",
            config={**config, "run_directory": str(directory.path.resolve())},
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


class MlflowTracker:
    """One run of MLflow for all lives of a run.

    It is at MLFLOW_TRACKING_URI, else in files: mlruns/ in the run directory. Parameters of MLflow
    cannot change: they are the first life's settings. The file configuration.json beside them is
    the newest life's.
    """

    name: ClassVar[str] = "MLflow"
    package: ClassVar[str] = "mlflow"
    installed_by: ClassVar[str] = "mlflow-skinny"

    def __init__(
        self, directory: RunDirectory, config: Mapping[str, Any], first_step: int | None
    ) -> None:
        """Begins the run, or goes on with it.

        Its experiment is MLFLOW_EXPERIMENT_NAME, by default megatron_real.
        """
        # Since 3.7 MLflow asks whoever keeps runs in files to say that it is meant.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        store = (
            os.environ.get("MLFLOW_TRACKING_URI") or (directory.path / "mlruns").resolve().as_uri()
        )
        self._client = MlflowClient(tracking_uri=store)

        # An earlier life's run, unless the store is another one than before: then a new run begins.
        known_run = None
        identity = _read_identity(directory, "mlflow")
        if identity is not None:
            with contextlib.suppress(MlflowException):
                known_run = str(self._client.get_run(identity).info.run_id)
        self._run = known_run or self._new_run(directory, config)

        self._client.update_run(self._run, status="RUNNING")
        self._client.set_tag(self._run, "run_directory", str(directory.path.resolve()))
        self._client.log_dict(self._run, dict(config), "configuration.json")

    def _new_run(self, directory: RunDirectory, config: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "megatron_real"
        experiment = self._client.get_experiment_by_name(name)
        if experiment:
            number = experiment.experiment_id
        else:
            number = self._client.create_experiment(name)
        run = str(self._client.create_run(number, run_name=directory.path.name).info.run_id)
        # Before the parameters: a life that is killed while it sends them must leave a known run.
        _write_identity(directory, "mlflow", run)
        params = [Param(key, str(value)[:_MLFLOW_TEXT]) for key, value in _flat(config)]
        # The server refuses larger batches as a whole.
        for start in range(0, len(params), _MLFLOW_BATCH):
            self._client.log_batch(run, params=params[start : start + _MLFLOW_BATCH])
        return run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the figures."""
        from mlflow.entities import Metric

        # MLflow counts time in milliseconds.
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        for start in range(0, len(metrics), _MLFLOW_METRICS):
            self._client.log_batch(self._run, metrics=metrics[start : start + _MLFLOW_METRICS])

    def close(self) -> None:
        """Ends the run."""
        self._client.set_terminated(self._run)


_MLFLOW_TEXT = 6_000
"""Characters of a parameter (mlflow.utils.validation.MAX_PARAM_VAL_LENGTH)."""
_MLFLOW_BATCH = 100
"""Parameters of a batch (mlflow.utils.validation.MAX_PARAMS_TAGS_PER_BATCH)."""
_MLFLOW_METRICS = 1_000
"""Figures of a batch (mlflow.utils.validation.MAX_METRICS_PER_BATCH)."""


class TrackioTracker:
    """One run of Trackio for all lives of a run: its name is in the run directory.

    It is where Trackio keeps all runs of this machine (TRACKIO_DIR), so that `trackio show` has
    them side by side; where TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says so, it is there instead.
    """

    name: ClassVar[str] = "Trackio"
    package: ClassVar[str] = "trackio"
    installed_by: ClassVar[str] = "trackio"

    def __init__(
        self, directory: RunDirectory, config: Mapping[str, Any], first_step: int | None
    ) -> None:
        """Begins the run, or goes on with it.

        Its project is TRACKIO_PROJECT, by default megatron_real.
        """
        import trackio

        # Trackio resumes by name, and two run directories may have the same one.
        name = f"{directory.path.resolve().name}-{_identity(directory, 'trackio')}"
        # What it prints is for people; standard output may be read by a program.
        with contextlib.redirect_stdout(sys.stderr):
            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT") or "megatron_real",
                name=name,
                resume="allow",
                config={**config, "run_directory": str(directory.path.resolve())},
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the figures."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        import trackio

        with contextlib.redirect_stdout(sys.stderr):
            trackio.finish()  # the run's own finish() would be called again at the process's end


TRACKERS: Mapping[str, type[Tracker]] = {
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
    "trackio": TrackioTracker,
    "tensorboard": TensorBoardTracker,
}
"""By the name of their setting in `trainer`."""


def check_installed(names: Iterable[str]) -> None:
    """Raises ValueError where a tracker is asked for whose package is not installed."""
    for setting in names:
        tracker = TRACKERS[setting]
        try:
            # Looked for and not imported: these packages take seconds.
            present = importlib.util.find_spec(tracker.package) is not None
        except (ImportError, ValueError):
            present = False
        if not present:
            raise ValueError(
                f"trainer.{setting}=true, but {tracker.package} is not installed; "
                f"pip install {tracker.installed_by}, or set trainer.{setting}=false"
            )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, value) of every setting; what is neither text nor number as text."""
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            # An empty table has no settings of its own: it is shown as the text "{}".
            if not isinstance(value, bool | int | float | str):
                value = str(value)
            yield f"{prefix}{name}", value


def _identity(directory: RunDirectory, setting: str) -> str:
    """Returns the id that the run's first life has drawn."""
    identity = _read_identity(directory, setting)
    if identity is None:
        identity = uuid.uuid4().hex[:12]
        _write_identity(directory, setting, identity)
    return identity


def _read_identity(directory: RunDirectory, setting: str) -> str | None:
    try:
        values = json.loads(directory.tracker(setting).read_text(encoding="utf-8"))
        return str(values["id"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _write_identity(directory: RunDirectory, setting: str, identity: str) -> None:
    write_whole(directory.tracker(setting), json.dumps({"id": identity}) + "\n")
