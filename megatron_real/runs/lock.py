"""A run directory belongs to one run at a time, and a dead owner does not hold it for ever.

The lock is a file whose owner rewrites it every few seconds. It is free when its owner's process is gone (seen at once
on the same machine, or when the same Slurm job was requeued), or when the file has not changed for LEASE_SECONDS as the
newcomer's own clock counts them: no clocks of two machines are compared, and no lock of the file system is needed.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

LEASE_SECONDS = 60.0
"""A lock that nobody rewrote for so long is free."""
_BEAT_SECONDS = 10.0


class RunLock:
    """Holds a run directory.

    Example:
        lock = RunLock(Path("runs/first/lock"))
        lock.take()
        ...
        lock.release()
    """

    def __init__(
        self,
        file: Path,
        *,
        lease: float = LEASE_SECONDS,
        beat: float = _BEAT_SECONDS,
        lost: Callable[[str], None] | None = None,
    ) -> None:
        """`lost` is called with a sentence when another run has taken the directory although this one lives."""
        self.file, self.lease, self.beat = file, lease, beat
        self._lost = lost or _end_process
        self._me = {**_identity(), "token": uuid.uuid4().hex}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)

    def take(self, say: Callable[[str], None] = lambda _: None) -> None:
        """Takes the directory, waiting up to the lease where it is not clear that its owner is dead.

        Raises:
            ValueError: another run is using it; says which.
        """
        self.file.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            owner = self._read()
            if owner is not None:
                self._wait_until_dead(owner, say)
                self._remove(owner)
        self._thread.start()

    def release(self) -> None:
        """Gives the directory back."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        if _token(self._read()) == self._me["token"]:
            self.file.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Makes the file with its content in one step: a link to an existing name fails."""
        mine = self._write_aside()
        try:
            os.link(mine, self.file)
        except FileExistsError:
            return False
        finally:
            mine.unlink()
        return True

    def _wait_until_dead(self, owner: Mapping[str, Any], say: Callable[[str], None]) -> None:
        if _is_gone(owner, self._me):
            say(f"{self.file.parent} was left locked by {_described(owner)}, which is gone; taking over")
            return
        say(f"{self.file.parent} is locked by {_described(owner)}; waiting up to {self.lease:g} s for a sign of life")
        ends, seen = time.monotonic() + self.lease, owner.get("beat")
        while time.monotonic() < ends:
            time.sleep(min(self.beat / 4, 1.0))
            now = self._read()
            if now is None:
                return
            if now.get("beat") != seen or _token(now) != _token(owner):
                raise ValueError(
                    f"{self.file.parent} is in use by {_described(now)}; wait until that run ends, or give another "
                    "trainer.run_dir"
                )
        say(f"{_described(owner)} has given no sign of life for {self.lease:g} s; taking over")

    def _remove(self, owner: Mapping[str, Any]) -> None:
        """Takes away a dead owner's file. Of several that try it, one succeeds; a lock taken meanwhile is put back."""
        grabbed = self.file.with_name(f"{self.file.name}.{self._me['token']}")
        try:
            self.file.rename(grabbed)
        except FileNotFoundError:
            return
        try:
            if _token(_parse(grabbed)) != _token(owner):
                os.link(grabbed, self.file)
        except FileExistsError:
            pass
        finally:
            grabbed.unlink()

    def _keep(self) -> None:
        while not self._done.wait(self.beat):
            owner = self._read()
            if _token(owner) != self._me["token"]:
                self._lost(
                    f"{self.file} now belongs to {_described(owner)}: this run was silent for more than "
                    f"{self.lease:g} s and another has taken its directory"
                    if owner is not None
                    else f"{self.file} is gone: somebody has removed it, and another run may take the directory"
                )
                return
            self._write_aside().replace(self.file)

    def _write_aside(self) -> Path:
        aside = self.file.with_name(f"{self.file.name}.{self._me['token']}.new")
        aside.write_text(json.dumps({**self._me, "beat": time.time()}), encoding="utf-8")
        return aside

    def _read(self) -> dict[str, Any] | None:
        return _parse(self.file)


def _parse(file: Path) -> dict[str, Any] | None:
    """The owner; None where there is no lock, and {} for a file that no owner of ours has written."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _token(owner: Mapping[str, Any] | None) -> str:
    return str((owner or {}).get("token", ""))


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _first_line("/proc/sys/kernel/random/boot_id"),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0") or 0),
    }


def _is_gone(owner: Mapping[str, Any], me: Mapping[str, Any]) -> bool:
    """It is certain that the owner does not run any more."""
    if not owner:
        return False
    if me["job"] and owner.get("job") == me["job"] and owner.get("restarts", 0) < me["restarts"]:
        return True  # Slurm ends a job before it starts it again
    if owner.get("host") != me["host"]:
        return False
    if owner.get("boot") != me["boot"]:
        return bool(me["boot"])
    return _start_of(int(owner.get("pid", 0))) != owner.get("started")


def _start_of(pid: int) -> str:
    """When a process of this machine started, in clock ticks since boot; "" if there is none."""
    # A number alone says little: it is given out again.
    fields = _first_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return ""


def _described(owner: Mapping[str, Any]) -> str:
    job = f" (Slurm job {owner['job']})" if owner.get("job") else ""
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}{job}"


def _end_process(sentence: str) -> None:
    os.write(2, f"megatron-real: {sentence}\n".encode())
    os._exit(1)
