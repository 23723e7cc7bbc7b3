"""Which rank computes which sequence, in which micro-batch.

The loss couples the rollouts of a group, so where a group lies decides how its scores meet (policy/train_step.py):

    intact   in one micro-batch                    one pass: the scores are already together
    dp       in one micro-batch index, any rank    one pass: a gather over DP ranks within the loss
    split    anywhere                              two passes: all scores first, then forward and backward

All three give the same gradient. `auto` takes the one that is estimated to end first: `split` packs best but computes
one more forward pass where scores are needed.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Placement = Literal["intact", "dp", "split"]
MicroBatches = tuple[tuple[tuple[int, ...], ...], ...]
"""[DP rank][micro-batch index] -> positions of the sequences in it; empty ones only keep the schedule in step."""

# A backward pass is two forward passes of work; scoring is one forward pass more (DESIGN.md, section 1).
_STEP_WORK, _SCORING_WORK = 3.0, 1.0
# `dp` meets at every micro-batch index, where the ranks' jitter adds up: what it cost in tools/bench_placement.py.
_MEETING = 1.05


@dataclass(frozen=True)
class Layout:
    """What the packing must respect."""

    dp: int
    """Data-parallel ranks."""
    max_tokens: int
    """Token budget of a micro-batch."""
    padded: bool = False
    """Each sequence counts as long as its micro-batch's longest."""
    pp: int = 1
    """Pipeline stages: every micro-batch passes through all of them."""
    count_multiple: int = 1
    """The number of micro-batches on each rank must be a multiple of this (the interleaved schedule's PP size)."""


@dataclass(frozen=True)
class Plan:
    """The micro-batches of one minibatch."""

    placement: Placement
    """Where groups lie."""
    micro_batches: MicroBatches
    """Equally many on every DP rank."""
    seconds: float
    """Estimated time in the unit of the cost function; only ratios of it mean something."""


def plan(
    lengths: Sequence[int],
    groups: Sequence[int],
    *,
    layout: Layout,
    placement: Literal["auto", "intact", "dp", "split"],
    needs_scores: bool,
    cost: Callable[[int], float] = float,
) -> Plan:
    """Packs sequences into micro-batches of balanced cost.

    Args:
        lengths: tokens of each sequence, alignment included.
        groups: group of each sequence.
        layout: ranks and budget.
        placement: where groups may lie; `auto` compares all three.
        needs_scores: the weights depend on scores (every minibatch but the first after a rollout).
        cost: time of a forward pass over one sequence of the given length, in any unit.

    Raises:
        ValueError: a sequence exceeds the budget, or no packing keeps the groups as `placement` wants them.
    """
    for length in lengths:
        if length > layout.max_tokens:
            raise ValueError(f"a sequence of {length} tokens exceeds batch.max_tokens = {layout.max_tokens}; raise it")
    packing = _Packing(lengths, groups, layout, cost)
    choices: tuple[Placement, ...] = ("intact", "dp", "split") if placement == "auto" else (placement,)
    plans = []
    for choice in choices:
        micro_batches = packing.place(choice)
        if micro_batches is not None:
            scoring = _SCORING_WORK if needs_scores and choice == "split" else 0.0
            seconds = packing.seconds(micro_batches, in_step=needs_scores and choice == "dp") * (_STEP_WORK + scoring)
            plans.append(Plan(choice, micro_batches, seconds))
    if not plans:
        raise ValueError(
            f"batch.placement={placement}: the largest group does not fit into batch.max_tokens = {layout.max_tokens}"
            f"{' x ' + str(layout.dp) + ' ranks' if placement == 'dp' else ''}; raise it or use placement=auto"
        )
    return min(plans, key=lambda p: p.seconds)


