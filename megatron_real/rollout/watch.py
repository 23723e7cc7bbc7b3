"""Ends a collective that hangs, with a sentence that says where each rank stands."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import defaultdict
from types import TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_BEAT_SECONDS = 1.0


class Watch:
    """Watches one weight sync on this rank; `at` is what it waits for.

    A rank that hangs in a collective cannot raise. So a thread tells the job's store once a second where its rank
    stands, and when the time is over it writes where all ranks stand and ends the process; the launcher ends the rest.
    """

    def __init__(self, version: int, seconds: float) -> None:
        self.version, self.seconds = version, seconds
        self.at = "the engine"
        """What this rank waits for."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="weight-sync-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        _get_default_store().set(_key(dist.get_rank()), f"{self.version} nothing: it is done")

    def _beat(self) -> None:
        ends, store = time.monotonic() + self.seconds, _get_default_store()
        while not self._done.wait(min(_BEAT_SECONDS, max(ends - time.monotonic(), 0.0))):
            store.set(_key(dist.get_rank()), f"{self.version} {self.at}")
            if time.monotonic() >= ends:
                print(f"megatron-real: {self._verdict()}", file=sys.stderr, flush=True)
                os._exit(1)

    def _verdict(self) -> str:
        """Where each rank stands, as far as it has said so."""
        store, ranks_at = _get_default_store(), defaultdict(list)
        for rank in range(dist.get_world_size()):
            told = store.get(_key(rank)).decode() if store.check([_key(rank)]) else "0 "
            version, _, place = told.partition(" ")
            ranks_at[place if int(version) == self.version else "its turn: it has not begun"].append(str(rank))
        places = "; ".join(f"rank {', '.join(ranks)} waits for {place}" for place, ranks in ranks_at.items())
        return (
            f"weight sync {self.version} did not finish in {self.seconds:g} s (rollout.sync.timeout_seconds): {places}"
        )


def _key(rank: int) -> str:
    return f"megatron_real/weight_sync/{rank}"
