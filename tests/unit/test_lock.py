"""The lock of a run directory, with real processes as its owners."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_real.runs.lock import RunLock

HOLDER = """
import sys, time
from pathlib import Path
from megatron_real.runs.lock import RunLock
RunLock(Path(sys.argv[1]), lease=600.0, beat=0.1).take()
print("held", flush=True)
time.sleep(60)
"""


def hold(file: Path, **environment: str) -> subprocess.Popen[str]:
    """Another process that holds the lock."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    return holder


def elsewhere(file: Path) -> None:
    """Makes the owner a process of another machine, of which nothing is known but the file."""
    owner = json.loads(file.read_text())
    file.write_text(json.dumps({**owner, "host": "another-machine"}))


def test_a_living_owner_is_respected(tmp_path: Path) -> None:
    holder = hold(tmp_path / "lock")
    try:
        started = time.monotonic()
        with pytest.raises(ValueError, match=rf"is in use by process {holder.pid} on "):
            RunLock(tmp_path / "lock", lease=600.0, beat=0.1).take()
        assert time.monotonic() - started < 2, "a sign of life is enough"
    finally:
        holder.kill()


def test_a_dead_owner_of_this_machine_is_seen_at_once(tmp_path: Path) -> None:
    holder = hold(tmp_path / "lock")
    holder.kill()
    holder.wait()
    said: list[str] = []
    started = time.monotonic()
    lock = RunLock(tmp_path / "lock", lease=600.0, beat=0.1)
    lock.take(said.append)
    assert time.monotonic() - started < 2
    assert "which is gone; taking over" in said[0]
    lock.release()
    assert not (tmp_path / "lock").exists()


def test_a_silent_owner_of_another_machine_loses_it_after_the_lease(tmp_path: Path) -> None:
    holder = hold(tmp_path / "lock")
    holder.kill()
    holder.wait()
    elsewhere(tmp_path / "lock")
    started, lock = time.monotonic(), RunLock(tmp_path / "lock", lease=1.0, beat=0.1)
    lock.take()
    assert time.monotonic() - started >= 1.0
    lock.release()


def test_a_requeued_job_takes_its_own_lock_back(tmp_path: Path) -> None:
    holder = hold(tmp_path / "lock", SLURM_JOB_ID="17")
    holder.kill()
    holder.wait()
    elsewhere(tmp_path / "lock")
    os.environ.update(SLURM_JOB_ID="17", SLURM_RESTART_COUNT="1")
    try:
        started, lock = time.monotonic(), RunLock(tmp_path / "lock", lease=600.0, beat=0.1)
        lock.take()
        assert time.monotonic() - started < 2
        lock.release()
    finally:
        del os.environ["SLURM_JOB_ID"], os.environ["SLURM_RESTART_COUNT"]


def test_of_many_that_want_a_dead_owners_lock_one_gets_it(tmp_path: Path) -> None:
    holder = hold(tmp_path / "lock")
    holder.kill()
    holder.wait()
    contenders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "lock")],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + 30
        while sum(c.poll() is None for c in contenders) > 1 and time.monotonic() < deadline:
            time.sleep(0.1)
        living = [c for c in contenders if c.poll() is None]
        assert len(living) == 1
        assert json.loads((tmp_path / "lock").read_text())["pid"] == living[0].pid
    finally:
        for contender in contenders:
            contender.kill()


def test_an_owner_that_lost_its_lock_hears_of_it(tmp_path: Path) -> None:
    """A process that slept through its lease must not write on."""
    holder = hold(tmp_path / "other")
    holder.kill()
    holder.wait()
    heard: queue.Queue[str] = queue.Queue()
    lock = RunLock(tmp_path / "lock", lease=600.0, beat=0.1, lost=heard.put)
    lock.take()
    (tmp_path / "other").replace(tmp_path / "lock")
    assert f"now belongs to process {holder.pid}" in heard.get(timeout=60)
    lock.release()
    assert (tmp_path / "lock").exists(), "the other's lock stays"


def test_an_owner_whose_lock_is_removed_hears_of_it(tmp_path: Path) -> None:
    heard: queue.Queue[str] = queue.Queue()
    lock = RunLock(tmp_path / "lock", lease=600.0, beat=0.1, lost=heard.put)
    lock.take()
    (tmp_path / "lock").unlink()
    assert f"{tmp_path}/lock is gone: " in heard.get(timeout=60)
    lock.release()
