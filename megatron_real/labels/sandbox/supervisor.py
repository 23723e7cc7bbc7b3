"""The process outside a worker: with it, or with the worker, ends whatever the worker started."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable

from megatron_real.labels.sandbox import kernel
from megatron_real.labels.sandbox.walls import Outside, separate

END = int(signal.SIGRTMIN) + 1
"""Has a supervisor end everything below it. No signal that a terminal or Slurm sends to whole
trees: a run that is asked to stop by SIGTERM goes on to its next seam, and needs its verifiers
until then."""

_BY_SIGNAL = 128  # exit codes beyond it stand for a signal, as in a shell


def supervise(work: Callable[[Outside], int], *, namespaces: bool) -> int:
    """Runs `work` in a process below this one and returns its exit code, negative for a signal.

    The signal END, or the end of the process that started this one, ends everything below at once.
    Must be called by a process without threads.

    Args:
        work: the worker; what it returns is its exit code.
        namespaces: give it namespaces of its own, where the node allows it.
    """
    # Blocked before anything can send them: they are waited for below, and never lost.
    awaited = {END, signal.SIGCHLD}
    signal.pthread_sigmask(signal.SIG_BLOCK, awaited)
    kernel.die_with_parent(END)
    kernel.adopt_orphans()
    outside = separate(wanted=namespaces)

    first = os.fork()
    if first == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, awaited)
        kernel.die_with_parent(signal.SIGKILL)
        os._exit(_init(work, outside) if outside.separate else work(outside))

    code: int | None = None
    while code is None and signal.sigwait(awaited) != END:
        ended, status = os.waitpid(first, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
    if code is None:
        code = -signal.SIGTERM
    _end_descendants()

    # The first process of a namespace cannot end itself by a signal: its exit code stands for one.
    if outside.separate and code > _BY_SIGNAL:
        return _BY_SIGNAL - code
    return code


def end_like(code: int) -> None:
    """Ends this process as another one ended, so that its parent sees the same.

    Args:
        code: an exit code; a negative one stands for a signal.
    """
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [-code])
        os.kill(os.getpid(), -code)
    os._exit(code)


def _init(work: Callable[[Outside], int], outside: Outside) -> int:
    """Runs as the first process of a process namespace, and returns its exit code.

    It starts the worker, and reaps what is orphaned in there.
    """
    worker = os.fork()
    if worker == 0:
        kernel.die_with_parent(signal.SIGKILL)
        os._exit(work(outside))
    while True:
        ended, status = os.wait()
        if ended == worker:
            code = os.waitstatus_to_exitcode(status)
            if code < 0:
                return _BY_SIGNAL - code
            return code


def _end_descendants() -> None:
    """Kills every process below this one. Those of a process namespace end with its first one."""
    # Again after each that ended: it may have started others since the list was made.
    while True:
        for process in _descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _descendants(root: int) -> list[int]:
    """Returns the ids of the processes below `root`, as /proc shows them."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                # The name of a program, in parentheses, may hold anything; the parent is the second
                # field after it.
                parent = int(file.read().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue  # it ended meanwhile
        children.setdefault(parent, []).append(int(name))

    descendants: list[int] = []
    pending = [root]
    while pending:
        below = children.get(pending.pop(), [])
        descendants += below
        pending += below
    return descendants