class _Packing:
    """Greedy packing, longest first into the least loaded bin, with the fewest micro-batches that hold everything."""

    def __init__(
        self, lengths: Sequence[int], groups: Sequence[int], layout: Layout, cost: Callable[[int], float]
    ) -> None:
        self.lengths, self.layout = lengths, layout
        self.cost = [cost(length) for length in lengths]
        members: dict[int, list[int]] = defaultdict(list)
        for i, group in enumerate(groups):
            members[group].append(i)
        self.groups = list(members.values())

    def place(self, placement: Placement) -> MicroBatches | None:
        """The micro-batches under `placement`, or None where a group does not fit."""
        step = self.layout.count_multiple
        total = sum(self.lengths)
        count = -(-max(1, -(-total // (self.layout.max_tokens * self.layout.dp))) // step) * step
        most = -(-max(1, len(self.lengths)) // step) * step  # every sequence or group alone
        while count <= most:
            placed = self._try(placement, count)
            if placed is not None:
                return placed
            count += step
        return None

    def _try(self, placement: Placement, count: int) -> MicroBatches | None:
        if placement == "dp":
            return self._across_ranks(count)
        units = [[i] for i in range(len(self.lengths))] if placement == "split" else self.groups
        bins = self._fill(units, count * self.layout.dp, self.layout.max_tokens)
        return None if bins is None else self._deal(bins, count)

    def _across_ranks(self, count: int) -> MicroBatches | None:
        """Whole groups per micro-batch index, their sequences spread over the DP ranks."""
        columns = self._fill(self.groups, count, self.layout.max_tokens * self.layout.dp)
        if columns is None:
            return None
        rows = [self._fill([[i] for i in column], self.layout.dp, self.layout.max_tokens) for column in columns]
        if any(row is None for row in rows):
            return None
        return tuple(tuple(tuple(row[rank]) for row in rows if row is not None) for rank in range(self.layout.dp))

    def _fill(self, units: Sequence[list[int]], num_bins: int, budget: int) -> list[list[int]] | None:
        bins: list[list[int]] = [[] for _ in range(num_bins)]
        heap = [(0.0, b) for b in range(num_bins)]
        for unit in sorted(units, key=lambda u: -sum(self.cost[i] for i in u)):
            full = []
            while heap:
                load, b = heapq.heappop(heap)
                if self._tokens(bins[b] + unit) <= budget:
                    bins[b] += unit
                    heapq.heappush(heap, (load + sum(self.cost[i] for i in unit), b))
                    break
                full.append((load, b))
            else:
                return None
            for entry in full:
                heapq.heappush(heap, entry)
        return bins

    def _tokens(self, members: Sequence[int]) -> int:
        lengths = [self.lengths[i] for i in members]
        return max(lengths) * len(lengths) if self.layout.padded else sum(lengths)

    def _deal(self, bins: list[list[int]], count: int) -> MicroBatches:
        """`count` bins to every rank, the costliest first to the rank with the least."""
        ranks: list[list[tuple[int, ...]]] = [[] for _ in range(self.layout.dp)]
        load = [0.0] * self.layout.dp
        for members in sorted(bins, key=self._bin_cost, reverse=True):
            rank = min((r for r in range(self.layout.dp) if len(ranks[r]) < count), key=lambda r: load[r])
            ranks[rank].append(tuple(members))
            load[rank] += self._bin_cost(members)
        return tuple(tuple(rank) for rank in ranks)

    def _bin_cost(self, members: Sequence[int]) -> float:
        return sum(self.cost[i] for i in members)

    def seconds(self, micro_batches: MicroBatches, *, in_step: bool) -> float:
        """Time of one forward pass over all micro-batches: ranks meet at the end, or at every index when `in_step`."""
        costs = [[self._bin_cost(members) for members in rank] for rank in micro_batches]
        longest = [max(column) for column in zip(*costs, strict=True)]
        body = sum(longest) * _MEETING if in_step else max(sum(rank) for rank in costs)
        return body + (self.layout.pp - 1) * max(longest)  # the pipeline's fill and drain
