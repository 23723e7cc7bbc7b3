"""The updates of a step in plain numbers, for its row of metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from megatron_real.policy.policy import Policy, Update
from megatron_real.policy.train_step import Batch, gathered_tokens
from megatron_real.runs.metrics import Training


def summary(
    policy: Policy, batches: Sequence[Batch], updates: Sequence[Update], *, lag: float
) -> Training:
    """Summarises the updates of a step. Collective over all ranks.

    Args:
        policy: the policy, after the updates.
        batches: the minibatches of the step.
        updates: what each of them did.
        lag: steps between the weights that generated the rollouts and those that the step began
            with.
    """
    objective = policy.settings.objective
    num_tokens: list[int] = []
    scores: list[float] = []
    weights: list[float] = []
    relative_weights = []
    for batch, update in zip(batches, updates, strict=True):
        rollouts = batch.minibatch.rollouts
        weight_R = update.gradient.weight_R
        num_tokens += [rollouts[i].num_tokens for i in batch.minibatch.kept]
        weights += weight_R.tolist()

        # A rollout that is not kept was never scored: its 0 is no score.
        kept = set(batch.minibatch.kept)
        for i, score in enumerate(update.gradient.score_R.tolist()):
            scores.append(score if i in kept else math.nan)

        # |dL / dscore| over the objective's bound of it, which is divided by the groups.
        relative_weight = math.nan
        if objective.weight_bound is not None:
            largest = float(weight_R.abs().max())
            relative_weight = largest * batch.facts.denominator / objective.weight_bound
        relative_weights.append(relative_weight)

    # A token's pass costs what it costs at the mean length of its context, n / 2, and a backward
    # pass twice a forward pass.
    flops = sum(3 * n * policy.architecture.flops_per_token(n / 2) for n in num_tokens)
    return Training(
        losses=[update.gradient.loss for update in updates],
        scores=scores,
        weights=weights,
        max_abs_weight_tau=max(relative_weights),
        grad_norms=[update.grad_norm for update in updates],
        # Of the last update, skipped or not: the schedule stands still where one is skipped.
        lr=updates[-1].lr,
        skipped=[i for i, update in enumerate(updates, 1) if update.skipped],
        token_means=policy.token_stats(batches).means(),
        kl=[update.gradient.kl for update in updates],
        clipped_low_share=[update.gradient.clipped_low_share for update in updates],
        clipped_high_share=[update.gradient.clipped_high_share for update in updates],
        low_ratio_tokens=[update.gradient.low_ratio_tokens for update in updates],
        equal_groups=sum(batch.facts.num_equal_groups for batch in batches),
        lag=lag,
        tokens=sum(num_tokens),
        flops=flops,
        token_figures=_token_figures(policy, batches),
    )


def _token_figures(
    policy: Policy, batches: Sequence[Batch]
) -> dict[str, list[NDArray[numpy.float32] | None]]:
    """Returns ratio and weight of every token of the step's rollouts, where they are kept.

    Collective over all ranks.
    """
    if not policy.settings.keep_token_weights:
        return {}
    figures: dict[str, list[NDArray[numpy.float32] | None]] = {}
    for column, name in (("log_ratios", "log_ratio_T"), ("token_weights", "token_weight_T")):
        figures[column] = []
        for batch in batches:
            rollouts = batch.minibatch.rollouts
            if not batch.has_token_weights:
                figures[column] += [None] * len(rollouts)
                continue

            values = []
            # Only the last pipeline stage has log-probs. The others join in the collective with
            # nothing.
            if policy.groups.is_last_stage:
                values = [getattr(results, name) for results in batch.results]
            value_N = gathered_tokens(policy.groups, batch, values).float().numpy()
            # The values of all rollouts lie one after the other; the last end is that of the array.
            ends = numpy.cumsum([rollout.completion.num_tokens for rollout in rollouts])
            figures[column] += numpy.split(value_N, ends[:-1])
    return figures
