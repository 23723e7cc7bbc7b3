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

# A backward pass is two forward passes of work; scoring is one forward pass more.
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
            raise ValueError(
                f"a sequence of {length} tokens exceeds batch.max_tokens = {layout.max_tokens}; raise it"
            )
    packing = _Packing(lengths, groups, layout, cost)
    choices: tuple[Placement, ...] = (
        ("intact", "dp", "split") if placement == "auto" else (placement,)
    )
    plans = []
    for choice in choices:
        micro_batches = packing.place(choice)
        if micro_batches is not None:
            scoring = _SCORING_WORK if needs_scores and choice == "split" else 0.0
            seconds = packing.seconds(micro_batches, in_step=needs_scores and choice == "dp") * (
                _STEP_WORK + scoring
            )
            plans.append(Plan(choice, micro_batches, seconds))
    if not plans:
        raise ValueError(
            f"batch.placement={placement}: the largest group does not fit into batch.max_tokens = {layout.max_tokens}"
            f"{' x ' + str(layout.dp) + ' ranks' if placement == 'dp' else ''}; raise it or use placement=auto"
        )
    return min(plans, key=lambda p: p.seconds)


@dataclass(frozen=True)
class _Unit:
    """Sequences that stay together: one, or a whole group."""

    members: tuple[int, ...]
    """Positions of the sequences."""
    cost: float
    """Sum of their costs."""
    tokens: int
    """Sum of their lengths."""
    longest: int
    """Length of the longest."""

    def size(self, *, padded: bool) -> int:
        """Tokens that a micro-batch of nothing else counts."""
        return self.longest * len(self.members) if padded else self.tokens


class _Bin:
    """What lies in a micro-batch, or in one micro-batch index of all ranks, while it is filled."""

    def __init__(self) -> None:
        self.members: list[int] = []
        self.tokens = 0
        self.longest = 0

    def size_with(self, unit: _Unit, *, padded: bool) -> int:
        """Tokens that it counts with `unit` added."""
        if padded:
            return max(self.longest, unit.longest) * (len(self.members) + len(unit.members))
        return self.tokens + unit.tokens

    def room(self, budget: int, *, padded: bool) -> int:
        """A bound that the `tokens`, or if padded the `longest`, of a unit that still fits cannot exceed."""
        if not padded:
            return budget - self.tokens
        most = budget // (len(self.members) + 1)
        return most if most >= self.longest else 0

    def add(self, unit: _Unit) -> None:
        """Puts `unit` into it."""
        self.members.extend(unit.members)
        self.tokens += unit.tokens
        self.longest = max(self.longest, unit.longest)


