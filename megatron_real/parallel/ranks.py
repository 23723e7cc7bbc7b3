"""All ranks together: small values that go between them over a gloo group, and not over a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_real.parallel import collective

T = TypeVar("T")


class EveryRankError(ValueError):
    """The input is refused, and every rank knows it: the first one tells the user."""


@dataclass(frozen=True)
class Ranks:
    """This rank among all."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    """None for a single process."""
    per_node: int = 0
    """Successive ranks that share a node; 0: all of them share one."""

    @classmethod
    def of_all(cls, timeout: timedelta) -> Ranks:
        """Makes a new process group of all ranks. Collective.

        Args:
            timeout: a collective of this group that waits longer fails.
        """
        world = dist.get_world_size()
        group = None
        if world > 1:
            group = dist.new_group(backend="gloo", timeout=timeout)

        # torchrun says how many ranks share a node. Where it says nothing, or nodes differ, all
        # ranks count as one node. The largest of -x is the smallest of x: one collective finds
        # both.
        ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        extremes = torch.tensor([ranks_per_node, -ranks_per_node])
        if group is not None:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)

        largest = int(extremes[0])
        smallest = -int(extremes[1])
        if largest != smallest or world % largest:
            largest = world
        return cls(dist.get_rank(), world, group, largest)

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def wait(self) -> None:
        """Waits until all ranks are here. Collective."""
        if self.group is not None:
            dist.barrier(self.group)

    def gathered(self, value: T) -> list[T]:
        """Returns [rank] every rank's value, on every rank. Collective."""
        return collective.gathered(value, group=self.group)

    def gathered_if_any(self, value: T) -> list[T]:
        """Returns `gathered` where some rank's value counts as true, else []. Collective."""
        return collective.gathered_if_any(value, group=self.group)

    def gathered_by_first(self, value: T) -> list[T]:
        """Returns [rank] every rank's value on the first rank, [] on the others. Collective."""
        return collective.gathered_by_first(value, group=self.group)

    def largest(self, value: int) -> int:
        """Returns the largest of all ranks' values, on every rank. Collective."""
        maximum = torch.tensor([value])
        if self.group is not None:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self.group)
        return int(maximum)

    def shared(self, value: T) -> T:
        """Returns the first rank's value, on every rank. Collective."""
        return collective.shared(value, group=self.group)

    def every(self, action: Callable[[], T]) -> list[T]:
        """Returns [rank] what `action` returned on every rank, on every rank.

        Collective, whatever happens in `action`.

        Raises:
            EveryRankError: some rank refuses its input by a ValueError; the sentence is the first
                such rank's.
            RankFailed: it failed otherwise on some rank.
        """
        return collective.on_every_rank(action, group=self.group, raises=EveryRankError)

    def together(self, action: Callable[[], T]) -> T:
        """Returns what `action` returned on this rank, once it has gone well on all.

        Raises as `every`. What it returns stays on this rank, so it may hold what cannot be sent to
        others.
        """
        return collective.all_well(action, group=self.group, raises=EveryRankError)

    def on_first(self, action: Callable[[], T]) -> T:
        """Returns on every rank what `action` returned on the first one, which may be large.

        The others wait meanwhile. Raises as `every`.
        """
        return collective.on_first(action, group=self.group, raises=EveryRankError)
