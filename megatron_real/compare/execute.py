"""Runs a sweep's runs one after the other, each as a process of its own.

signal                  the run that is at work            the sweep
Ctrl-C                  hears it from the terminal too     ends with 130
SIGTERM, SIGUSR1        gets it, saves and stops           ends with 75; the same command goes on
SIGKILL to the sweep    gets SIGTERM, saves and stops      the next start waits for it
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from megatron_real.compare.sweep import SweepRun
from megatron_real.runs.rows import read_rows

_POLL_SECONDS = 0.2
_PARTS = 10
"""A run says how far it is after each tenth of its steps."""
_PR_SET_PDEATHSIG = 1
"""linux/prctl.h."""


class Executor:
    """Starts runs, and passes on to them what is asked of the sweep.

    Example:
        with sweep_lock(out, say) as lock, Executor(...) as executor:
            code = executor.execute(run)
    """

    def __init__(
        self,
        logs: Path,
        lock: int,
        *,
        num_ranks: int | None,
        say: Callable[[str], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            logs: directory of the files that have what runs print.
            lock: descriptor of the sweep's lock, which a run inherits.
            num_ranks: processes of a run; None for one process without a launcher.
            say: tells the user.
        """
        self._logs = logs
        self._lock = lock
        self._num_ranks = num_ranks
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self.asked_to_stop = False

    def __enter__(self) -> Executor:
        # SIGTERM comes from a scheduler that ends the job, SIGUSR1 from Slurm some time before its
        # limit (--signal): a run saves and stops at either.
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            # Between two sweeps in one process a signal ends it as usual.
            signal.signal(number, signal.SIG_DFL)

    def execute(self, run: SweepRun) -> int:
        """Trains a run, or goes on with it.

        Returns:
            Its exit code, negative for a signal that killed it.
        """
        log = self.log(run)
        log.parent.mkdir(parents=True, exist_ok=True)
        # The module and no script: a script need not be on the PATH, and this
        # interpreter has the packages.
        command = [sys.executable, "-m", "megatron_real", "train", str(run.base), *run.overrides]
        if self._num_ranks is not None:
            command += ["--nproc", str(self._num_ranks)]
        # Appended: a run that goes on keeps what its earlier starts have printed.
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Python closes all other descriptors in a child. The run's copy keeps the lock held
                # even where the sweep itself has been killed.
                pass_fds=(self._lock,),
                # A run outlives a sweep that was killed, unless the kernel tells it.
                preexec_fn=_stop_with_parent,
            )

        try:
            self._follow(run, self._process)
        # Ctrl-C has reached the run too: it saves, and is waited for.
        except KeyboardInterrupt:
            self._process.wait()
            raise

        code = self._process.returncode
        self._process = None
        return code

    def log(self, run: SweepRun) -> Path:
        """Returns the file that has what a run printed."""
        return self._logs / f"{run.variant}-seed-{run.seed}.log"

    def _follow(self, run: SweepRun, process: subprocess.Popen[bytes]) -> None:
        """Waits for the end of a run, and says meanwhile how far it is."""
        steps = run.config.trainer.steps
        steps_of_part = max(1, steps // _PARTS)
        metrics = run.directory.metrics
        size = 0
        shown = 0

        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            # The file is read only when it has grown: polling costs next to nothing.
            if not metrics.exists() or metrics.stat().st_size == size:
                continue
            size = metrics.stat().st_size
            rows, _ = read_rows(metrics)
            # Said where another tenth of the steps is passed, however many rows came at once.
            if not rows or len(rows) // steps_of_part == shown // steps_of_part:
                continue

            shown = len(rows)
            sentence = f"{run.name}: step {shown} of {steps}"
            reward = rows[-1].get("reward_mean")
            if reward is not None:
                sentence += f", reward {reward:.3f}"
            self._say(sentence)

    def _pass_on(self, number: int, _frame: FrameType | None) -> None:
        self.asked_to_stop = True
        if self._process is not None:
            # The run may end by itself between the test and the signal.
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def _stop_with_parent() -> None:
    """Asks the kernel to send SIGTERM to this process when its parent ends.

    So a run whose sweep was killed saves and stops. Other kernels than Linux cannot do it.
    """
    # prctl is of Linux's C library alone. The kernel keeps the wish across exec, and acts on it
    # when the thread that has forked ends: the main thread.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def sweep_lock(out: Path, say: Callable[[str], None]) -> Iterator[int]:
    """Holds the sweep's lock, and gives its descriptor.

    It waits while another start of the sweep, or a run that one has left behind, is at work. A run
    inherits the descriptor: the kernel holds the lock until the last process that has it is gone.
    """
    out.mkdir(parents=True, exist_ok=True)
    # The file is never deleted: a later start would make a new one of this name and lock that,
    # while a run still holds the old one.
    descriptor = os.open(out / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        # Without waiting at first, so that the user learns why nothing happens.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(
                f"another start of the sweep in {out}, or a run of it, is at work; waiting for its "
                "end"
            )
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        # It gives up this process's hold alone: a run that is still at work has a copy of the
        # descriptor, and flock ends with the last one.
        os.close(descriptor)
