"""What a run has reached so far, in a few lines, read from its files: all its lives are in it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rows import read_rows

_WINDOW = 5
"""Steps at either end whose rewards are averaged: a single step's reward is noisy."""


def summary_lines(directory: RunDirectory, *, rollouts_per_step: int) -> list[str]:
    """Returns the lines of a summary; [] before the first step.

    Args:
        directory: of the run.
        rollouts_per_step: prompts of a step times the group size.
    """
    steps, _ = read_rows(directory.metrics)
    evaluations, _ = read_rows(directory.evaluations)
    if not steps:
        return []

    lines = [f"summary after {steps[-1]['step']} steps"]
    accuracies = [(row["step"], row.get("heldout/pass_at_1")) for row in evaluations]
    accuracies = [(step, value) for step, value in accuracies if value is not None]
    if len(accuracies) > 1:
        first, before = accuracies[0]
        last, after = accuracies[-1]
        lines.append(
            f"  held-out accuracy  {before:.3f} after step {first}, {after:.3f} after step {last}"
        )

    # Of a short run the two windows do not overlap either.
    window = max(1, min(_WINDOW, len(steps) // 2))
    before = mean_reward(steps[:window])
    after = mean_reward(steps[-window:])
    lines.append(
        f"  reward             {before:.3f} in the first {window} steps, "
        f"{after:.3f} in the last {window}"
    )

    # Where the time of all steps went, stage by stage.
    seconds: dict[str, float] = {}
    for row in steps:
        for name, value in row.items():
            if name.startswith("seconds/") and value is not None:
                stage = name.removeprefix("seconds/")
                seconds[stage] = seconds.get(stage, 0.0) + value
    total = sum(seconds.values())
    # Three are enough to see where a step's time goes.
    longest = sorted(seconds, key=lambda name: seconds[name], reverse=True)[:3]
    shares = ""
    if total:
        shares = ", ".join(f"{name} {seconds[name] / total:.0%}" for name in longest)
    lines.append(f"  time in steps      {duration(total)} ({shares})")

    # A step that no engine answered has no mean length, and no tokens.
    lengths = [row.get("response_tokens_mean") or 0.0 for row in steps]
    tokens = sum(lengths) * rollouts_per_step
    lines.append(f"  response tokens    {tokens:,.0f}")
    return lines


def next_commands(directory: RunDirectory) -> list[str]:
    """Returns the commands that a user is likely to want after a run, with what each is for."""
    commands = [f"  tensorboard --logdir {directory.tensorboard}"]
    if directory.weights.exists():
        commands.insert(0, f"  megatron-real eval {directory.path} --bench NAME=FILE")
    return ["next:", *commands]


def duration(seconds: float) -> str:
    """Returns seconds as people say them: `42 s`, `3 min 20 s`, `5 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def mean_reward(steps: Sequence[Mapping[str, Any]]) -> float:
    """Returns the mean of `reward_mean` over the rows of steps that have it; NaN where none has."""
    # A step whose rollouts are all excluded has none.
    rewards = [row["reward_mean"] for row in steps if row.get("reward_mean") is not None]
    if not rewards:
        return math.nan
    return math.fsum(rewards) / len(rewards)
