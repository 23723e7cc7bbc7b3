"""The lock of a run directory, with real processes as its owners."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_real.runs.lock import Owner, RunLock
from tests.faults.lock import HOLDER, last


@contextmanager
def held(folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Starts another process that holds the lock."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), "600"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()


def dead_owner(folder: Path, **changes: object) -> None:
    """Leaves a lock whose owner was killed; `changes` make a newcomer take the owner for another
    machine's.
    """
    with held(folder):
        pass
    file = last(folder)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def newcomer(folder: Path, *, lease: float = 600.0) -> RunLock:
    return RunLock(folder, lease=lease, beat=0.1)


def test_a_living_owner_is_respected(tmp_path: Path) -> None:
    with (
        held(tmp_path / "owners") as holder,
        pytest.raises(ValueError, match=rf"is in use by process {holder.pid} on "),
    ):
        newcomer(tmp_path / "owners").take()


def test_a_lock_goes_from_one_owner_to_the_next(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        lock = newcomer(tmp_path / "owners")
        messages: list[str] = []
        lock.take(messages.append)
        assert last(tmp_path / "owners").name == str(number) and not messages
        lock.release()
    assert [json.loads(file.read_text())["ended"] for file in (tmp_path / "owners").iterdir()] == [
        True
    ] * 3


def test_a_dead_owner_of_this_machine_is_seen_at_once(tmp_path: Path) -> None:
    dead_owner(tmp_path / "owners")
    lock = newcomer(tmp_path / "owners")
    messages: list[str] = []
    lock.take(messages.append)
    assert "which is gone; taking over" in messages[0]
    lock.release()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"host": "another-machine"}, id="another machine"),
        pytest.param({"boot": "of a clone"}, id="another machine of the same name"),
        pytest.param({"namespaces": "pid:[1] time:[1]"}, id="another container of this machine"),
        pytest.param({"namespaces": ""}, id="a container that does not know its own"),
    ],
)
def test_a_process_table_says_nothing_about_processes_elsewhere(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    """The owner's number is not in this process table, yet it may be alive elsewhere: the lease
    decides.
    """
    dead_owner(tmp_path / "owners", **changes)
    # A lease of 600 s is usual; this test waits for it to end.
    lock = newcomer(tmp_path / "owners", lease=0.5)
    messages: list[str] = []
    lock.take(messages.append)
    assert "waiting up to 0.5 s" in messages[0] and "no sign of life for 0.5 s" in messages[1]
    lock.release()


def test_a_requeued_job_takes_its_own_lock_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead_owner(tmp_path / "owners", host="another-machine", job="17", cluster="one")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    owner, _ = newcomer(tmp_path / "owners")._read(1)
    for cluster, gone in (("one", True), ("another", False)):
        monkeypatch.setenv("SLURM_CLUSTER_NAME", cluster)
        assert owner.is_gone(Owner.of_this_process()) == gone


def test_a_process_that_cannot_be_seen_is_not_taken_for_dead(tmp_path: Path) -> None:
    """/proc may hide the processes of other users, and a foreign file names no owner."""
    me = Owner.of_this_process()
    assert not Owner.parse(me.text()).is_gone(me)
    assert not Owner.parse(json.dumps({**json.loads(me.text()), "started": ""})).is_gone(me)
    for text in ("", "{}", "[]", '{"pid": "7"}', "\x00"):
        assert not Owner.parse(text).is_gone(me)


def test_an_owner_that_lost_its_lock_hears_of_it(tmp_path: Path) -> None:
    """A process that slept through its lease must not write any more."""
    heard: queue.Queue[str] = queue.Queue()
    lock = RunLock(tmp_path / "owners", lease=600.0, beat=0.1, lost=heard.put)
    lock.take()
    dead_owner(tmp_path / "other")
    other = last(tmp_path / "other")
    pid = json.loads(other.read_text())["pid"]
    other.replace(tmp_path / "owners/2")
    assert f"now belongs to process {pid}" in heard.get(timeout=240)
    lock.release()
    assert not json.loads((tmp_path / "owners/2").read_text())["ended"], "the other's lock stays"


def test_an_owner_whose_lock_is_removed_hears_of_it(tmp_path: Path) -> None:
    heard: queue.Queue[str] = queue.Queue()
    lock = RunLock(tmp_path / "owners", lease=600.0, beat=0.1, lost=heard.put)
    lock.take()
    (tmp_path / "owners/1").unlink()
    assert f"{tmp_path}/owners/1 is gone: " in heard.get(timeout=240)
    lock.release()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "owners").touch()
    with pytest.raises(ValueError, match=r"cannot be taken for this run: .*File exists"):
        newcomer(tmp_path / "owners").take()


def test_a_release_that_hangs_does_not_keep_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    works_again = threading.Event()

    def hanging_utime(_: Path) -> None:
        hangs.set()
        works_again.wait(120)

    monkeypatch.setattr("megatron_real.runs.lock._RELEASE_SECONDS", 0.1)
    monkeypatch.setattr(os, "utime", hanging_utime)
    lock = newcomer(tmp_path / "owners")
    lock.take()
    assert hangs.wait(120)
    started = time.monotonic()
    lock.release()
    assert time.monotonic() - started < 30
    works_again.set()
    lock._thread.join()
