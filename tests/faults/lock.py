"""Processes that want the lock of a run directory."""

from __future__ import annotations

from pathlib import Path

# Arguments: the lock's folder, and the seconds of its lease.
HOLDER = """
import sys, time
from pathlib import Path
from megatron_real.runs.lock import RunLock
try:
    RunLock(Path(sys.argv[1]), lease=float(sys.argv[2]), beat=0.1).take()
except ValueError as refused:
    sys.exit(str(refused))
print("held", flush=True)
time.sleep(600)
"""


def last(folder: Path) -> Path:
    """The file of the lock's owner."""
    numbers = [int(file.name) for file in folder.iterdir() if file.name.isdecimal()]
    return folder / str(max(numbers))
