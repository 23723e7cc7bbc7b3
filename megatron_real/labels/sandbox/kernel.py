"""The calls of the Linux kernel that build a sandbox and that Python does not have, by ctypes.

Each function raises OSError with the kernel's reason. Constants are those of the headers named
beside them.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path

# linux/sched.h
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

# sys/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
_MNT_DETACH = 2

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_SECCOMP = 22
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2

# Numbers of newer system calls are the same on every architecture (asm-generic/unistd.h).
_MOUNT_SETATTR = 442
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_ADD_RULE = 445
_LANDLOCK_RESTRICT_SELF = 446
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000

# linux/landlock.h: rights over files by the version of the interface that knows them.
_LANDLOCK_EXECUTE = 1
_LANDLOCK_WRITE_FILE = 2
_LANDLOCK_READ_FILE = 4
_LANDLOCK_READ_DIR = 8
_LANDLOCK_FILE_RIGHTS = {1: (1 << 13) - 1, 2: 1 << 13, 3: 1 << 14, 5: 1 << 15}
_LANDLOCK_TCP_RIGHTS = {4: 0b11}
_LANDLOCK_SCOPES = {6: 0b11}  # no abstract Unix sockets and no signals to processes outside
_LANDLOCK_VERSION_QUERY = 1
_LANDLOCK_PATH_BENEATH = 1

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> int:
    """Returns the result of a call.

    Raises:
        OSError: it is negative; with the kernel's reason.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """Gives this process (for CLONE_NEWPID: its next children) namespaces of its own."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Calls mount(2)."""
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
    result = _libc.mount(*encoded, ctypes.c_ulong(flags), data.encode() or None)
    _check(result, f"mount on {target}")


def make_read_only(target: str) -> None:
    """Makes the mount at `target` and all below it read-only.

    Devices and set-user-id programs on it have no effect from then on.
    """
    attributes = struct.pack("=QQQQ", MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    try:
        _check(
            _libc.syscall(
                _MOUNT_SETATTR,
                _AT_FDCWD,
                os.fsencode(target),
                _AT_RECURSIVE,
                attributes,
                ctypes.c_size_t(len(attributes)),
            ),
            "mount_setattr",
        )
    except OSError:
        # Before Linux 5.12. A user namespace may not clear flags of the mount, so the present ones
        # are repeated; 0x1C00 are those of access times.
        present = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC | 0x1C00)
        mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | present)


def change_root(root: str) -> None:
    """Makes the mount at `root` this namespace's root and lets go of the old one."""
    os.chdir(root)
    # The old root lands on top of the new one, so that no folder is needed for it.
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir("/")


def drop_capabilities() -> None:
    """Takes every capability from this process."""
    version_3 = struct.pack("=Ii", 0x20080522, 0)
    _check(_libc.capset(version_3, bytes(24)), "capset")


def die_with_parent(signal_number: int) -> None:
    """Has the kernel send the signal to this process when the thread that started it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal_number)


def adopt_orphans() -> None:
    """Makes this process the parent of every descendant whose own parent ends."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def hide_memory() -> None:
    """Closes this process's memory to other processes of its user."""
    _prctl(_PR_SET_DUMPABLE, 0)


def give_up_new_privileges() -> None:
    """Bars this process and its children from gaining privileges; filters ask for it."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def load_filter(program: bytes) -> None:
    """Installs a seccomp filter: instructions of linux/filter.h, 8 bytes each."""
    instructions = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(instructions))
    _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header)


def _prctl(option: int, first: int | bytes, second: bytes | None = None) -> None:
    argument = ctypes.c_ulong(first) if isinstance(first, int) else first
    _check(_libc.prctl(option, argument, second or ctypes.c_ulong(0), 0, 0), f"prctl {option}")


def landlock_version() -> int:
    """Returns the version of Landlock's interface.

    0 where the kernel does not have it or has it switched off.
    """
    version = _libc.syscall(
        _LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), _LANDLOCK_VERSION_QUERY
    )
    return max(int(version), 0)


def restrict_files(readable: Sequence[str], *, writable: Sequence[str]) -> None:
    """Puts this process under Landlock, for good.

    From here on files can be read below `readable` only, and only the devices `writable` can be
    written. Where the kernel's version knows them, TCP, abstract Unix sockets and signals to
    processes outside are barred too. Paths that are not there are passed over.

    `give_up_new_privileges` has to come first.
    """
    version = landlock_version()

    def rights(by_version: dict[int, int]) -> int:
        return sum(bits for since, bits in by_version.items() if since <= version)

    attributes = struct.pack(
        "=QQQ",
        rights(_LANDLOCK_FILE_RIGHTS),
        rights(_LANDLOCK_TCP_RIGHTS),
        rights(_LANDLOCK_SCOPES),
    )
    # Older kernels take a shorter record and no fields that they do not know.
    if version < 4:
        size = 8
    elif version < 6:
        size = 16
    else:
        size = 24
    ruleset = _check(
        _libc.syscall(_LANDLOCK_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0),
        "landlock_create_ruleset",
    )

    for path in (*readable, *writable):
        try:
            file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        allowed = _LANDLOCK_READ_FILE
        if Path(path).is_dir():
            allowed |= _LANDLOCK_READ_DIR | _LANDLOCK_EXECUTE
        elif path in writable:
            allowed |= _LANDLOCK_WRITE_FILE
        rule = struct.pack("=Qi", allowed, file)
        _check(
            _libc.syscall(_LANDLOCK_ADD_RULE, ruleset, _LANDLOCK_PATH_BENEATH, rule, 0),
            "landlock_add_rule",
        )
        os.close(file)

    _check(_libc.syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)
