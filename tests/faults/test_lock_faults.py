"""The lock of a run directory where the file system is slow, fails or lies,
and where processes do not see each other.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

import pytest

from megatron_real.runs.lock import RunLock
from tests.faults import disk
from tests.faults.disk import Disk
from tests.faults.lock import HOLDER, last

pytestmark = pytest.mark.skipif(bool(disk.missing()), reason=disk.missing())


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return Disk(tmp_path_factory.mktemp("disk"))


@pytest.fixture
def started() -> Iterator[ExitStack]:
    """Ends the processes that a test starts."""
    with ExitStack() as stack:
        yield stack


def holder(
    stack: ExitStack,
    folder: Path,
    *wrapper: str,
    lease: float = 600.0,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[str]:
    """Starts a process that takes the lock or is refused, by a wrapping command."""
    process = subprocess.Popen(
        [*wrapper, sys.executable, "-c", HOLDER, str(folder), str(lease)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | dict(environment),
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process


def holds(process: subprocess.Popen[str]) -> bool:
    """Waits until the process has the lock or has ended; returns whether it has the lock."""
    assert process.stdout is not None
    return process.stdout.readline() == "held\n"


SLOW = [
    f"{call} owners delay 30" for call in ("open", "write", "link", "rename", "unlink", "touch")
]
# Every trial is one process whose threads are the newcomers: names decide, not process numbers.
CONTENDERS = """
import json, os, sys, threading, time
from pathlib import Path
from megatron_real.runs.lock import RunLock
trials, number, root = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dead = json.loads(Path(sys.argv[4]).read_text())
num_holders = []
for trial in range(trials):
    folder = root / str(trial) / "owners"
    folder.mkdir(parents=True)
    (folder / "1").write_text(json.dumps(dead))
    holders = []
    start = threading.Barrier(number)
    def want():
        lock = RunLock(folder, lease=600.0, beat=0.05)
        start.wait()
        try:
            lock.take()
            holders.append(lock)
        except ValueError:
            pass
    threads = [threading.Thread(target=want) for _ in range(number)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    num_holders.append(len(holders))
    for lock in holders: lock.release()
print(json.dumps(num_holders))
"""


@pytest.mark.parametrize("trials", [12, pytest.param(80, marks=pytest.mark.grid)])
def test_of_many_newcomers_one_gets_a_dead_owners_lock(
    tmp_path: Path, faulty: Disk, started: ExitStack, trials: int
) -> None:
    """All operations on names are slowed down.

    A lock that a newcomer takes away by renaming it can be got by two of them then.
    """
    dead = holder(started, tmp_path / "owners")
    assert holds(dead)
    dead.kill()
    dead.wait()
    faulty.rules(*SLOW)
    words = [str(trials), "6", str(tmp_path), str(last(tmp_path / "owners"))]

    process = subprocess.run(
        [sys.executable, "-c", CONTENDERS, *words],
        env={**os.environ, **faulty.environment},
        capture_output=True,
        text=True,
        timeout=300,
    )

    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == [1] * trials


def test_of_many_processes_one_gets_it(tmp_path: Path, faulty: Disk, started: ExitStack) -> None:
    first = holder(started, tmp_path / "owners")
    assert holds(first)
    first.kill()
    first.wait()
    faulty.rules(*SLOW)

    contenders = [
        holder(started, tmp_path / "owners", environment=faulty.environment) for _ in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        holding = list(pool.map(holds, contenders))

    assert sum(holding) == 1
    winner = contenders[holding.index(True)]
    assert json.loads(last(tmp_path / "owners").read_text())["pid"] == winner.pid


def test_a_full_disk_does_not_end_an_owners_life(
    tmp_path: Path, faulty: Disk, started: ExitStack
) -> None:
    """The owner outlives ENOSPC while it writes, and a time in which nothing works; its thread
    goes on, and writes that it does.
    """
    owner = holder(started, tmp_path / "owners", environment=faulty.environment)
    assert holds(owner)
    assert owner.stderr is not None

    faulty.rules("write owners fail 28", "touch owners fail 5", "open owners fail 5")
    warning = owner.stderr.readline()
    assert "the run's lock cannot be touched ([Errno 5] Input/output error" in warning

    faulty.rules()
    assert "is touched again" in owner.stderr.readline()

    with pytest.raises(ValueError, match=rf"is in use by process {owner.pid} on"):
        RunLock(tmp_path / "owners", lease=600.0, beat=0.1).take()
    assert owner.poll() is None


def test_a_listing_that_lacks_the_newest_names_gives_nobody_a_lock(
    tmp_path: Path, faulty: Disk, started: ExitStack
) -> None:
    for _ in range(3):
        lock = RunLock(tmp_path / "owners", lease=600.0, beat=0.1)
        lock.take()
        lock.release()
    owner = holder(started, tmp_path / "owners")
    assert holds(owner) and last(tmp_path / "owners").name == "4"

    faulty.rules(*[f"list owners/{number} hide 0" for number in (2, 3, 4)])
    second = holder(started, tmp_path / "owners", environment=faulty.environment)
    _, stderr = second.communicate(timeout=240)

    assert f"is in use by process {owner.pid} on" in stderr and second.returncode == 1


def test_an_owner_that_slept_through_its_lease_ends(
    tmp_path: Path, faulty: Disk, started: ExitStack
) -> None:
    owner = holder(started, tmp_path / "owners", lease=600.0)
    assert holds(owner)

    owner.send_signal(signal.SIGSTOP)
    second = holder(started, tmp_path / "owners", lease=1.0)
    assert holds(second), "the lease that counts is the newcomer's"

    owner.send_signal(signal.SIGCONT)
    assert owner.stderr is not None
    assert f"now belongs to process {second.pid}" in owner.stderr.read()
    assert owner.wait() == 1 and second.poll() is None


def no_namespaces() -> str:
    """Returns why this machine makes no PID namespace, or an empty string where it does."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    process = subprocess.run(["unshare", "-p", "-f", "--mount-proc", "true"], capture_output=True)
    return process.stderr.decode().strip()


@pytest.mark.skipif(bool(no_namespaces()), reason=no_namespaces())
@pytest.mark.parametrize("proc", [True, False], ids=["its own /proc", "the machine's /proc"])
def test_two_containers_of_one_machine_do_not_take_each_other_for_dead(
    tmp_path: Path, started: ExitStack, proc: bool
) -> None:
    """They share host name and boot, and neither is in the other's process table."""
    contained = ["unshare", "-p", "-f", "--kill-child"]
    if proc:
        contained.append("--mount-proc")
    owner = holder(started, tmp_path / "owners", *contained)
    assert holds(owner)

    second = holder(started, tmp_path / "owners", *contained)
    _, stderr = second.communicate(timeout=240)

    assert "is in use by process" in stderr, "a sign of life is waited for"
    # Three beats: an owner that lost its lock would have ended.
    time.sleep(0.3)
    assert owner.poll() is None
