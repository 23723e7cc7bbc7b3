"""The rows of the invariance matrix: a pairwise cover of all that may change
where and when a token is computed.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_type_hints

Dtype = Literal["fp64", "fp32", "bf16"]


@dataclass(frozen=True)
class Layout:
    """One row. The values of each field are the levels of that factor."""

    tp: Literal[1, 2, 4]
    sp: Literal[False, True]
    pp: Literal[1, 2, 4]
    vpp: Literal[1, 2]
    cp: Literal[1, 2]
    dp: Literal[1, 2]
    max_tokens: Literal[64, 256]
    packing: Literal["packed", "padded"]
    order: Literal[1, 2]
    placement: Literal["intact", "dp", "split", "auto"]
    model: Literal["qwen2", "qwen2-tied", "llama"]
    logprobs: Literal["linear", "logits"]
    recompute: Literal["none", "selective", "full"]
    first: Literal[False, True]

    @property
    def size(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    @property
    def possible(self) -> bool:
        """At most 8 ranks; SP needs TP and VPP needs PP; whole groups need the large budget."""
        return (
            self.size <= 8
            and (self.tp > 1 or not self.sp)
            and (self.pp > 1 or self.vpp == 1)
            and (self.max_tokens == 256 or self.placement in ("split", "auto"))
        )

    @property
    def levels(self) -> frozenset[tuple[str, Any]]:
        return frozenset((f.name, getattr(self, f.name)) for f in fields(self))

    @property
    def pairs(self) -> frozenset[tuple[Any, ...]]:
        values = [(f.name, getattr(self, f.name)) for f in fields(self)]
        return frozenset(itertools.combinations(values, 2))

    def __str__(self) -> str:
        names = [f"{k}{getattr(self, k)}" for k in ("tp", "pp", "vpp", "cp", "dp")]
        flags = [k for k in ("sp", "first") if getattr(self, k)]
        words = [self.placement, self.packing, str(self.max_tokens), self.model, self.logprobs]
        return "-".join([*names, *flags, *words])


LEVELS = {name: get_args(hint) for name, hint in get_type_hints(Layout).items()}


def random_layout(draw: random.Random) -> Layout:
    while True:
        layout = Layout(**{name: draw.choice(levels) for name, levels in LEVELS.items()})
        if layout.possible:
            return layout


def possible_pairs() -> frozenset[tuple[Any, ...]]:
    """Every pair of levels that some possible layout has.

    6,000 random layouts have them all: more draws find no further pair.
    """
    draw = random.Random(0)
    return frozenset().union(*(random_layout(draw).pairs for _ in range(6_000)))


# Four ranks each, and TP with few micro-batches: what costs most here are collectives.
# What is repeated for each objective or dtype runs on these rows.
CORE = [
    Layout(
        tp=4, sp=True, pp=1, vpp=1, cp=1, dp=1, max_tokens=256, packing="packed", order=2,
        placement="intact", model="llama", logprobs="logits", recompute="none", first=False,
    ),
    Layout(
        tp=2, sp=False, pp=1, vpp=1, cp=1, dp=2, max_tokens=256, packing="padded", order=1,
        placement="dp", model="qwen2", logprobs="linear", recompute="selective", first=False,
    ),
    Layout(
        tp=1, sp=False, pp=4, vpp=1, cp=1, dp=1, max_tokens=256, packing="packed", order=1,
        placement="auto", model="qwen2-tied", logprobs="logits", recompute="full", first=True,
    ),
    Layout(
        tp=1, sp=False, pp=2, vpp=2, cp=2, dp=1, max_tokens=64, packing="packed", order=2,
        placement="split", model="llama", logprobs="linear", recompute="none", first=False,
    ),
]  # fmt: skip
"""Rows in which every level of every factor occurs; four is the least, for the four placements."""


def pairwise_cover() -> list[Layout]:
    """Greedy: after CORE, of 300 random layouts always the one with the most new pairs, and of
    equals the smallest, until none is missing.
    """
    # Of sixty seeds this one's rows have the fewest collectives.
    draw = random.Random(49)
    rows = list(CORE)
    missing = set(possible_pairs()).difference(*(row.pairs for row in rows))
    while missing:
        best = max(
            (random_layout(draw) for _ in range(300)),
            key=lambda row: (len(row.pairs & missing), -row.size),
        )
        # None of the 300 may have a new pair when few are left: then draw again.
        if best.pairs & missing:
            rows.append(best)
            missing -= best.pairs
    return rows
