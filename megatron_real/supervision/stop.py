"""When a run should stop before its last step.

It is asked to by a signal, is out of time or memory, or cannot save. A signal only notes the wish.
The loop asks at the seams of its stages, all ranks together, so that all of them stop at the same
seam whichever of them got the signal. Loadable without torch, so that no signal comes too early.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_real.labels.sandbox.kernel import die_with_parent
from megatron_real.supervision.memory import MemoryGuard

if TYPE_CHECKING:
    from megatron_real.parallel.ranks import Ranks

_REASONS = (
    "",
    "trainer.max_hours is over",
    "the signal SIGTERM",
    "the signal SIGUSR1",
    "the memory of this machine's job is nearly used up, and has grown during this run",
    "Ctrl-C",
    "a checkpoint could not be saved",
)
# In the order of _REASONS, after the one that stands for none. Of several the highest wins.
TIME, SIGTERM, SIGUSR1, MEMORY, INTERRUPTED, SAVE_FAILED = range(1, len(_REASONS))

_LAUNCHED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
"""The variable that torchrun, and `train --nproc` by it, sets for each rank."""

GRACE_SECONDS = 5.0
"""How long Ctrl-C waits for a seam, where everything can be saved. torchrun kills its ranks after
30 s."""
_SAME_PRESS_SECONDS = 1.0
"""A terminal and a launcher both pass Ctrl-C on: signals so close together are one press of the
keys."""


class StopRequest:
    """Notes on this rank, and agrees with the others, that the run should stop."""

    def __init__(self, *, max_hours: float = 0.0, memory: MemoryGuard | None = None) -> None:
        """Hears signals from now on.

        Args:
            max_hours: from now; 0 for no limit.
            memory: says when the machine's memory is nearly full.
        """
        self._ends: float | None = None
        if max_hours:
            self._ends = time.monotonic() + max_hours * 3600
        self._memory = memory or MemoryGuard()
        self._wish = 0
        self._pressed: float | None = None
        self.reason = 0
        """Why the ranks agreed to stop; 0: they did not."""
        self.has_seams = False
        """Whether the run is in its loop, where it can save: before and after that, Ctrl-C ends it
        at once."""
        self._timer: threading.Timer | None = None
        self._heard_before: dict[int, Any] = {}
        """Signal -> its handler before this one."""
        if threading.current_thread() is not threading.main_thread():
            # Python hears signals in the main thread only.
            return

        if _LAUNCHED_BY_TORCHRUN in os.environ:
            # torchrun gives each rank a session of its own: nobody else would end the ranks of a
            # launcher that was killed.
            die_with_parent(signal.SIGTERM)
        # Slurm warns of the end by SIGTERM, or by what `sbatch --signal` names.
        self._take_over(signal.SIGUSR1, self._hear)
        self._take_over(signal.SIGTERM, self._hear)
        # A shell's background job ignores Ctrl-C, which is meant for the job in front.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._take_over(signal.SIGINT, self._interrupt)

    def close(self) -> None:
        """Gives the signals back to those who heard them before: other work follows."""
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._heard_before.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        """Ignores SIGUSR1 and SIGTERM from now on: the run is over, and its process about to end.

        While Python ends it gives each signal its default back, which kills: a run that has
        finished would count as failed. Ctrl-C ends a process that hangs here.
        """
        for number in self._heard_before.keys() - {signal.SIGINT}:
            signal.signal(number, signal.SIG_IGN)

    def ask(self, reason: int) -> None:
        """Notes that this rank wants to stop; higher reasons win."""
        self._wish = max(self._wish, reason)

    def agreed(self, ranks: Ranks) -> int:
        """Returns why the run should stop now, 0 for no reason, the same on every rank.

        Collective.
        """
        if self._ends is not None and time.monotonic() >= self._ends:
            self.ask(TIME)
        if self._memory.nearly_full():
            self.ask(MEMORY)
        # One rank's wish is every rank's: all of them stop at this seam.
        self.reason = ranks.largest(self._wish)
        return self.reason

    def _take_over(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        self._heard_before[number] = signal.signal(number, handler)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.ask(SIGUSR1 if number == signal.SIGUSR1 else SIGTERM)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        """Handles Ctrl-C: the run stops at the next seam if one comes soon.

        A second press, or the end of the grace, ends it at once.
        """
        now = time.monotonic()
        if not self.has_seams:
            raise KeyboardInterrupt

        if self._pressed is None:
            self._pressed = now
            self.ask(INTERRUPTED)
            # The timer presses Ctrl-C a second time when the grace is over.
            self._timer = threading.Timer(GRACE_SECONDS, os.kill, (os.getpid(), signal.SIGINT))
            self._timer.daemon = True
            self._timer.start()
        elif now - self._pressed >= _SAME_PRESS_SECONDS:
            raise KeyboardInterrupt


def described(reason: int) -> str:
    """Returns a reason in words."""
    return _REASONS[reason]
