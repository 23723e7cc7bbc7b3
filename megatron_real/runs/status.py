"""status.json of a run directory: what became of the last start, for scripts.

Loadable without torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_real.disk import write_whole
from megatron_real.errors import State

_MAX_REASON = 2000
"""Characters of a reason that are kept: the file then stays within its first block on disk."""

_OF_THE_RUN = ("state", "reason", "time", "life", "diverged")
"""Fields of the run's own status that a start which was refused keeps."""


def life_of_this_process() -> str:
    """Returns the Slurm job and its restart, JOB.RESTART; ".0" outside of Slurm."""
    return f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def read_status(file: Path) -> dict[str, Any]:
    """Returns the status as it was written; {} where there is none or it cannot be read as one."""
    try:
        # A status that cannot be read is as good as none: it is overwritten by the next one.
        status = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(status, dict):
        return {}
    return status


def write_status(
    file: Path,
    state: State,
    reason: str = "",
    *,
    diverged: bool = False,
    before: Mapping[str, Any] | None = None,
) -> None:
    """Replaces the status, on a full disk too.

    Args:
        file: the run's status.json.
        state: what became of the start.
        reason: a sentence; cut where it is long.
        diverged: the run failed because its weights or updates were not finite.
        before: the status that the run itself has, where this one is only of a start that was
            refused.

    Raises:
        OSError: the file can neither be replaced nor overwritten.
    """
    status: dict[str, Any] = {
        "state": state,
        "reason": reason[:_MAX_REASON],
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "life": life_of_this_process(),
    }
    if diverged:
        status["diverged"] = True
    if before:
        status["before"] = {name: before[name] for name in _OF_THE_RUN if name in before}
    line = json.dumps(status) + "\n"

    try:
        write_whole(file, line)
    except OSError:
        # A full disk has no block for a new file. The old one's block is still there, and longer
        # than a status.
        content = line.encode()
        # Without O_TRUNC, which would give the block away.
        descriptor = os.open(file, os.O_WRONLY)
        try:
            # The new content first: a reader meanwhile sees a status with a tail, never an empty
            # file.
            os.pwrite(descriptor, content, 0)
            os.truncate(descriptor, len(content))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        file.with_name(f"{file.name}.new").unlink(missing_ok=True)
