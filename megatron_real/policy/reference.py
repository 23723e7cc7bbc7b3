"""The frozen policy that a KL penalty is measured against.

It is a second set of this rank's weights, in host memory. Its log-probs are computed once a step,
by swapping the weights in for one forward pass, and are kept with the rollouts: a replay of saved
rollouts does not compute them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate

import numpy

from megatron_real.policy.policy import Policy
from megatron_real.policy.snapshot import Snapshot
from megatron_real.policy.train_step import gathered_tokens
from megatron_real.records import Rollout
from megatron_real.weights.mapping import Weights


class Reference:
    """The reference of one run.

    Example:
        reference = Reference(policy)    # before anything is resumed: the weights of the start
        rollouts = reference.annotated(rollouts)
        batches = policy.prepare(rollouts)
    """

    def __init__(self, policy: Policy, weights: Weights | None = None) -> None:
        """Takes the reference's weights. The policy's own are the same afterwards, to the bit.

        Args:
            policy: the model that computes the reference's log-probs too.
            weights: of the same architecture; None for the policy's present ones.
        """
        self._policy = policy
        self._snapshot = Snapshot(policy)
        self._snapshot.take()
        if weights is not None:
            with self._snapshot.swapped_in():
                policy.load_parameters(weights)

    def annotated(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Returns the rollouts with their reference log-probs, the same on every rank.

        Rollouts that all have theirs already, as those of a saved run do, are returned as they are.
        Collective over the world.
        """
        answered = [r for r in rollouts if r.completion.num_trained]
        if all(r.reference_logprobs is not None for r in answered):
            return list(rollouts)

        # Reference log-probs of some of them only would be refused when they are packed.
        bare = [dataclasses.replace(r, reference_logprobs=None) for r in rollouts]
        batch = self._policy.whole(bare)
        with self._snapshot.swapped_in():
            values = self._policy.passes.logprobs(batch.micro_batches)
        logprob_N = gathered_tokens(self._policy.groups, batch, values).numpy()
        if self._policy.settings.model.dtype != "fp64":
            # They were fp32 before they were summed over ranks, so that nothing is lost.
            logprob_N = logprob_N.astype(numpy.float32)

        ends = list(accumulate(len(r.completion.token_ids) for r in bare))
        starts = [0, *ends[:-1]]
        return [
            dataclasses.replace(rollout, reference_logprobs=logprob_N[start:end])
            for rollout, start, end in zip(bare, starts, ends, strict=True)
        ]
