"""Runs a command until it ends, or until standard input does.

So a server never outlives the run that started it.

    python guard.py COMMAND ...

The run holds the other end of standard input, which closes however the run ends, SIGKILL included.
The guard leads a process group of its own, to which all processes belong that the command starts,
and ends the whole group. It imports nothing of the project.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

_GRACE_SECONDS = 10.0
"""Time that the command has to end after SIGTERM."""


def main() -> None:
    """Runs the command; the guard ends with its process group, by SIGKILL."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    # Not before the command is started: it would inherit that SIGTERM is ignored.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the guard leaves last
    threading.Thread(target=_stop_at_the_end_of_input, args=(command,), daemon=True).start()
    command.wait()
    os.killpg(0, signal.SIGKILL)  # what the command has left behind, and the guard


def _stop_at_the_end_of_input(command: subprocess.Popen[bytes]) -> None:
    # Nobody writes to it: the read ends when the other end has closed.
    sys.stdin.buffer.read()
    os.killpg(0, signal.SIGTERM)
    try:
        command.wait(_GRACE_SECONDS)
    finally:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
