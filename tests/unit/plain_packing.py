"""The packing of batching/placement.py in its plainest form: every full bin is looked at again for
every unit.

Its time grows with units times bins, and it tries every count of micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_real.batching import Layout


def plain_micro_batches(
    lengths: Sequence[int], groups: Sequence[int], layout: Layout, placement: str
) -> tuple[tuple[tuple[int, ...], ...], ...] | None:
    """Returns [DP rank][micro-batch] -> positions, where a sequence costs its length.

    Returns None where a group does not fit.
    """
    members: dict[int, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    singles = [[i] for i in range(len(lengths))]
    units = singles if placement == "split" else list(members.values())

    step = layout.count_multiple
    for count in range(step, len(lengths) + step + 1, step):
        if placement == "dp":
            placed = _across(lengths, units, layout, count)
        else:
            placed = _apart(lengths, units, layout, count)
        if placed is not None:
            return placed
    return None


def _size(lengths: Sequence[int], members: Sequence[int], layout: Layout) -> int:
    sizes = [lengths[i] for i in members]
    return max(sizes) * len(sizes) if layout.padded else sum(sizes)


def _fill(
    lengths: Sequence[int],
    units: Sequence[Sequence[int]],
    layout: Layout,
    num_bins: int,
    budget: int,
) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    for unit in sorted(units, key=lambda u: -sum(lengths[i] for i in u)):
        fitting = [b for b in bins if _size(lengths, [*b, *unit], layout) <= budget]
        if not fitting:
            return None
        min(fitting, key=lambda b: sum(lengths[i] for i in b)).extend(unit)
    return bins


def _apart(
    lengths: Sequence[int], units: Sequence[Sequence[int]], layout: Layout, count: int
) -> tuple[tuple[tuple[int, ...], ...], ...] | None:
    bins = _fill(lengths, units, layout, count * layout.dp, layout.max_tokens)
    if bins is None:
        return None
    ranks: list[list[tuple[int, ...]]] = [[] for _ in range(layout.dp)]
    for members in sorted(bins, key=lambda b: -sum(lengths[i] for i in b)):
        free = [rank for rank in ranks if len(rank) < count]
        least = min(free, key=lambda rank: sum(lengths[i] for b in rank for i in b))
        least.append(tuple(members))
    return tuple(map(tuple, ranks))


def _across(
    lengths: Sequence[int], units: Sequence[Sequence[int]], layout: Layout, count: int
) -> tuple[tuple[tuple[int, ...], ...], ...] | None:
    columns = _fill(lengths, units, layout, count, layout.max_tokens * layout.dp)
    if columns is None:
        return None
    rows = []
    for column in columns:
        row = _fill(lengths, [[i] for i in column], layout, layout.dp, layout.max_tokens)
        if row is None:
            return None
        rows.append(row)
    return tuple(tuple(tuple(row[rank]) for row in rows) for rank in range(layout.dp))
