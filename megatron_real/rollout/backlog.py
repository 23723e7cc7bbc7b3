"""What waits for an engine: whichever engine has room takes the next part.

    begun      parts that an engine begins with: of its share, as many as it decodes together
    waiting    the rest of all shares, the longest first; nobody's until an engine has room

So the waiting prompts of an engine that is slow, or that has failed, are answered by the others.
Who answers depends on the engines' speed. The answers do not, because each sample has a seed of its
own.

A counter in the job's store says how many of the waiting parts are taken. Its addition is atomic,
so each part goes to one engine, and no rank waits for another engine's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from datetime import timedelta

from megatron_real.rollout.engines.engine import QueueEngine
from megatron_real.rollout.watch import own_store

_STORE_SECONDS = 300.0
"""How long a request to the store may take, and a rank may wait for the first one of its engine."""

_draws = itertools.count()
"""Numbers the draws of this process: every rank begins the same ones in the same order."""


class Backlog:
    """This rank's access to what waits, for one draw after the other."""

    def __init__(self, engine: QueueEngine, index: int, member: int) -> None:
        """Connects to the job's store.

        Args:
            engine: this rank's engine.
            index: number of the engine.
            member: number of this rank among the ranks of the engine.
        """
        self.engine = engine
        self._index = index
        self._member = member
        self._store = own_store(timedelta(seconds=_STORE_SECONDS))
        self._keys: list[str] = []
        """Keys that this rank has made in the store for the present draw."""

    def begin(self, waiting: Sequence[int]) -> Iterator[int]:
        """Returns an iterator over the waiting parts that this engine takes.

        Each step of it takes one part; it ends when nothing waits any more. All ranks of an engine
        take their steps at the same places of their common schedule, and get the same parts.
        Call it once a draw on every rank, after all ranks have ended the draw before.

        Args:
            waiting: the parts, the same on every rank.
        """
        # What an engine still takes, it takes from the present draw.
        for key in self._keys:
            self._store.delete_key(key)
        self._keys = []

        # A counter of its own for each draw: nobody has to set one back while others still read it.
        draw = f"megatron_real/backlog/{next(_draws)}"
        return self._taken(waiting, draw)

    def _taken(self, waiting: Sequence[int], draw: str) -> Iterator[int]:
        for step in range(len(waiting)):
            # `number` parts were taken before; the next one is this engine's.
            key_of_step = f"{draw}/{self._index}/{step}"

            if self._member == 0:
                number = self._store.add(draw, 1) - 1
                # Whoever counted first makes the key, and deletes it after the draw.
                if number == 0:
                    self._keys.append(draw)

                # The first rank of an engine counts, and tells the others what it got.
                if self.engine.tp > 1:
                    self._store.set(key_of_step, str(number))
                    self._keys.append(key_of_step)
            else:
                # Waits until the first rank has set it.
                number = int(self._store.get(key_of_step))

            if number >= len(waiting):
                return
            yield waiting[number]
