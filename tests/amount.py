"""How much is tried by default, and how much with --all."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import pytest

ALL = "MEGATRON_REAL_TESTS_ALL"
"""Environment variable that tests/conftest.py sets for --all,
so that each lane of pytest-xdist has it too.
"""

FIRST_VERSION = "0.16.1"


def examples(number: int) -> int:
    """Returns `number` with --all, and an eighth of it by default."""
    if os.environ.get(ALL):
        return number
    return max(1, number // 8)


def on_first_version() -> bool:
    """Whether this is the megatron-core on which everything runs;
    what runs on the second one too is thinner there.
    """
    return version("megatron-core") == FIRST_VERSION


def core(rows: Sequence[Any], kept: Sequence[Any]) -> list[Any]:
    """Returns a parameter for each row, of which those outside of `kept` are of the grid."""
    grid = (pytest.mark.grid,)
    return [pytest.param(row, marks=() if row in kept else grid) for row in rows]


def cover(*axes: Sequence[Any]) -> list[Any]:
    """Returns parameters for all combinations; by default each value of each axis occurs,
    the rest is of the grid.

    The core is a diagonal: its row i has the value i of each axis, from the beginning again where
    an axis is short.
    """
    core = {tuple(i % len(axis) for axis in axes) for i in range(max(len(axis) for axis in axes))}
    rows = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        marks = []
        if places not in core:
            marks.append(pytest.mark.grid)
        rows.append(pytest.param(*values, id="-".join(map(str, values)), marks=marks))
    return rows


def thinned(rows: Sequence[Any], *, kept: int) -> list[Any]:
    """Returns the rows; on the second version of megatron-core all but the first `kept` of those
    that run by default are of the grid.

    For tests whose every row is held to the same numbers, and which run whole on the first version.
    """
    if on_first_version():
        return list(rows)

    result = []
    for row in rows:
        param = row if hasattr(row, "marks") else pytest.param(row)
        if not param.marks:
            kept -= 1
            if kept < 0:
                param = pytest.param(*param.values, id=param.id, marks=pytest.mark.grid)
        result.append(param)
    return result
