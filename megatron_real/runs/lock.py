"""A run directory belongs to one run at a time, and a dead owner does not hold it for ever.

    owners/1     process 77 on n1, ended
    owners/2     process 12 on n2, gone: it has not touched this file for LEASE_SECONDS
    owners/3     process 31 on n3: the owner, which touches this file every few seconds

The process that made the last file owns the directory. Whoever finds that owner dead makes the next
file, by link(2), which succeeds for one of all who try it, on NFS too. No name is ever used twice:
nobody can take away by mistake the lock of somebody who was quicker, however late it wakes up. No
locks of the file system are needed, which NFS and Lustre have only where they are set up, and no
clocks of two machines are compared: a newcomer counts the lease by its own.

An owner is dead at once where this machine's process table says so, and when the same Slurm job was
started again. The table says nothing about a process of another machine, of another boot, or of
another container on the same machine.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LEASE_SECONDS = 60.0
"""An owner that has not touched its file for so long is dead."""
# Several touches in a lease, so that one of them may fail or come late.
_BEAT_SECONDS = 10.0
_RELEASE_SECONDS = 5.0
"""How long the end waits for the thread, at most: its file system may hang."""


@dataclass(frozen=True)
class Owner:
    """Who made a file of the lock. All fields are empty for a file that no run has written."""

    token: str = ""
    """Unique to one attempt to take a directory."""
    host: str = ""
    boot: str = ""
    """Identifier of the running kernel: two machines of the same name differ in it."""
    namespaces: str = ""
    """The process table in which the number below counts; "" where that is not known."""
    pid: int = 0
    started: str = ""
    """When the process started, in clock ticks since boot: its number alone is given out again."""
    cluster: str = ""
    job: str = ""
    """Slurm's number of the job."""
    restarts: int = 0
    """How often Slurm has started the job again."""
    ended: bool = False
    """Whether it has given the directory back, or another has taken it."""

    @classmethod
    def of_this_process(cls) -> Owner:
        """Returns this process, with a new token."""
        namespaces = ""
        # Elsewhere this /proc is of another namespace than the process, and says nothing of it.
        if _link("/proc/self") == str(os.getpid()):
            kinds = ("pid", "time")  # a start time counts from the boot of its own time namespace
            namespaces = " ".join(_link(f"/proc/self/ns/{kind}") for kind in kinds)
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=_first_line("/proc/sys/kernel/random/boot_id"),
            namespaces=namespaces,
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            cluster=os.environ.get("SLURM_CLUSTER_NAME", ""),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0),
        )

    @classmethod
    def parse(cls, text: str) -> Owner:
        """Returns the owner that a file's text names; an empty one where it names none."""
        values: Any
        try:
            values = json.loads(text)
        except ValueError:
            return cls()
        if not isinstance(values, dict):
            return cls()

        # A file of another version may have other fields: what does not fit is left out.
        kinds = {field.name: type(field.default) for field in fields(cls)}
        fitting: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, kinds.get(name, ())):
                fitting[name] = value
        return cls(**fitting)

    def text(self, *, ended: bool = False) -> str:
        """Returns the text that `parse` reads."""
        return json.dumps(asdict(self) | {"ended": ended}) + "\n"

    def is_gone(self, newcomer: Owner) -> bool:
        """Returns whether this owner certainly runs no more, as seen on the newcomer's machine."""
        same_job = self.job and (self.cluster, self.job) == (newcomer.cluster, newcomer.job)
        if same_job and self.restarts < newcomer.restarts:
            # Slurm ends a job before it starts it again.
            return True

        # A process number says something in its own process table alone.
        table = (self.host, self.boot, self.namespaces)
        same_table = table == (newcomer.host, newcomer.boot, newcomer.namespaces) and all(table)
        return same_table and not _runs(self.pid, self.started)

    def __str__(self) -> str:
        job = f" (Slurm job {self.job})" if self.job else ""
        return f"process {self.pid or '?'} on {self.host or '?'}{job}"


