"""Host memory: of this process, and of the cgroup that its job may not outgrow.

Loadable without torch.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

FULL_SHARE = 0.95
"""Share of the limit at which a run saves and stops. A step may allocate some more before the next
look."""
_GROWN_SHARE = 0.02
"""What a life must have added for another life to be of any help."""


def memory_of_process() -> dict[str, float]:
    """Returns the host memory of this process, in GiB.

    resident_gib: pages of this process in memory. pinned_gib: host memory that CUDA has locked, 0
    without a GPU.
    """
    # The second number of statm is that of resident pages (proc(5)).
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE")

    # Not imported: without torch nobody has pinned anything.
    torch = sys.modules.get("torch")
    pinned = 0
    if torch is not None and torch.cuda.is_available():
        # Since torch 2.7.
        statistics: dict[str, int] = getattr(torch.cuda, "host_memory_stats", dict)()
        pinned = int(statistics.get("allocated_bytes.current", 0))

    return {"resident_gib": resident / 2**30, "pinned_gib": pinned / 2**30}


@dataclass(frozen=True)
class Usage:
    """Memory of a cgroup."""

    used: int
    """Bytes that cannot be dropped: files that are only cached do not count."""
    limit: int
    """Bytes at which the kernel kills a process of the group."""


def cgroup_usage(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> Usage | None:
    """Returns the memory of the cgroup that is nearest to its limit.

    It is this process's or one around it. Both versions of cgroups are read. A container may see
    its own group as the root.

    Args:
        root: where cgroups are mounted.
        own: the file that names this process's groups, one a line: NUMBER:CONTROLLERS:PATH.

    Returns:
        None where there is no limit.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None

    usages = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if not separator:
            continue

        # Version 2 names no controllers, version 1 has a hierarchy for each.
        base = root
        version = 2
        if controllers:
            if "memory" not in controllers.split(","):
                continue
            base = root / "memory"
            version = 1

        # Every group around this process's own limits it too.
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            usage = _usage(base / folder, version)
            if usage is not None:
                usages.append(usage)

    return max(usages, key=lambda usage: usage.used / usage.limit, default=None)


def _usage(group: Path, version: int) -> Usage | None:
    """Returns the memory of one cgroup; None where it is missing or has no limit."""
    used_file = "memory.current"
    limit_file = "memory.max"
    cached_line = "inactive_file"
    if version == 1:
        used_file = "memory.usage_in_bytes"
        limit_file = "memory.limit_in_bytes"
        cached_line = "total_inactive_file"

    try:
        limit = int((group / limit_file).read_text())
        used = int((group / used_file).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        # No such group is here, or its limit is "max".
        return None

    # Version 1 writes "no limit" as the largest multiple of a page.
    if limit <= 0 or limit >= 1 << 60:
        return None

    # Before it kills, the kernel drops cached files that nobody has used lately.
    return Usage(max(used - int(statistics.get(cached_line, 0)), 0), limit)


class MemoryGuard:
    """Asks a run to save and stop before the kernel kills it.

    Memory that grows is the commonest end of long runs.
    """

    def __init__(
        self, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
    ) -> None:
        self._root = root
        self._own = own
        self._first: Usage | None = None

    def nearly_full(self) -> bool:
        """Returns whether the limit is near, and this life has come nearer since the first call."""
        usage = cgroup_usage(self._root, self._own)
        if usage is None:
            return False
        if self._first is None:
            self._first = usage
        grown = usage.used - self._first.used
        # Both: where the limit is near from the start, every life would end at once.
        return usage.used > FULL_SHARE * usage.limit and grown > _GROWN_SHARE * usage.limit
