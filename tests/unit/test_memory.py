"""What is read from /proc and from cgroups, in directories of the same form."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_real.supervision.memory import MemoryGuard, Usage, cgroup_usage, memory_of_process

GIB = 2**30


def group(folder: Path, *, used: int, cached: int, limit: str, version: int = 2) -> None:
    """Writes the files of one cgroup."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.current", "memory.max", "inactive_file")
    if version == 1:
        names = ("memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(f"{used}\n")
    (folder / names[1]).write_text(f"{limit}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} {cached}\n")


def own(tmp_path: Path, line: str) -> Path:
    (tmp_path / "own").write_text(f"{line}\n")
    return tmp_path / "own"


def test_what_is_only_cached_is_not_used(tmp_path: Path) -> None:
    group(tmp_path / "job/step", used=8 * GIB, cached=3 * GIB, limit=str(10 * GIB))
    assert cgroup_usage(tmp_path, own(tmp_path, "0::/job/step")) == Usage(5 * GIB, 10 * GIB)


def test_the_cgroup_nearest_to_its_limit_counts(tmp_path: Path) -> None:
    """A step without a limit runs in a job with one, on a machine with a wider one."""
    group(tmp_path / "job/step", used=4 * GIB, cached=0, limit="max")
    group(tmp_path / "job", used=6 * GIB, cached=0, limit=str(8 * GIB))
    group(tmp_path, used=10 * GIB, cached=0, limit=str(40 * GIB))
    assert cgroup_usage(tmp_path, own(tmp_path, "0::/job/step")) == Usage(6 * GIB, 8 * GIB)


def test_a_container_that_sees_its_cgroup_as_the_root_is_measured(tmp_path: Path) -> None:
    group(tmp_path, used=6 * GIB, cached=0, limit=str(8 * GIB))
    assert cgroup_usage(tmp_path, own(tmp_path, "0::/../../elsewhere")) == Usage(6 * GIB, 8 * GIB)


def test_the_limits_of_cgroup_version_1_are_read(tmp_path: Path) -> None:
    group(tmp_path / "memory/job", used=6 * GIB, cached=GIB, limit=str(8 * GIB), version=1)
    # 2^63 - 4096 is how version 1 writes that there is no limit.
    group(tmp_path / "memory", used=9 * GIB, cached=0, limit="9223372036854771712", version=1)
    lines = own(tmp_path, "4:cpu,cpuacct:/other\n9:memory:/job")
    assert cgroup_usage(tmp_path, lines) == Usage(5 * GIB, 8 * GIB)


@pytest.mark.parametrize("line", ["0::/", "nothing of the kind::", ""])
def test_without_a_cgroup_limit_no_usage_is_known(tmp_path: Path, line: str) -> None:
    assert cgroup_usage(tmp_path / "none", own(tmp_path, line)) is None
    assert cgroup_usage(tmp_path / "none", tmp_path / "missing") is None


def test_memory_is_nearly_full_only_if_it_grew(tmp_path: Path) -> None:
    """A restart does not help a job whose memory is nearly full from its beginning."""
    guard = MemoryGuard(tmp_path, own(tmp_path, "0::/"))
    for used, expected in ((9.6, False), (9.7, False), (9.81, True)):
        group(tmp_path, used=int(used * GIB), cached=0, limit=str(10 * GIB))
        assert guard.nearly_full() == expected, used

    # This job begins with room to spare, so it is nearly full as soon as it passes the threshold.
    growing = MemoryGuard(tmp_path, own(tmp_path, "0::/"))
    for used, expected in ((4.0, False), (9.4, False), (9.6, True)):
        group(tmp_path, used=int(used * GIB), cached=0, limit=str(10 * GIB))
        assert growing.nearly_full() == expected, used


def test_resident_memory_follows_an_allocation() -> None:
    before = memory_of_process()["resident_gib"]
    block = bytearray(b"x") * (64 << 20)
    after = memory_of_process()["resident_gib"]
    assert len(block) / 2**30 == 0.0625
    assert 0.05 < after - before < 0.08
