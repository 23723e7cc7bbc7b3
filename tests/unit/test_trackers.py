"""Each tracker runs for real without a network: what it holds after two lives of a run, and that
none ends a run.
"""

from __future__ import annotations

import json
import math
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from megatron_real.runs import metrics
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.metrics import MetricsWriter
from megatron_real.runs.trackers import TRACKERS, Tracker, check_installed

CONFIG = {"objective": {"name": "real", "tau": 0.5}, "trainer": {"steps": 3}}


def write_a_life(directory: RunDirectory, tracker: str, first_step: int, steps: int = 3) -> None:
    """Writes two steps and an evaluation, as a run does."""
    warnings: list[str] = []
    writer = MetricsWriter(
        directory,
        trackers=[tracker],
        config={**CONFIG, "trainer": {"steps": steps}},
        first_step=first_step if first_step > 1 else None,
        say=warnings.append,
    )
    writer.write(first_step, {"loss": 0.5, "grad_norm": math.nan})
    writer.write(first_step + 1, {"loss": 0.25})
    writer.write_evaluation(first_step + 1, {"heldout/pass_at_1": 0.75})
    writer.close()

    assert warnings == []


def test_tensorboard_gets_everything(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = RunDirectory(tmp_path)
    write_a_life(directory, "tensorboard", 1)
    events = EventAccumulator(str(directory.tensorboard)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["heldout/pass_at_1", "objective/loss"]

    losses = [(event.step, event.value) for event in events.Scalars("objective/loss")]
    assert losses == [(1, 0.5), (2, 0.25)]

    (settings,) = events.Tensors("configuration/text_summary")
    assert b"objective.tau: 0.5" in settings.tensor_proto.string_val[0]

    (where,) = events.Tensors("run directory/text_summary")
    assert str(tmp_path).encode() in where.tensor_proto.string_val[0]


def test_tensorboard_shows_a_row_before_the_run_ends(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    directory = RunDirectory(tmp_path)
    writer = MetricsWriter(directory, trackers=["tensorboard"], config=CONFIG)
    writer.write(3, {"loss": 0.25})
    events = EventAccumulator(str(directory.tensorboard)).Reload()
    assert [event.step for event in events.Scalars("objective/loss")] == [3]
    writer.close()


def test_mlflow_holds_one_run_of_both_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow", reason="MLflow is not installed: pip install mlflow-skinny")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    directory = RunDirectory(tmp_path / "first")
    directory.path.mkdir()
    write_a_life(directory, "mlflow", 1)
    write_a_life(directory, "mlflow", 2, steps=9)  # the second step is made again

    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(directory.path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("megatron_real")
    assert experiment is not None

    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params == {
        "objective.name": "real",
        "objective.tau": "0.5",
        "trainer.steps": "3",
    }
    assert run.data.tags["run_directory"] == str(directory.path)

    losses = client.get_metric_history(run.info.run_id, "objective/loss")
    assert [(one.step, one.value) for one in losses] == [(1, 0.5), (2, 0.25), (2, 0.5), (3, 0.25)]

    held = client.get_metric_history(run.info.run_id, "heldout/pass_at_1")
    assert [(one.step, one.value) for one in held] == [(2, 0.75), (3, 0.75)]

    (file,) = directory.path.glob("mlruns/*/*/artifacts/configuration.json")
    assert json.loads(file.read_text())["trainer"]["steps"] == 9


def test_trackio_holds_one_run_of_both_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio", reason="Trackio is not installed: pip install trackio")
    # Trackio reads its folder when it is imported, which may have been before this test.
    import trackio.utils
    from trackio.sqlite_storage import SQLiteStorage

    for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(trackio.utils, "TRACKIO_DIR", tmp_path / "store")
    monkeypatch.setattr(trackio.sqlite_storage, "TRACKIO_DIR", tmp_path / "store")
    monkeypatch.setenv("TRACKIO_PROJECT", "sums")
    directory = RunDirectory(tmp_path / "first")
    directory.path.mkdir()
    write_a_life(directory, "trackio", 1)
    write_a_life(directory, "trackio", 2, steps=9)  # the second step is made again

    identity = json.loads((directory.path / "trackio.json").read_text())["id"]
    (run,) = trackio.Api().runs("sums")
    assert run.name == f"first-{identity}"
    configuration = SQLiteStorage.get_run_config("sums", run.name)
    assert configuration["objective"]["tau"] == 0.5
    assert configuration["run_directory"] == str(directory.path)
    rows = SQLiteStorage.get_logs("sums", run.name)
    losses = [(row["step"], row["objective/loss"]) for row in rows if "objective/loss" in row]
    assert losses == [(1, 0.5), (2, 0.25), (2, 0.5), (3, 0.25)]
    held = [(row["step"], row["heldout/pass_at_1"]) for row in rows if "heldout/pass_at_1" in row]
    assert held == [(2, 0.75), (3, 0.75)]


def test_wandb_offline_keeps_the_configuration_and_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    directory = RunDirectory(tmp_path / "first")
    directory.path.mkdir()
    write_a_life(directory, "wandb", 1)
    (file,) = directory.path.glob("wandb/offline-run-*/*.wandb")
    identity = json.loads((directory.path / "wandb.json").read_text())["id"]

    assert file.name == f"run-{identity}.wandb"

    # The process that writes may close the file a little after the run has ended.
    ended = time.monotonic() + 60
    while "exit" not in (kinds := [one.WhichOneof("record_type") for one in wandb_records(file)]):
        assert time.monotonic() < ended, kinds
        time.sleep(0.1)
    configuration, history = read_wandb(file)

    assert configuration["objective"]["tau"] == 0.5
    assert configuration["run_directory"] == str(directory.path)

    losses = [(row["step"], row["objective/loss"]) for row in history if "objective/loss" in row]
    assert losses == [(1, 0.5), (2, 0.25)]
    assert [row["step"] for row in history if row.get("heldout/pass_at_1") == 0.75] == [2]
    assert not any("objective/grad_norm" in row for row in history[:1])


def read_wandb(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads the records that W&B would send: the configuration, and the rows of figures."""
    configuration: dict[str, Any] = {}
    history = []
    for record in wandb_records(file):
        for item in record.run.config.update:
            configuration[item.key] = json.loads(item.value_json)
        if record.HasField("history"):
            row = {}
            for item in record.history.item:
                row[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
            history.append(row)
    return configuration, history


def wandb_records(file: Path) -> Iterator[Any]:
    """Yields the messages of a run's file in the order in which they were written."""
    from wandb.proto import wandb_internal_pb2

    # Generated code, which makes its classes when it is imported.
    messages: Any = wandb_internal_pb2
    for data in records_of(file.read_bytes()):
        record = messages.Record()
        record.ParseFromString(data)
        yield record


def records_of(log: bytes) -> Iterator[bytes]:
    """Yields the records of a log in LevelDB's format, as W&B writes it: 7 bytes of identification,
    then blocks of 32 KiB.

    Each part of a record has a header of 7 bytes: a checksum, the length, and 1 for whole, 2 for
    first, 3 for middle or 4 for last. A last record that is not written to its end is left out.
    """
    assert log[:4] == b":W&B"

    at = 7
    data = b""
    while at + 7 <= len(log):
        left_in_block = 32768 - at % 32768
        if left_in_block < 7:
            at += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", log[at : at + 7])
        if at + 7 + length > len(log):
            return
        data += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield data
            data = b""


@pytest.mark.parametrize("fails_at", ["open", "write", "close"])
def test_a_tracker_that_fails_is_reported_once_and_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str
) -> None:
    class Failing:
        name: ClassVar[str] = "Tracker"
        package: ClassVar[str] = "json"
        installed_by: ClassVar[str] = "json"

        def __init__(
            self, directory: RunDirectory, config: Mapping[str, Any], first_step: int | None
        ) -> None:
            self.at("open")

        def write(self, step: int, values: Mapping[str, float]) -> None:
            self.at("write")

        def close(self) -> None:
            self.at("close")

        def at(self, moment: str) -> None:
            if moment == fails_at:
                raise RuntimeError("out of reach\nand more lines")

    kind: type[Tracker] = Failing
    trackers = dict(TRACKERS, failing=kind)
    monkeypatch.setattr(metrics, "TRACKERS", trackers)
    warnings: list[str] = []
    directory = RunDirectory(tmp_path)
    writer = MetricsWriter(directory, trackers=["failing"], config=CONFIG, say=warnings.append)
    for step in (1, 2):
        writer.write(step, {"loss": 0.5})
    writer.close()
    (warning,) = warnings

    assert warning.startswith("WARNING: Tracker is left out")
    assert warning.endswith("RuntimeError: out of reach")
    assert len(directory.metrics.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("setting", "package"),
    [("wandb", "wandb"), ("mlflow", "mlflow-skinny"), ("trackio", "trackio")],
)
def test_a_tracker_that_is_not_installed_is_one_clear_sentence(
    monkeypatch: pytest.MonkeyPatch, setting: str, package: str
) -> None:
    monkeypatch.setitem(sys.modules, TRACKERS[setting].package, None)  # as if it could not be found
    sentence = (
        rf"trainer\.{setting}=true, but {setting} is not installed; pip install {package}, or"
    )
    with pytest.raises(ValueError, match=sentence):
        check_installed(["tensorboard", setting])
