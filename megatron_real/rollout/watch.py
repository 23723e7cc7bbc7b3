"""Ends a collective that hangs, with a sentence that says where each rank stands."""

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
_STORE_SECONDS = 5.0
"""Longest that a question to the store may take, and the verdict as a whole."""


class Watch:
    """Watches one weight sync on this rank; `at` is what it waits for.

    A rank that hangs in a collective cannot raise. So one thread tells the job's store once a second where its rank
    stands, and another one counts the time: when it is over, that one writes where all ranks stand and ends the process;
    the launcher ends the rest. The thread that counts waits for nothing but its clock. The store may be gone, and its
    client in this process may be held by the very call that hangs: so the watch has a client of its own.
    """

    def __init__(self, version: int, seconds: float) -> None:
        self.version, self.seconds = version, seconds
        self.at = "the engine"
        """What this rank waits for."""
        self._done = threading.Event()
        self._store = _own_store()
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
            thread.join(_STORE_SECONDS)

    def _tell(self) -> None:
        """Says where this rank stands, until it is done."""
        try:
            while not self._done.is_set():
                self._store.set(_key(dist.get_rank()), f"{self.version} {self.at}")
                self._done.wait(_BEAT_SECONDS)
            self._store.set(_key(dist.get_rank()), f"{self.version} nothing: it is done")
        except Exception as error:  # whatever is wrong with the store, the sync does not need it
            logger.warning("where this rank stands in the weight sync is not known: %s", error)

    def _count(self) -> None:
        if self._done.wait(self.seconds):
            return
        places = ["the job's store does not say where the ranks stand"]
        asking = threading.Thread(target=self._ask, args=(places,), daemon=True)
        asking.start()
        asking.join(_STORE_SECONDS)
        sentence = (
            f"weight sync {self.version} did not finish in {self.seconds:g} s "
            f"(rollout.sync.timeout_seconds): {places[-1]}; this rank waits for {self.at}"
        )
        os.write(2, f"megatron-real: {sentence}\n".encode())
        os._exit(1)

    def _ask(self, places: list[str]) -> None:
        """Adds where each rank stands, as far as it has said so."""
        ranks_at = defaultdict(list)
        for rank in range(dist.get_world_size()):
            key = _key(rank)
            text = self._store.get(key).decode() if self._store.check([key]) else "0 "
            version, _, place = text.partition(" ")
            if int(version) != self.version:
                place = "its turn: it has not begun"
            ranks_at[place].append(str(rank))
        places.append(
            "; ".join(
                f"rank {', '.join(ranks)} waits for {place}" for place, ranks in ranks_at.items()
            )
        )


def _own_store() -> Any:
    """A connection of its own to the job's store, where that is on the network; else the store itself."""
    store = _get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return store
    seconds = timedelta(seconds=_STORE_SECONDS)
    try:
        return TCPStore(
            store.host, store.port, is_master=False, wait_for_workers=False, timeout=seconds
        )
    except dist.DistError as error:  # a busy store has needed more; the sync itself needs none
        logger.warning("the weight sync's watch has no connection of its own: %s", error)
        return store


def _key(rank: int) -> str:
    return f"megatron_real/weight_sync/{rank}"