class _Packing:
    """Greedy packing, longest first into the least loaded bin, with the fewest micro-batches that hold everything.

    Every rank plans for all ranks, so the time must not grow faster than sequences and bins: one attempt with n units
    and b bins takes O((n + b) log b), and counts of micro-batches that cannot hold the units are never tried.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        groups: Sequence[int],
        layout: Layout,
        cost: Callable[[int], float],
    ) -> None:
        self.lengths, self.layout = lengths, layout
        cost_by_length = {length: cost(length) for length in set(lengths)}
        self.cost = [cost_by_length[length] for length in lengths]
        members: dict[int, list[int]] = defaultdict(list)
        for i, group in enumerate(groups):
            members[group].append(i)
        self.alone = [self._unit([i]) for i in range(len(lengths))]
        self.sequences = self._costliest_first(self.alone)
        self.groups = self._costliest_first([self._unit(group) for group in members.values()])

    def _unit(self, members: Sequence[int]) -> _Unit:
        lengths = [self.lengths[i] for i in members]
        return _Unit(tuple(members), self._bin_cost(members), sum(lengths), max(lengths))

    @staticmethod
    def _costliest_first(units: Sequence[_Unit]) -> list[_Unit]:
        return sorted(units, key=lambda unit: -unit.cost)

    def place(self, placement: Placement) -> MicroBatches | None:
        """The micro-batches under `placement`, or None where a group does not fit."""
        for count in self._counts(placement):
            placed = (
                self._across_ranks(count) if placement == "dp" else self._apart(placement, count)
            )
            if placed is not None:
                return placed
        return None

    def _counts(self, placement: Placement) -> range:
        """The numbers of micro-batches on a rank worth an attempt, the least first; none where a group is too large."""
        dp, budget, step = self.layout.dp, self.layout.max_tokens, self.layout.count_multiple
        if self._too_large(placement):
            return range(0)
        if placement == "dp":
            apart = [[self.alone[i] for i in group.members] for group in self.groups]
            if any(self._bins_needed(sequences, budget) > dp for sequences in apart):
                return range(0)
            least = max(
                self._bins_needed(self.groups, budget * dp),
                -(-self._bins_needed(self.sequences, budget) // dp),
            )
            most = len(self.groups)
        else:
            units = self.sequences if placement == "split" else self.groups
            least = -(-self._bins_needed(units, budget) // dp)
            # A bin for every unit is enough: the least loaded one is then empty.
            most = -(-len(units) // dp)
        least, most = (-(-max(1, count) // step) * step for count in (least, most))
        return range(least, most + 1, step)

    def _too_large(self, placement: Placement) -> bool:
        budget = self.layout.max_tokens * (self.layout.dp if placement == "dp" else 1)
        units = self.sequences if placement == "split" else self.groups
        return any(unit.size(padded=self.layout.padded) > budget for unit in units)

    def _bins_needed(self, units: Sequence[_Unit], budget: int) -> int:
        """A lower bound of the bins that hold the units, whatever the packing.

        All of their tokens must fit; and of units above a k-th of the budget a bin holds fewer than k.
        """
        sizes = [unit.size(padded=self.layout.padded) for unit in units]
        needed = -(-sum(sizes) // budget)
        for k in range(2, 9):
            large = sum(size * k > budget for size in sizes)
            needed = max(needed, -(-large // (k - 1)))
        return needed

    def _apart(self, placement: Placement, count: int) -> MicroBatches | None:
        units = self.sequences if placement == "split" else self.groups
        bins = self._fill(units, count * self.layout.dp, self.layout.max_tokens)
        return None if bins is None else self._deal(bins, count)

    def _across_ranks(self, count: int) -> MicroBatches | None:
        """Whole groups per micro-batch index, their sequences spread over the DP ranks."""
        dp, budget = self.layout.dp, self.layout.max_tokens
        columns = self._fill(self.groups, count, budget * dp)
        if columns is None:
            return None
        rows = []
        for column in columns:
            sequences = self._costliest_first([self.alone[i] for i in column])
            row = self._fill(sequences, dp, budget)
            if row is None:
                return None
            rows.append(row)
        return tuple(tuple(tuple(row[rank]) for row in rows) for rank in range(dp))

    def _fill(self, units: Sequence[_Unit], num_bins: int, budget: int) -> list[list[int]] | None:
        """Each unit, the costliest first, into the least loaded bin that has room; None where none has."""
        padded = self.layout.padded
        bins = [_Bin() for _ in range(num_bins)]
        open_bins = [(0.0, b) for b in range(num_bins)]
        # Bins that were too full for a unit wait here, by their room, until a unit comes that may fit: to pop all
        # full bins again for each unit would take time by the product of units and bins.
        full_bins: list[tuple[int, float, int]] = []
        for unit in units:
            needed = unit.longest if padded else unit.tokens
            while full_bins and -full_bins[0][0] >= needed:
                _, load, b = heapq.heappop(full_bins)
                heapq.heappush(open_bins, (load, b))
            while open_bins:
                load, b = heapq.heappop(open_bins)
                if bins[b].size_with(unit, padded=padded) <= budget:
                    break
                heapq.heappush(full_bins, (-bins[b].room(budget, padded=padded), load, b))
            else:
                return None
            bins[b].add(unit)
            heapq.heappush(open_bins, (load + unit.cost, b))
        return [filled.members for filled in bins]

    def _deal(self, bins: list[list[int]], count: int) -> MicroBatches:
        """`count` bins to every rank, the costliest first to the rank with the least."""
        ranks: list[list[tuple[int, ...]]] = [[] for _ in range(self.layout.dp)]
        waiting = [(0.0, rank) for rank in range(self.layout.dp)]
        for members in sorted(bins, key=self._bin_cost, reverse=True):
            load, rank = heapq.heappop(waiting)
            ranks[rank].append(tuple(members))
            if len(ranks[rank]) < count:
                heapq.heappush(waiting, (load + self._bin_cost(members), rank))
        return tuple(tuple(rank) for rank in ranks)

    def _bin_cost(self, members: Sequence[int]) -> float:
        return sum(self.cost[i] for i in members)

    def seconds(self, micro_batches: MicroBatches, *, in_step: bool) -> float:
        """Time of one forward pass over all micro-batches: ranks meet at the end, or at every index when `in_step`."""
        costs = [[self._bin_cost(members) for members in rank] for rank in micro_batches]
        longest = [max(column) for column in zip(*costs, strict=True)]
        body = sum(longest) * _MEETING if in_step else max(sum(rank) for rank in costs)
        return body + (self.layout.pp - 1) * max(longest)  # the pipeline's fill and drain
