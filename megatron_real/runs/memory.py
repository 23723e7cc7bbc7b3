"""Host memory: of this process, and of the cgroup that its job may not outgrow. Loadable without torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

FULL_SHARE = 0.95
"""Share of the limit at which a run saves and stops. A step may allocate some more before the next look."""
_GROWN_SHARE = 0.02
"""What a life must have added for another life to be of any help."""


def memory_of_process() -> dict[str, float]:
    """resident_gib: pages of this process in memory. pinned_gib: host memory that CUDA has locked, 0 without a GPU."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * os.sysconf("SC_PAGE_SIZE")
    return {"resident_gib": resident / 2**30, "pinned_gib": _pinned_bytes() / 2**30}


def _pinned_bytes() -> int:
    torch = sys.modules.get("torch")  # nobody has pinned anything without it
    if torch is None or not torch.cuda.is_available():
        return 0
    statistics: dict[str, int] = getattr(torch.cuda, "host_memory_stats", dict)()  # since torch 2.7
    return int(statistics.get("allocated_bytes.current", 0))


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
    """Of this process's cgroup and those around it, the one nearest to its limit; None where there is no limit.

    Reads both versions of cgroups. A container may see its own group as the root.
    """
    usages = []
    for group, version in _groups(root, own):
        usage = _usage(group, version)
        if usage is not None:
            usages.append(usage)
    return max(usages, key=lambda usage: usage.used / usage.limit, default=None)


def _groups(root: Path, own: Path) -> list[tuple[Path, int]]:
    """(directory, version) of the memory cgroups that this process is in, the outermost last."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    groups = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if not separator:
            continue
        if controllers and "memory" not in controllers.split(","):
            continue
        base, version = (root / "memory", 1) if controllers else (root, 2)
        inner = Path(path.lstrip("/"))
        groups += [(base / folder, version) for folder in (inner, *inner.parents)]
    return groups


def _usage(group: Path, version: int) -> Usage | None:
    names = {1: ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file")}
    used_file, limit_file, cached_line = names.get(
        version, ("memory.current", "memory.max", "inactive_file")
    )
    try:
        limit = int((group / limit_file).read_text())
        used = int((group / used_file).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group here, or "max"
        return None
    # Version 1 writes "no limit" as the largest multiple of a page.
    if limit <= 0 or limit >= 1 << 60:
        return None
    return Usage(max(used - int(statistics.get(cached_line, 0)), 0), limit)


class MemoryGuard:
    """Asks a run to save and stop before the kernel kills it: memory that grows is the commonest end of long runs."""

    def __init__(
        self, root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
    ) -> None:
        self._root, self._own = root, own
        self._first: Usage | None = None

    def nearly_full(self) -> bool:
        """Whether the limit is near, and this life has brought it nearer since the first call."""
        usage = cgroup_usage(self._root, self._own)
        if usage is None:
            return False
        if self._first is None:
            self._first = usage
        grown = usage.used - self._first.used
        return usage.used > FULL_SHARE * usage.limit and grown > _GROWN_SHARE * usage.limit
