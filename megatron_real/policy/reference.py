"""The frozen policy that a KL penalty is measured against.

It is a second set of this rank's weights, in host memory. Its log-probs are computed once a step,
by swapping the weights in for one forward pass, and are kept with the rollouts: a replay of saved
rollouts does not compute them again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy
from numpy.typing import NDArray
from torch import Tensor

from megatron_real.policy.policy import Policy
from megatron_real.policy.snapshot import Snapshot
from megatron_real.policy.train_step import Batch, gathered_tokens, values_of_replica
from megatron_real.records import Absent, Rollout
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
                # The exchange at the end of the context leaves them in the copies, and gives the
                # policy its own back.
                policy.load_parameters(weights)

    def annotated(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """Returns the rollouts with their reference log-probs, where their completions are.

        Rollouts that all have theirs already, as those of a saved run do, are returned as they are.
        Collective over the world.
        """
        # Rollouts without a trained token need no reference, and absent ones are looked at where
        # they are. All ranks come to one answer: what follows is collective.
        here = [r for r in rollouts if not isinstance(r.completion, Absent)]
        known = all(r.reference_logprobs is not None for r in here if r.completion.num_trained)
        exchange = self._policy.exchange
        if exchange is not None:
            known = exchange.all_agree(known)
        if known:
            return list(rollouts)

        # Reference log-probs of some of them only would be refused when they are packed.
        bare = [dataclasses.replace(r, reference_logprobs=None) for r in rollouts]
        batch = self._policy.whole(bare)
        with self._snapshot.swapped_in():
            values = self._policy.passes.logprobs(batch.micro_batches)
        computed = self._of_rollouts(batch, values)

        annotated = []
        # They have the policy's precision: what was summed in float64 was fp32 before.
        dtype = numpy.float64 if self._policy.settings.model.dtype == "fp64" else numpy.float32
        for position, rollout in enumerate(bare):
            if not isinstance(rollout.completion, Absent):
                reference = computed.get(position)
                if reference is None:
                    # Without a trained token it is in no pass.
                    reference = numpy.zeros(rollout.completion.num_tokens)
                rollout = dataclasses.replace(
                    rollout, reference_logprobs=reference.astype(dtype, copy=False)
                )

            annotated.append(rollout)
        return annotated

    def _of_rollouts(self, batch: Batch, values: Sequence[Tensor]) -> dict[int, NDArray[Any]]:
        """Brings the values of tokens to where their rollouts' completions are.

        Args:
            batch: of all rollouts.
            values: [micro-batches] of [T] each; empty on all stages but the last.

        Returns:
            By position in the batch's minibatch, of the rollouts whose completion is here: float64
            values of all tokens.
        """
        exchange = self._policy.exchange
        groups = self._policy.groups
        rollouts = batch.minibatch.rollouts
        if exchange is None:
            value_N = gathered_tokens(groups, batch, values).numpy()
            ends = list(accumulate(r.completion.num_tokens for r in rollouts))
            starts = [0, *ends[:-1]]
            return {
                position: value_N[start:end]
                for position, (start, end) in enumerate(zip(starts, ends, strict=True))
            }

        own: dict[int, NDArray[Any]] = {}
        if groups.is_last_stage:
            own = values_of_replica(groups, batch, values)

        # One rank speaks for each data-parallel replica; the others have the same values, or none.
        speakers = exchange.of_ranks(groups.dp.rank() if groups.writes_logprobs else -1)
        speaker_of_replica = {replica: rank for rank, replica in enumerate(speakers)}
        computed_by = {
            batch.minibatch.kept[k]: speaker_of_replica[replica]
            for replica, micro_batches in enumerate(batch.plan.micro_batches)
            for members in micro_batches
            for k in members
        }

        return exchange.returned(rollouts, own, computed_by, numpy.float64)
