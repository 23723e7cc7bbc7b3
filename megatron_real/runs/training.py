"""The updates of a step in plain numbers, for its row of metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_real.policy.policy import Policy, Update
from megatron_real.policy.train_step import Batch
from megatron_real.runs.metrics import Training


def summary(policy: Policy, batches: Sequence[Batch], updates: Sequence[Update], *, lag: float) -> Training:
    """What the updates of a step were, on rollouts of so many steps before. Collective over all ranks."""
    kept = [batch.minibatch.rollouts[i].num_tokens for batch in batches for i in batch.minibatch.kept]
    weights = [update.gradient.weight_R for update in updates]
    return Training(
        losses=[update.gradient.loss for update in updates],
        scores=[s for batch, update in zip(batches, updates, strict=True) for s in _scores(batch, update)],
        weights=[w for weight_R in weights for w in weight_R.tolist()],
        max_abs_weight_tau=max(
            float(weight_R.abs().max()) * batch.minibatch.num_groups * policy.config.objective.tau
            for weight_R, batch in zip(weights, batches, strict=True)
        ),
        grad_norms=[update.grad_norm for update in updates],
        lr=updates[-1].lr,
        skipped=[i for i, update in enumerate(updates, 1) if update.skipped],
        token_means=policy.token_stats(batches).means(),
        lag=lag,
        tokens=sum(kept),
        flops=sum(3 * n * policy.architecture.flops_per_token(n / 2) for n in kept),
    )


def _scores(batch: Batch, update: Update) -> list[float]:
    """[R] scores of the minibatch's rollouts in order, NaN for those that were not computed."""
    scores = [math.nan] * len(batch.minibatch.rollouts)
    for i in batch.minibatch.kept:
        scores[i] = float(update.gradient.score_R[i])
    return scores
