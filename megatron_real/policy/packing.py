"""Minibatch -> this rank's packed micro-batches: a plan over all ranks, laid out on the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_real.batching import Layout, Minibatch, Plan, plan
from megatron_real.config import BatchConfig, ParallelConfig
from megatron_real.objective import Objective
from megatron_real.parallel.groups import ProcessGroups
from megatron_real.policy.microbatch import Alignment, micro_batch
from megatron_real.policy.train_step import Batch
from megatron_real.records import Rollout
from megatron_real.weights.architecture import Architecture


@dataclass(frozen=True)
class Packer:
    """Packs minibatches for one layout. Every rank plans alike and builds its own part."""

    architecture: Architecture
    """Its FLOPs weigh sequences against each other."""
    objective: Objective
    """Its reach says where a group may lie."""
    batch: BatchConfig
    """Token budget, packed or padded, placement."""
    parallel: ParallelConfig
    """The layout."""
    groups: ProcessGroups
    """This rank's place in it."""
    bounds_on_host: bool = True
    """Whether the layers read the sequences' bounds on the host (MicroBatch.packed)."""

    def with_placement(self, placement: Literal["auto", "intact", "dp", "split"]) -> Packer:
        """Returns the same packer with another placement of groups."""
        batch = dataclasses.replace(self.batch, placement=placement)
        return dataclasses.replace(self, batch=batch)

    def pack(self, minibatch: Minibatch, *, off_policy: bool) -> Batch:
        """Plans the minibatch over all ranks and builds this rank's micro-batches.

        All its rollouts are whole here.

        Args:
            minibatch: what is trained on.
            off_policy: the weights will have moved since the rollouts were generated.

        Raises:
            ValueError: a sequence exceeds the token budget, or the groups do not fit the placement.
        """
        planned = self.plan(minibatch, off_policy=off_policy)
        return self.build(minibatch, planned, minibatch.rollouts)

    def plan(self, minibatch: Minibatch, *, off_policy: bool) -> Plan:
        """Returns which rank computes which rollouts, from their lengths and groups alone.

        Arguments and errors are those of `pack`.
        """
        rollouts = minibatch.rollouts
        parallel = self.parallel
        alignment = self._alignment

        # On-policy all scores are 0, and many objectives know their weights from that alone.
        free = self.objective.free_first_minibatch and not off_policy
        needs_scores = self.objective.gathers_scores and not free

        placement = self.batch.placement
        if needs_scores and self.objective.reach == "minibatch":
            # No micro-batch holds all scores: a pass of its own has to gather them.
            placement = "split"

        return plan(
            [alignment.length(rollouts[i]) for i in minibatch.kept],
            [rollouts[i].group for i in minibatch.kept],
            # The interleaved schedule takes micro-batches in rounds of one for each stage, so their
            # number must be a multiple of the stages.
            layout=Layout(
                dp=self.groups.dp.size(),
                max_tokens=alignment.up(self.batch.max_tokens),
                padded=alignment.padded,
                pp=parallel.pp,
                count_multiple=parallel.pp if parallel.vpp > 1 else 1,
            ),
            placement=placement,
            needs_scores=needs_scores,
            # Causal attention: a token sees half of its sequence on average.
            cost=lambda length: length * self.architecture.flops_per_token(length / 2),
        )

    def build(self, minibatch: Minibatch, planned: Plan, rollouts: Sequence[Rollout]) -> Batch:
        """Builds this rank's micro-batches.

        Args:
            minibatch: what is trained on; its completions may be absent.
            planned: of `plan`.
            rollouts: [R] those of the minibatch, whole where this rank computes them.
        """
        micro_batches = []
        for members in planned.micro_batches[self.groups.dp.rank()]:
            # The plan counts the kept sequences alone; micro-batches want places in all rollouts.
            positions = [minibatch.kept[k] for k in members]
            micro_batches.append(
                micro_batch(
                    rollouts, positions, self._alignment, bounds_on_host=self.bounds_on_host
                )
            )
        return Batch(minibatch=minibatch, plan=planned, micro_batches=tuple(micro_batches))

    @property
    def _alignment(self) -> Alignment:
        parallel = self.parallel
        return Alignment(
            cp=parallel.cp,
            cp_rank=self.groups.cp.rank(),
            tp=parallel.tp if parallel.sp else 1,
            padded=self.batch.layout == "padded",
        )
