"""The updates of a step in plain numbers, for its row of metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from megatron_real.objective import Objective
from megatron_real.policy.policy import Policy, Update
from megatron_real.policy.train_step import Batch
from megatron_real.runs.metrics import Training


def summary(
    policy: Policy, batches: Sequence[Batch], updates: Sequence[Update], *, lag: float
) -> Training:
    """What the updates of a step were, on rollouts of so many steps before. Collective over all ranks."""
    kept = [
        batch.minibatch.rollouts[i].num_tokens for batch in batches for i in batch.minibatch.kept
    ]
    weights = [update.gradient.weight_R for update in updates]
    return Training(
        losses=[update.gradient.loss for update in updates],
        scores=[
            s
            for batch, update in zip(batches, updates, strict=True)
            for s in _scores(batch, update)
        ],
        weights=[w for weight_R in weights for w in weight_R.tolist()],
        max_abs_weight_tau=max(
            _relative_to_bound(policy.settings.objective, batch, weight_R)
            for weight_R, batch in zip(weights, batches, strict=True)
        ),
        grad_norms=[update.grad_norm for update in updates],
        lr=updates[-1].lr,
        skipped=[i for i, update in enumerate(updates, 1) if update.skipped],
        token_means=policy.token_stats(batches).means(),
        kl=[update.gradient.kl for update in updates],
        clipped_low_share=[update.gradient.clipped_low_share for update in updates],
        clipped_high_share=[update.gradient.clipped_high_share for update in updates],
        low_ratio_tokens=[update.gradient.low_ratio_tokens for update in updates],
        equal_groups=sum(batch.facts.num_equal_groups for batch in batches),
        lag=lag,
        tokens=sum(kept),
        flops=sum(3 * n * policy.architecture.flops_per_token(n / 2) for n in kept),
    )


def _relative_to_bound(objective: Objective, batch: Batch, weight_R: Tensor) -> float:
    """max |dL/dscore| over what the objective says it can be at most; NaN where it has no bound."""
    if objective.weight_bound is None:
        return math.nan
    return float(weight_R.abs().max()) * batch.facts.denominator / objective.weight_bound


def _scores(batch: Batch, update: Update) -> list[float]:
    """[R] scores of the minibatch's rollouts in order, NaN for those that were not computed."""
    scores = [math.nan] * len(batch.minibatch.rollouts)
    for i in batch.minibatch.kept:
        scores[i] = float(update.gradient.score_R[i])
    return scores
