"""What became of a run of a sweep, and its figures, read from its directory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from megatron_real.compare.sweep import SweepRun
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rows import read_rows
from megatron_real.runs.status import read_status

_WINDOW_SHARE = 0.1
"""The reward of a run is the mean over this share of its steps, the last ones: a single step's is noisy."""


class Outcome(StrEnum):
    """How far a run has come."""

    FINISHED = "finished"
    """All steps are done."""
    DIVERGED = "diverged"
    """Its weights, or too many updates in a row, were not finite."""
    FAILED = "failed"
    """It ended by another error, which the same command would repeat, or did so in this start of the sweep."""
    UNFINISHED = "unfinished"
    """It has not begun, is at work, or was interrupted."""


@dataclass(frozen=True)
class RunResult:
    """A run and its figures; the figures are those of a finished run, and NaN for all others."""

    variant: str
    seed: int
    outcome: Outcome
    reason: str
    """Why it ended early; "" where nothing is known."""
    steps: int
    """Steps done."""
    accuracy: float
    """pass@1 on data.heldout after the last step; NaN without held-out problems."""
    accuracy_of: Mapping[str, float]
    """{problem: share of its samples that were right} of that evaluation; {} where the run has not kept it."""
    reward: float
    """Mean reward over the last tenth of the steps."""
    seconds: float
    """Wall clock of steps and evaluations, of the first rank; start-up and what was done twice are not in it."""
    tokens: int
    """Response tokens of all steps done."""
    skipped_updates: int
    """Updates that were left out because loss or gradient were not finite."""

    @property
    def name(self) -> str:
        """Returns what the run is called in sentences."""
        return f"{self.variant}, seed {self.seed}"


def read_result(run: SweepRun) -> RunResult:
    """Reads what a run has reached."""
    directory = run.directory
    status = read_status(directory.status)
    # A start that was refused leaves the run itself as it was.
    status = status.get("before") or status
    outcome = _outcome(status)
    rows, _ = read_rows(directory.metrics)
    evaluations, _ = read_rows(directory.evaluations)

    finished = outcome == Outcome.FINISHED
    per_step = run.config.rollout.num_prompts * run.config.rollout.group_size
    return RunResult(
        variant=run.variant,
        seed=run.seed,
        outcome=outcome,
        reason="" if finished else str(status.get("reason") or ""),
        steps=len(rows),
        accuracy=_accuracy(evaluations, run.config.trainer.steps) if finished else math.nan,
        accuracy_of=_accuracy_of(directory, run.config.trainer.steps) if finished else {},
        reward=_reward(rows) if finished else math.nan,
        seconds=_seconds(rows) + _seconds(evaluations),
        tokens=round(math.fsum(row.get("response_tokens_mean") or 0.0 for row in rows) * per_step),
        skipped_updates=int(sum(row.get("skipped_updates") or 0 for row in rows)),
    )


def _outcome(status: Mapping[str, Any]) -> Outcome:
    state = status.get("state")
    if state == "finished":
        return Outcome.FINISHED
    if state == "failed":
        return Outcome.DIVERGED if status.get("diverged") else Outcome.FAILED
    return Outcome.UNFINISHED


def _accuracy(evaluations: Sequence[Mapping[str, Any]], steps: int) -> float:
    last = [row.get("heldout/pass_at_1") for row in evaluations if row.get("step") == steps]
    return float(last[-1]) if last and last[-1] is not None else math.nan


def _accuracy_of(directory: RunDirectory, steps: int) -> dict[str, float]:
    """{} of a run that was made before its directory had this file, or whose file is broken."""
    try:
        answers = json.loads(directory.heldout_answers(steps).read_text(encoding="utf-8"))
        samples = answers["samples"]
        return {problem: correct / samples for problem, correct in answers["correct"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return {}


def _reward(rows: Sequence[Mapping[str, Any]]) -> float:
    """NaN where one of the last steps had no labelled rollout."""
    window = rows[-max(1, round(len(rows) * _WINDOW_SHARE)) :]
    rewards = [row.get("reward_mean") for row in window]
    known = [reward for reward in rewards if reward is not None]
    return math.fsum(known) / len(known) if rewards and len(known) == len(rewards) else math.nan


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    return math.fsum(
        value
        for row in rows
        for name, value in row.items()
        if name.startswith("seconds/") and value is not None
    )
