"""Rates and lengths that a run, or a day with a GPU, has measured, in place of published ones."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_real.plan.devices import Device
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rows import read_rows

_LAST_STEPS = 50
"""Steps that are averaged: answers grow longer or shorter while a policy learns, and the latest
count."""


@dataclass(frozen=True)
class Rates:
    """What is known better than by the tables; None: not known."""

    train: float | None = None
    """Share of peak FLOP/s in training."""
    decode: float | None = None
    """Share of memory bandwidth in decoding."""
    mean_response: float | None = None
    """Tokens of an average answer."""


def measured(run: RunDirectory, given: Rates) -> Rates:
    """Returns the rates of a run's last steps; what is given goes before.

    The share of peak FLOP/s is known only where the run's GPU is (metric `mfu`).

    Raises:
        ValueError: the run has finished no step.
    """
    rows, _ = read_rows(run.metrics)
    if not rows:
        raise ValueError(
            f"--from is {str(run.path)!r}, which has no metrics; give the directory of a run"
        )

    train = given.train
    if train is None:
        # The last steps alone: the first ones warm up, and answers change in length.
        train = _mean([row.get("mfu") for row in rows[-_LAST_STEPS:]])
    mean_response = given.mean_response
    if mean_response is None:
        mean_response = _mean([row.get("response_tokens_mean") for row in rows[-_LAST_STEPS:]])
    return dataclasses.replace(given, train=train, mean_response=mean_response)


def measured_device(file: str | Path, device: Device) -> Device:
    """Returns the device with the shares of peak FLOP/s that training was measured to reach.

    They are read from `file`, the JSON of tools/gpu_day.py.

    Raises:
        ValueError: the file cannot be read, is a rehearsal's, is of another kind of GPU, or has no
            such share.
    """
    try:
        results = json.loads(Path(file).read_text(encoding="utf-8"))
        stages = results["stages"].values()
        rehearsed = results["rehearsed_on_a_cpu"]
        records: list[Any] = [
            s for s in stages if s["status"] == "done" and "train_utilization" in s
        ]
        shares = {
            float(s["train_utilization"]["billions"]): float(s["train_utilization"]["share"])
            for s in records
        }
        machines = {str(s["machine"]) for s in records}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"--rates {str(file)!r} is not the JSON that tools/gpu_day.py writes "
            f"({type(error).__name__}: {error})"
        ) from error
    if rehearsed:
        raise ValueError(f"--rates {str(file)!r} was rehearsed on a CPU; its figures say nothing")
    if not shares:
        raise ValueError(
            f"--rates {str(file)!r} has no utilization of a train step; run tools/gpu_day.py with "
            "its stages step-*"
        )

    # Shares carry over between sizes of one kind of GPU, not between kinds.
    kind = device.name.partition("-")[0]
    for machine in machines:
        if kind not in machine.lower():
            raise ValueError(
                f"--rates {str(file)!r} was measured on {machine.partition(',')[0]}, not on --gpu "
                f"{device.name}"
            )
    wrong = [share for share in shares.values() if not 0 < share <= 1]
    if wrong:
        raise ValueError(
            f"--rates {str(file)!r} has a utilization of {wrong[0]}; it must be above 0 and at "
            "most 1"
        )

    return dataclasses.replace(device, utilization=shares, measured=str(file))


def _mean(values: list[float | None]) -> float | None:
    """Returns the mean of the finite values, or None without any."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return None
    return math.fsum(known) / len(known)
