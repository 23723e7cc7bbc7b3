"""Which rank computes which sequence, in which micro-batch.

The loss couples the rollouts of a group, so where a group lies decides how its scores meet
(policy/train_step.py):

    intact   in one micro-batch                    one pass: the scores are already together
    dp       in one micro-batch index, any rank    one pass: a gather over DP ranks within the loss
    split    anywhere                              two passes: all scores first, then the gradient

All three give the same gradient. `auto` takes the one that is estimated to end first: `split` packs
best but computes one more forward pass where scores are needed.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Placement = Literal["intact", "dp", "split"]
MicroBatches = tuple[tuple[tuple[int, ...], ...], ...]
"""[DP rank][micro-batch index] -> positions of the sequences in it. An empty one only keeps the
ranks' schedules in step."""

# Work in units of one forward pass: a backward pass is two of them, scoring is one more.
_STEP_WORK = 3.0
_SCORING_WORK = 1.0

# `dp` meets at every micro-batch index, where the ranks' jitter adds up: what that cost in
# tools/bench_placement.py.
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
    """The number of micro-batches on each rank must be a multiple of this (the interleaved
    schedule's PP size)."""


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
        ValueError: a sequence exceeds the budget, or no packing keeps the groups as `placement`
            wants them.
    """
    for length in lengths:
        if length > layout.max_tokens:
            raise ValueError(
                f"a sequence of {length} tokens exceeds batch.max_tokens = {layout.max_tokens}; "
                "raise it"
            )

    packing = _Packing(lengths, groups, layout, cost)
    candidates: tuple[Placement, ...] = get_args(Placement)
    if placement != "auto":
        candidates = (placement,)

    plans = []
    for candidate in candidates:
        micro_batches = packing.place(candidate)
        if micro_batches is None:
            continue

        # Scores cost `split` a pass of its own, and `dp` a meeting at every micro-batch index.
        work = _STEP_WORK
        if needs_scores and candidate == "split":
            work += _SCORING_WORK
        pass_seconds = packing.seconds(micro_batches, in_step=needs_scores and candidate == "dp")
        plans.append(Plan(candidate, micro_batches, pass_seconds * work))

    if not plans:
        ranks = f" x {layout.dp} ranks" if placement == "dp" else ""
        raise ValueError(
            f"batch.placement={placement}: the largest group does not fit into "
            f"batch.max_tokens = {layout.max_tokens}{ranks}; raise it or use placement=auto"
        )
    # At equal time the first: `intact` needs no meeting, and no second pass.
    return min(plans, key=lambda made: made.seconds)


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
        """Returns the tokens that a micro-batch of nothing else counts."""
        if padded:
            return self.longest * len(self.members)
        return self.tokens


class _Bin:
    """What lies in a micro-batch, or in one micro-batch index of all ranks, while it is filled."""

    def __init__(self) -> None:
        self.members: list[int] = []
        self.tokens = 0
        self.longest = 0

    def size_with(self, unit: _Unit, *, padded: bool) -> int:
        """Returns the tokens that the bin counts with `unit` added."""
        if padded:
            return max(self.longest, unit.longest) * (len(self.members) + len(unit.members))
        return self.tokens + unit.tokens

    def room(self, budget: int, *, padded: bool) -> int:
        """Returns what the `tokens` (if padded: the `longest`) of a unit that fits cannot exceed.

        It is a bound only: a padded unit of many sequences may fit less.
        """
        if not padded:
            return budget - self.tokens

        # One more sequence, and all of them padded to the longest.
        most = budget // (len(self.members) + 1)
        if most < self.longest:
            return 0
        return most

    def add(self, unit: _Unit) -> None:
        """Puts `unit` into the bin."""
        self.members.extend(unit.members)
        self.tokens += unit.tokens
        self.longest = max(self.longest, unit.longest)


class _Packing:
    """Greedy packing: the costliest unit first, each into the least loaded bin that has room.

    It takes the fewest micro-batches that hold everything. Every rank plans for all ranks, so the
    time must not grow faster than sequences and bins: one attempt with n units and b bins takes
    O((n + b) log b), and counts of micro-batches that cannot hold the units are never tried.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        groups: Sequence[int],
        layout: Layout,
        cost: Callable[[int], float],
    ) -> None:
        self.lengths = lengths
        self.layout = layout

        # Once for each length: the cost function counts the FLOPs of a whole model.
        cost_by_length = {length: cost(length) for length in set(lengths)}
        self.cost = [cost_by_length[length] for length in lengths]

        members: dict[int, list[int]] = defaultdict(list)
        for i, group in enumerate(groups):
            members[group].append(i)

        self.alone = [self._unit([i]) for i in range(len(lengths))]
        self.sequences = _costliest_first(self.alone)
        self.groups = _costliest_first([self._unit(group) for group in members.values()])

    def place(self, placement: Placement) -> MicroBatches | None:
        """Returns the micro-batches under `placement`, or None where a group does not fit."""
        for count in self._counts(placement):
            if placement == "dp":
                micro_batches = self._across_ranks(count)
            else:
                micro_batches = self._apart(placement, count)
            if micro_batches is not None:
                return micro_batches
        return None

    def seconds(self, micro_batches: MicroBatches, *, in_step: bool) -> float:
        """Returns the time of one forward pass over all micro-batches, in the unit of the cost.

        The ranks meet at the end of the pass, or at every micro-batch index if `in_step`.
        """
        costs = [[self._cost_of(members) for members in rank] for rank in micro_batches]
        longest = [max(column) for column in zip(*costs, strict=True)]
        if in_step:
            body = sum(longest) * _MEETING
        else:
            body = max(sum(rank) for rank in costs)

        # The pipeline's fill and drain: the last stage begins pp - 1 micro-batches late.
        return body + (self.layout.pp - 1) * max(longest)

    def _counts(self, placement: Placement) -> range:
        """Returns the numbers of micro-batches on a rank that are worth an attempt, least first.

        The range is empty where a group is too large for the placement.
        """
        dp = self.layout.dp
        units = self.sequences if placement == "split" else self.groups
        budget = self.layout.max_tokens
        if placement == "dp":
            budget *= dp  # a unit may spread over one micro-batch index of all ranks
        if any(unit.size(padded=self.layout.padded) > budget for unit in units):
            return range(0)

        if placement == "dp":
            # One group alone in an index has one bin on each rank for its sequences.
            for group in self.groups:
                sequences = [self.alone[i] for i in group.members]
                if self._bins_needed(sequences, self.layout.max_tokens) > dp:
                    return range(0)

            least = max(
                self._bins_needed(self.groups, budget),
                _ceil_div(self._bins_needed(self.sequences, self.layout.max_tokens), dp),
            )
            most = len(self.groups)
        else:
            least = _ceil_div(self._bins_needed(units, budget), dp)
            # A bin for every unit is enough: the least loaded one is then empty.
            most = _ceil_div(len(units), dp)

        step = self.layout.count_multiple
        least = _ceil_div(max(1, least), step) * step
        most = _ceil_div(max(1, most), step) * step
        return range(least, most + 1, step)

    def _bins_needed(self, units: Sequence[_Unit], budget: int) -> int:
        """Returns a lower bound of the bins that hold the units, whatever the packing.

        All of their tokens must fit; and of units above a k-th of the budget a bin holds fewer than
        k.
        """
        sizes = [unit.size(padded=self.layout.padded) for unit in units]
        needed = _ceil_div(sum(sizes), budget)
        # Few units are so small that more than 8 fill a bin and still do not pack well.
        for k in range(2, 9):
            large = sum(size * k > budget for size in sizes)
            needed = max(needed, _ceil_div(large, k - 1))
        return needed

    def _apart(self, placement: Placement, count: int) -> MicroBatches | None:
        """Returns `count` micro-batches for every rank, filled without regard to each other."""
        dp = self.layout.dp
        units = self.sequences if placement == "split" else self.groups
        bins = self._fill(units, count * dp, self.layout.max_tokens)
        if bins is None:
            return None

        # `count` bins to every rank, the costliest first to the rank with the least.
        ranks: list[list[tuple[int, ...]]] = [[] for _ in range(dp)]
        # A heap of (cost so far, rank): the least loaded rank comes first, and of equal
        # ones the lowest.
        waiting = [(0.0, rank) for rank in range(dp)]
        for members in sorted(bins, key=self._cost_of, reverse=True):
            load, rank = heapq.heappop(waiting)
            ranks[rank].append(tuple(members))
            # A rank with its share leaves the queue: Megatron wants equally many on every rank.
            if len(ranks[rank]) < count:
                heapq.heappush(waiting, (load + self._cost_of(members), rank))

        return tuple(tuple(rank) for rank in ranks)

    def _across_ranks(self, count: int) -> MicroBatches | None:
        """Returns `count` micro-batches for each rank, a group within one index of all ranks."""
        dp = self.layout.dp
        columns = self._fill(self.groups, count, self.layout.max_tokens * dp)
        if columns is None:
            return None

        rows = []
        for column in columns:
            # Within the index any rank may take any sequence: a group is free to spread.
            sequences = _costliest_first([self.alone[i] for i in column])
            row = self._fill(sequences, dp, self.layout.max_tokens)
            if row is None:
                return None
            rows.append(row)

        # From [index][rank] to [rank][index].
        return tuple(tuple(tuple(row[rank]) for row in rows) for rank in range(dp))

    def _fill(self, units: Sequence[_Unit], num_bins: int, budget: int) -> list[list[int]] | None:
        """Puts each unit, in the order given, into the least loaded bin that has room.

        Returns:
            [num_bins] positions of the sequences in each bin; None where a unit fits nowhere.
        """
        padded = self.layout.padded
        bins = [_Bin() for _ in range(num_bins)]
        open_bins = [(0.0, b) for b in range(num_bins)]
        # Bins that were too full for a unit wait here, by their room, until a unit comes that may
        # fit: to pop all full bins again for each unit would take time by the product of units and
        # bins.
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
                # Negated: heapq takes the least first, and the most room is wanted.
                heapq.heappush(full_bins, (-bins[b].room(budget, padded=padded), load, b))
            else:
                return None

            bins[b].add(unit)
            heapq.heappush(open_bins, (load + unit.cost, b))
        return [filled.members for filled in bins]

    def _unit(self, members: Sequence[int]) -> _Unit:
        lengths = [self.lengths[i] for i in members]
        return _Unit(
            members=tuple(members),
            cost=self._cost_of(members),
            tokens=sum(lengths),
            longest=max(lengths),
        )

    def _cost_of(self, members: Sequence[int]) -> float:
        return sum(self.cost[i] for i in members)


def _costliest_first(units: Sequence[_Unit]) -> list[_Unit]:
    # Stable: units of equal cost keep their order, so that every rank makes the same plan.
    return sorted(units, key=lambda unit: -unit.cost)


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
