"""Ends a weight sync that hangs, with a sentence that says what each rank waits for."""

from __future__ import annotations

import logging
import os
import threading
from collections import defaultdict
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.distributed_c10d import _get_default_store

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
"""Time between two notes of a rank in the store."""
_STORE_SECONDS = 5.0
"""How long a request to the store may take, and asking for all ranks as a whole."""


class Watch:
    """Watches one weight sync on this rank; `at` is what it waits for.

    A rank that hangs in a collective cannot raise. So one thread writes once a second to the job's
    store what its rank waits for, and another one counts the time. When the time is over, the
    second thread writes to stderr what all ranks wait for and ends the process; the launcher ends
    the others. This thread waits for nothing but its clock, because the store may be gone. The
    process's client of the store may be held by the very call that hangs, so the watch has a client
    of its own.
    """

    def __init__(self, version: int, seconds: float) -> None:
        self.version = version
        self.seconds = seconds
        self.at = "the engine"
        """What this rank waits for."""
        self._done = threading.Event()
        self._store = own_store(timedelta(seconds=_STORE_SECONDS))
        self._threads = [
            threading.Thread(target=self._tell, name="weight-sync-place", daemon=True),
            threading.Thread(target=self._count, name="weight-sync-watch", daemon=True),
        ]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        for thread in self._threads:
            # A store that does not answer must not hold up a sync that went well.
            thread.join(_STORE_SECONDS)

    def _tell(self) -> None:
        """Writes to the store what this rank waits for, until the sync is done."""
        try:
            while not self._done.is_set():
                self._store.set(_key(dist.get_rank()), f"{self.version} {self.at}")
                self._done.wait(_BEAT_SECONDS)
            self._store.set(_key(dist.get_rank()), f"{self.version} nothing: it is done")
        except Exception as error:  # the sync itself does not need the store
            logger.warning("where this rank stands in the weight sync is not known: %s", error)

    def _count(self) -> None:
        """Ends the process unless the sync is done in time."""
        if self._done.wait(self.seconds):
            return

        # Asked in a thread of its own: a store that does not answer must not keep the process
        # alive.
        places = ["the job's store does not say where the ranks stand"]
        asking = threading.Thread(target=self._ask, args=(places,), daemon=True)
        asking.start()
        asking.join(_STORE_SECONDS)

        sentence = (
            f"weight sync {self.version} did not finish in {self.seconds:g} s "
            f"(rollout.sync.timeout_seconds): {places[-1]}; this rank waits for {self.at}"
        )
        # Not by print, because the thread that hangs may hold the lock of stderr, and not by
        # sys.exit, which would end this thread alone.
        os.write(2, f"megatron-real: {sentence}\n".encode())
        os._exit(1)

    def _ask(self, places: list[str]) -> None:
        """Appends a sentence that says what each rank waits for, as far as the store knows."""
        ranks_at = defaultdict(list)
        for rank in range(dist.get_world_size()):
            place = "its turn: it has not begun"
            key = _key(rank)
            # Asked first, because `get` would wait for a key that is not there.
            if self._store.check([key]):
                version, _, noted = self._store.get(key).decode().partition(" ")
                if int(version) == self.version:  # else the note is of an earlier sync
                    place = noted
            ranks_at[place].append(str(rank))

        places.append(
            "; ".join(
                f"rank {', '.join(ranks)} waits for {place}" for place, ranks in ranks_at.items()
            )
        )


def own_store(timeout: timedelta) -> Any:
    """Returns a new connection to the job's store, or the store itself where it has no address.

    Args:
        timeout: how long a request to the store may take.
    """
    store = _get_default_store()
    # torch wraps it in prefixes for keys; only the innermost store has an address.
    while isinstance(store, PrefixStore):
        store = store.underlying_store

    if not isinstance(store, TCPStore):
        return store

    try:
        return TCPStore(
            store.host, store.port, is_master=False, wait_for_workers=False, timeout=timeout
        )
    except dist.DistError as error:  # a busy store may need longer, or take no more connections
        logger.warning("there is no connection of its own to the job's store: %s", error)
        return store


def _key(rank: int) -> str:
    return f"megatron_real/weight_sync/{rank}"
