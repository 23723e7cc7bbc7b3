"""Ranks with TransformerEngine's layers: a World in a process of its own,
whose ranks are forked from another preload.

multiprocessing has one fork server for each process, and the one of the tests' process knows no
TransformerEngine.
"""

from __future__ import annotations

import multiprocessing as mp
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any

from tests.distributed.world import World


class TeWorld:
    """`run` is that of World."""

    def __init__(self) -> None:
        self._pipe, theirs = mp.Pipe()
        self._process = mp.get_context("spawn").Process(target=_serve, args=(theirs,))
        self._process.start()

    def run(self, function: Callable[..., Any], size: int, **arguments: Any) -> list[Any]:
        """Raises AssertionError with the ranks' tracebacks."""
        self._pipe.send((function, size, arguments))
        ok, value = self._pipe.recv()
        assert ok, value
        results: list[Any] = value
        return results

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()


def _serve(pipe: Connection) -> None:
    world = World(preload="tests.emulated_te.preload")
    while (request := pipe.recv()) is not None:
        function, size, arguments = request
        try:
            pipe.send((True, world.run(function, size, **arguments)))
        except Exception:  # whatever went wrong is the test's to report
            pipe.send((False, traceback.format_exc()))

    # Waited for, its ranks' CPU time counts as ours (tests/costs.py).
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