class RunLock:
    """Holds a run directory.

    Example:
        lock = RunLock(Path("runs/first/owners"))
        lock.take()
        ...
        lock.release()
    """

    def __init__(
        self,
        folder: Path,
        *,
        lease: float = LEASE_SECONDS,
        beat: float = _BEAT_SECONDS,
        lost: Callable[[str], None] | None = None,
    ) -> None:
        """
        Args:
            folder: of the lock's files; it is made where it is missing.
            lease: seconds without a touch after which an owner is dead.
            beat: seconds between two touches.
            lost: called with a sentence when another run has taken the directory although this one
                lives. Default: ends the process.
        """
        self.folder = folder
        self.lease = lease
        self.beat = beat
        self._lost = lost or _end_process
        self._me = Owner.of_this_process()
        self._number = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)

    def take(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Takes the directory, after waiting up to the lease if its owner may be alive.

        Args:
            say: called with a sentence about an owner that is gone, or waited for.

        Raises:
            ValueError: another run is using it, which is named; or the directory cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A listing may lack the newest names, as NFS caches it. So it only says where to begin.
            numbers = [int(name) for name in os.listdir(self.folder) if name.isdecimal()]
            number = max(numbers, default=1)
            # Numbers only grow: either this process makes the file, or its owner is dead and the
            # next is tried.
            while not self._make(number):
                owner, touched = self._read(number)
                if not owner.ended:
                    self._wait_until_dead(number, owner, touched, say)
                number += 1
        except OSError as error:
            raise ValueError(
                f"{self.folder.parent} cannot be taken for this run: {error}; "
                "give a trainer.run_dir where this user may make files and links"
            ) from error

        # This process's from here on. The file before it may still say that its owner lives.
        self._number = number
        self._mark_ended(number - 1)
        self._thread.start()

    def release(self) -> None:
        """Gives the directory back."""
        # The thread first: it would take the file that is marked below for that of
        # a lost directory.
        self._done.set()
        if self._thread.is_alive():
            self._thread.join(_RELEASE_SECONDS)
        if self._number:
            self._mark_ended(self._number, only=self._me)

    def _make(self, number: int) -> bool:
        """Makes a file with its content in one step; returns False if it exists."""
        aside = self._aside(self._me.text())
        try:
            # With its content at once: a file that is made empty first would name nobody for a
            # moment.
            os.link(aside, self._file(number))
        except FileExistsError:
            # NFS says this of a link that it has made, where its first answer was lost.
            return self._read(number)[0] == self._me
        finally:
            aside.unlink()
        return True

    def _wait_until_dead(
        self, number: int, owner: Owner, touched: int, say: Callable[[str], None]
    ) -> None:
        """Returns once the owner of a file is dead.

        Raises:
            ValueError: it lives.
        """
        where = self.folder.parent
        if owner.is_gone(self._me):
            say(f"{where} was left locked by {owner}, which is gone; taking over")
            return

        say(f"{where} is locked by {owner}; waiting up to {self.lease:g} s for a sign of life")
        ends = time.monotonic() + self.lease
        while time.monotonic() < ends:
            # Several looks between two touches of the owner.
            time.sleep(min(self.beat / 4, 1.0))
            now, touched_now = self._read(number)
            if now.ended:
                return
            if touched_now != touched:
                raise ValueError(
                    f"{where} is in use by {now}; wait until that run ends, or give another "
                    "trainer.run_dir"
                )
        say(f"{owner} has given no sign of life for {self.lease:g} s; taking over")

    def _mark_ended(self, number: int, *, only: Owner | None = None) -> None:
        """Writes into a file that its owner is none any more.

        Args:
            number: of the file.
            only: the owner that the file must name; None for any.
        """
        try:
            owner, _ = self._read(number)
            # Only the own file, where `only` says so: a successor's must not be marked as ended.
            if not owner.ended and only in (None, owner):
                # Replaced as a whole: a reader never sees half of an owner.
                self._aside(owner.text(ended=True)).replace(self._file(number))
        except OSError as error:
            # The next run comes to know by itself, only later.
            logger.warning("%s could not be written: %s", self._file(number), error)

    def _keep(self) -> None:
        """Runs the thread: touches the file, and calls `lost` where the directory is another's."""
        trouble = False
        while not self._done.wait(self.beat):
            try:
                sentence = self._touch()
            except OSError as error:
                # A full disk, a file server that restarts: it may pass, and is told once.
                if not trouble:
                    logger.warning(
                        "the run's lock cannot be touched (%s); trying again every %g s. "
                        "After %g s without success another run may take the directory",
                        error,
                        self.beat,
                        self.lease,
                    )
                trouble = True
                continue

            if sentence:
                self._lost(sentence)
                return

            if trouble:
                logger.warning("the run's lock is touched again")
            trouble = False

    def _touch(self) -> str:
        """Touches the file.

        Returns:
            "", or why it is too late: somebody has taken the directory, or removed the file.
        """
        file = self._file(self._number)
        if not file.exists():
            return (
                f"{file} is gone: somebody has removed it, and another run may take the directory"
            )

        following = self._file(self._number + 1)
        if self._read(self._number)[0] != self._me or following.exists():
            successor, _ = self._read(self._number + 1)
            return (
                f"{self.folder.parent} now belongs to {successor}: this run was silent for more "
                f"than {self.lease:g} s and another has taken its directory"
            )

        # It needs no space, so that a full disk does not look like a dead owner.
        os.utime(file)
        return ""

    def _read(self, number: int) -> tuple[Owner, int]:
        """Returns the owner that a file names, and when it was touched last (ns).

        Where the file is missing, the owner is one that has ended.
        """
        try:
            # What an open file says of itself is the server's word, not NFS's cache.
            with self._file(number).open(encoding="utf-8", errors="replace") as file:
                return Owner.parse(file.read()), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return Owner(ended=True), 0

    def _aside(self, text: str) -> Path:
        aside = self.folder / f"{self._me.token}.new"
        aside.write_text(text, encoding="utf-8")
        return aside

    def _file(self, number: int) -> Path:
        return self.folder / str(number)


def _runs(pid: int, started: str) -> bool:
    """Returns whether that very process runs; True also where it cannot be known."""
    try:
        # Signal 0 asks whether the process is there and does nothing to it.
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        # It is another user's, whose start this one may not see.
        pass

    # The number may have been given out again, to a process that started later.
    present_start = _start_of(pid)
    # Where a start is unknown, the number has to do.
    if not started or not present_start:
        return True

    return present_start == started


def _start_of(pid: int) -> str:
    """Returns when a process started, in clock ticks since boot.

    "ended" if it only waits to be collected by its parent; "" if unknown.
    """
    # The name in parentheses may hold blanks and parentheses itself: what counts is after the last.
    fields_after_name = _first_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    # The first after the name is field 3 of proc(5), the state; so number 19 is
    # field 22, `starttime`.
    if len(fields_after_name) <= 19:
        return ""
    # Z is a zombie, X a dead process.
    if fields_after_name[0] in "ZX":
        return "ended"
    return fields_after_name[19]


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return ""


def _end_process(sentence: str) -> None:
    os.write(2, f"megatron-real: {sentence}\n".encode())
    # Not sys.exit, which would end this thread alone.
    os._exit(1)
