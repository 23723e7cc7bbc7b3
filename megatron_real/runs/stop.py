"""When a run should stop before its last step: asked by a signal, out of time, or unable to save.

A signal only notes the wish. The loop asks at the seams of its stages, all ranks together, so that all of them stop at
the same seam whichever of them was told. Loadable without torch, so that no signal comes too early.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_real.runs.ranks import Ranks

EXIT_AGAIN = 75
"""Exit code of a run that stopped early with everything saved: start the same command again (sysexits' EX_TEMPFAIL)."""
_REASONS = (
    "",
    "trainer.max_hours is over",
    "the signal SIGTERM",
    "the signal SIGUSR1",
    "a checkpoint could not be saved",
)
SAVE_FAILED = 4


class Stopped(Exception):
    """The run stopped early, as it was asked to; everything is saved."""


class StopRequest:
    """Notes on this rank, and agrees with the others, that the run should stop."""

    def __init__(self, *, max_hours: float = 0.0) -> None:
        """Hears signals from now on. `max_hours` from now: 0 for no limit."""
        self._ends = time.monotonic() + max_hours * 3600 if max_hours else None
        self._wish = 0
        if threading.current_thread() is threading.main_thread():  # Python hears signals nowhere else
            signal.signal(signal.SIGUSR1, self._hear)
            signal.signal(signal.SIGTERM, self._hear)

    def ask(self, reason: int) -> None:
        """This rank wants to stop; higher reasons win."""
        self._wish = max(self._wish, reason)

    def agreed(self, ranks: Ranks) -> int:
        """The reason why the run should stop now, 0 for none: the same on every rank. Collective."""
        if self._ends is not None and time.monotonic() >= self._ends:
            self.ask(1)
        return ranks.largest(self._wish)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.ask(3 if number == signal.SIGUSR1 else 2)


def described(reason: int) -> str:
    """The reason in words."""
    return _REASONS[reason]
