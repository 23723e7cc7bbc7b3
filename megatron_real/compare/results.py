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
"""Share of a run's steps, the last ones, whose mean is the run's reward.

A single step's reward is noisy.
"""


class RunOutcome(StrEnum):
    """How far a run has come."""

    FINISHED = "finished"
    """All steps are done."""
    DIVERGED = "diverged"
    """Its weights, or too many updates in a row, were not finite."""
    FAILED = "failed"
    """It ended by another error.

    The same command would repeat the error, or the run ended in this start of the sweep.
    """
    UNFINISHED = "unfinished"
    """It has not begun, is at work, or was interrupted."""


@dataclass(frozen=True)
class RunResult:
    """A run and its figures, which are NaN unless the run is finished."""

    variant: str
    seed: int
    outcome: RunOutcome
    reason: str
    """Why it ended early; "" where nothing is known."""
    steps: int
    """Number of steps done."""
    accuracy: float
    """pass@1 on data.heldout after the last step; NaN without held-out problems."""
    accuracy_of: Mapping[str, float]
    """Share of a problem's samples that were right in that evaluation, by problem.

    It is empty where the run has not kept it.
    """
    reward: float
    """Mean reward over the last tenth of the steps."""
    seconds: float
    """Wall clock of steps and evaluations on the first rank.

    Start-up and steps that were done again are not in it.
    """
    tokens: int
    """Number of response tokens of all steps done."""
    skipped_updates: int
    """Number of updates that were left out because loss or gradient were not finite."""

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
    rows, _ = read_rows(directory.metrics)
    evaluations, _ = read_rows(directory.evaluations)

    outcome = RunOutcome.UNFINISHED
    if status.get("state") == "finished":
        outcome = RunOutcome.FINISHED
    elif status.get("state") == "failed":
        # A divergence is a result of the variant; another failure may be one of the machine.
        outcome = RunOutcome.FAILED
        if status.get("diverged"):
            outcome = RunOutcome.DIVERGED

    reason = str(status.get("reason") or "")
    accuracy = math.nan
    accuracy_of = {}
    reward = math.nan

    # Figures of a run in progress would be of fewer steps than those of the others.
    if outcome == RunOutcome.FINISHED:
        reason = ""
        # Of the last evaluation after the last step: a life that was resumed may evaluate again.
        steps = run.config.trainer.steps
        figures = [row.get("heldout/pass_at_1") for row in evaluations if row.get("step") == steps]
        if figures and figures[-1] is not None:
            accuracy = float(figures[-1])
        accuracy_of = _accuracy_of(directory, steps)
        reward = _reward(rows)

    rollouts_per_step = run.config.rollout.num_prompts * run.config.rollout.group_size
    # The rows have means: times the rollouts of a step they are counts again.
    mean_tokens = math.fsum(row.get("response_tokens_mean") or 0.0 for row in rows)

    return RunResult(
        variant=run.variant,
        seed=run.seed,
        outcome=outcome,
        reason=reason,
        steps=len(rows),
        accuracy=accuracy,
        accuracy_of=accuracy_of,
        reward=reward,
        seconds=_seconds(rows) + _seconds(evaluations),
        tokens=round(mean_tokens * rollouts_per_step),
        skipped_updates=int(sum(row.get("skipped_updates") or 0 for row in rows)),
    )


def _accuracy_of(directory: RunDirectory, steps: int) -> dict[str, float]:
    """Returns the accuracy of each problem after a step.

    It is empty for a run of an earlier version, whose directory has no such file, and where the
    file is broken.
    """
    try:
        # Of the last step alone: variants are compared at the end of their budget.
        answers = json.loads(directory.heldout_answers(steps).read_text(encoding="utf-8"))
        samples = answers["samples"]
        return {problem: correct / samples for problem, correct in answers["correct"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return {}


def _reward(rows: Sequence[Mapping[str, Any]]) -> float:
    """Returns the mean reward of the last steps; NaN where one of them had no labelled rollout."""
    # At least one: a tenth of five steps or fewer rounds to none.
    num_steps = max(1, round(len(rows) * _WINDOW_SHARE))
    rewards = [row.get("reward_mean") for row in rows[-num_steps:]]
    # All or nothing: a mean over fewer steps would not compare with the others'.
    known = [reward for reward in rewards if reward is not None]
    if not rewards or len(known) < len(rewards):
        return math.nan
    return math.fsum(known) / len(known)


def _seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    """Returns the sum of all stages' times."""
    seconds: list[float] = []
    # By the prefix, rank_seconds/ is left out: it has the times of the same stages again.
    for row in rows:
        stages = [value for name, value in row.items() if name.startswith("seconds/")]
        seconds += [value for value in stages if value is not None]
    return math.fsum(seconds)
