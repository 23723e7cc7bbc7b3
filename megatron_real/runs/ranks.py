"""All ranks together, over a gloo group of their own: small words between them that no GPU has to carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class FirstRankError(RuntimeError):
    """What the first rank was to do for all has failed there."""


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
        return cls(dist.get_rank(), world, dist.new_group(backend="gloo", timeout=timeout) if world > 1 else None)

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

    def on_first(self, action: Callable[[], object], error: type[Exception] = FirstRankError) -> None:
        """Runs `action` on the first rank while the others wait; where it fails, every rank raises `error`."""
        failure = ""
        if self.first:
            try:
                action()
            except Exception as problem:  # the others must hear of it, of whatever kind it is
                failure = str(problem) if isinstance(problem, ValueError) else f"{type(problem).__name__}: {problem}"
        failure = self.shared(failure)
        if failure:
            raise error(failure)

    def together(self, action: Callable[[], T]) -> T:
        """What `action` returns, on every rank; where some rank refuses its input, every rank does.

        Raises:
            EveryRankError: the first ValueError of a rank, with its sentence.
        """
        result: list[T] = []
        failure = ""
        try:
            result.append(action())
        except ValueError as refused:
            failure = str(refused)
        if sentence := next(filter(None, self.gathered(failure)), ""):
            raise EveryRankError(sentence)
        return result[0]
