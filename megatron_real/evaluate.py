"""pass@1 on held-out problems, with the engine and the verifier of training."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_real.labels.labeller import FAILED
from megatron_real.records import POSITIVE, Prompt, Rollout, Sampling
from megatron_real.rollout.stage import RolloutStage


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on one set of problems."""

    pass_at_1: float
    """Mean over problems of the share of samples verified correct."""
    standard_error: float
    """Of pass_at_1, over problems."""
    problems: int
    """Problems asked."""
    samples: int
    """Completions per problem."""
    failed_checks: int
    """Completions whose check failed: they count as wrong here."""
    truncated_share: float
    """Share of completions cut at the length limit."""
    response_tokens_mean: float
    """Mean response length."""


def evaluate(stage: RolloutStage, problems: Sequence[Prompt], sampling: Sampling, *, seed: int) -> Evaluation:
    """Samples and verifies answers to `problems`. Collective over all ranks; the engine must hold the weights."""
    rollouts = stage.label(problems, stage.generate(problems, sampling, seed=seed))
    return summarise(rollouts, samples=sampling.num_samples)


def summarise(rollouts: Sequence[Rollout], *, samples: int) -> Evaluation:
    """The figures of labelled completions.

    Raises:
        ValueError: there are none.
    """
    if not rollouts:
        raise ValueError("there is no completion to evaluate; data.heldout may be empty after the length filter")
    correct: dict[int, list[bool]] = defaultdict(list)
    for rollout in rollouts:
        correct[rollout.group].append(rollout.verdict.label == POSITIVE)
    shares = [sum(marks) / len(marks) for marks in correct.values()]
    mean = sum(shares) / len(shares)
    variance = sum((s - mean) ** 2 for s in shares) / max(len(shares) - 1, 1)
    return Evaluation(
        pass_at_1=mean,
        standard_error=math.sqrt(variance / len(shares)),
        problems=len(shares),
        samples=samples,
        failed_checks=sum(r.verdict.status in FAILED for r in rollouts),
        truncated_share=sum(not r.completion.finished for r in rollouts) / len(rollouts),
        response_tokens_mean=sum(len(r.completion.token_ids) for r in rollouts) / len(rollouts),
    )
