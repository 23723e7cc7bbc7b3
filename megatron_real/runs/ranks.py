"""All ranks together, over a gloo group of their own: small words between them that no GPU has to carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_real.collective import on_every_rank

T = TypeVar("T")


class EveryRankError(ValueError):
    """The input is refused, and every rank knows: the first one says it."""


@dataclass(frozen=True)
class Ranks:
    """This rank among all."""

    rank: int = 0
    world: int = 1
    group: dist.ProcessGroup | None = None
    """None for a single process."""

    @classmethod
    def of_all(cls, timeout: timedelta) -> Ranks:
        """A new group of all ranks. Collective."""
        world = dist.get_world_size()
        return cls(
            dist.get_rank(),
            world,
            dist.new_group(backend="gloo", timeout=timeout) if world > 1 else None,
        )

    @property
    def first(self) -> bool:
        """This is rank 0."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.group is not None:
            dist.barrier(self.group)

    def gathered(self, value: T) -> list[T]:
        """[rank] every rank's value, on every rank."""
        values: list[T] = [value] * self.world
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values

    def gathered_by_first(self, value: T) -> list[T]:
        """[rank] every rank's value on the first rank, [] on the others.

        What one rank writes or shows goes there alone: `gathered` would send it to all, by the square of the ranks.
        """
        if self.group is None:
            return [value]
        values: list[T] | None = [value] * self.world if self.first else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values or []

    def largest(self, value: int) -> int:
        """The largest of all ranks' values, on every rank."""
        found = torch.tensor([value])
        if self.group is not None:
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return int(found)

    def shared(self, value: T) -> T:
        """The first rank's value, on every rank."""
        values = [value]
        if self.group is not None:
            dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def every(self, action: Callable[[], T]) -> list[T]:
        """[rank] what `action` returned on every rank, on every rank. Collective, whatever happens in `action`.

        Raises:
            EveryRankError: some rank refuses its input by a ValueError; the sentence is the first such rank's.
            RankFailed: it failed otherwise on some rank.
        """
        return on_every_rank(action, group=self.group, raises=EveryRankError)

    def together(self, action: Callable[[], T]) -> T:
        """Returns what `action` returned on this rank, once it has gone well on all; raises as `every`.

        What it returns stays on this rank, so it may hold what cannot be sent to others, such as a process group.
        """
        values: list[T] = []
        self.every(lambda: values.append(action()))
        return values[0]

    def on_first(self, action: Callable[[], T]) -> T:
        """What `action` returns on the first rank, on every rank, while the others wait; raises as `every`."""
        return self.every(lambda: action() if self.first else None)[0]  # type: ignore[return-value]
