"""Building the sandbox around a process, in the order that the kernel asks for.

    supervisor   outside; ends everything below when the worker ends or the trainer does
      init       on the rung `namespaces`: first of its process namespace; every process in there
                 ends with it
        worker   loads the verifier, then goes behind the walls for good
          child  one clean copy of the worker for one check that runs text, behind stricter walls

The supervisor calls `separate`, the worker `enclose`, a child `confine_judged_code`.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import signal
import stat
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_real.labels.sandbox import calls, kernel
from megatron_real.labels.sandbox.rung import Rung

_NAMESPACES = kernel.CLONE_NEWPID | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
_NEW_ROOT = "/proc"  # is everywhere, and nothing that a worker reads later lies below it
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_SYSTEM = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/etc/ld.so.cache",
    "/etc/localtime", "/usr/share/zoneinfo",
)  # fmt: skip

# A user id for each worker that no account has, so that its limit on threads is its own (and real
# root has none).
_FIRST_USER = 0x70000000
_THREADS = 256
_OPEN_FILES = 64


@dataclass(frozen=True)
class Outside:
    """What the supervisor knows of the node and a worker cannot find out from inside."""

    number: int
    """The supervisor's process id: no other worker of this node has it."""
    max_threads: int
    """A limit on the user's threads that leaves judged code some of them; 0: the kernel would not
    enforce any."""
    separate: bool
    """Whether the worker has namespaces of its own."""
    why: str
    """Why it has none; else empty."""


@dataclass(frozen=True)
class Walls:
    """What a worker is behind, and what its children are put behind."""

    rung: Rung
    """The rung that was reached."""
    why: str
    """Why the rung is no higher; empty on the first."""
    judged_filter: bytes
    """seccomp instructions for judged code; empty on the rung `limits`."""
    max_threads: int
    """As in Outside; on the upper rungs 0 forbids judged code to start any."""


NO_WALLS = Walls(Rung.LIMITS, "labels.sandbox is off", b"", 0)


def separate(*, wanted: bool = True) -> Outside:
    """Puts this process's next child into namespaces of its own, where the node allows it.

    As root it does without a user namespace, so that the worker can become a user whom nobody else
    is.
    """
    number = os.getpid()
    max_threads = _user_threads()
    if not wanted:
        return Outside(number, max_threads, False, "namespaces are not wanted")

    user = 0 if os.geteuid() == 0 else kernel.CLONE_NEWUSER
    error = _failure(_NAMESPACES | user)
    if error and not user:  # root of a container without CAP_SYS_ADMIN: like any other user
        user = kernel.CLONE_NEWUSER
        error = _failure(_NAMESPACES | user)
    if error:
        return Outside(number, max_threads, False, f"namespaces are not allowed ({error})")
    _unshare(_NAMESPACES | user)
    return Outside(number, max_threads, True, "")


def enclose(outside: Outside, readable: Sequence[str], *, landlock: bool = True) -> Walls:
    """Puts this process behind the highest walls that the node allows, for good.

    Args:
        readable: files and folders beyond the interpreter's that it must be able to read.
        landlock: use Landlock where the kernel has it.

    Raises:
        OSError: the kernel refused a wall that it had seemed to allow: this process must not go on.
    """
    if not calls.available():
        return Walls(Rung.LIMITS, "libseccomp.so.2 is not installed", b"", outside.max_threads)
    has_landlock = landlock and kernel.landlock_version() > 0
    if not outside.separate and not has_landlock:
        why = f"{outside.why}, and the kernel has no Landlock"
        return Walls(Rung.LIMITS, why, b"", outside.max_threads)

    # The order must not change: mounting a root takes capabilities, so they are dropped after it,
    # and Landlock and filters ask for a process that can gain no privileges.
    paths = [*_readable_paths(), *readable]
    if outside.separate:
        kernel.unshare(kernel.CLONE_NEWNS)
        _build_root(_NEW_ROOT, paths)
        kernel.change_root(_NEW_ROOT)
        paths = ["/"]
    max_threads = outside.max_threads
    if os.geteuid() == 0 and max_threads == 0:
        max_threads = _become_nobody(outside.number, [os.__file__, __file__, *readable])
    kernel.drop_capabilities()
    kernel.hide_memory()
    kernel.give_up_new_privileges()
    if has_landlock:
        kernel.restrict_files([*paths, *_DEVICES], writable=["/dev/null", "/dev/zero"])

    # libseccomp is read from disk here, and the filter bars nothing that a fork needs.
    judged_filter = calls.judged_filter(threads=max_threads > 0)
    kernel.load_filter(calls.worker_filter())
    rung = Rung.NAMESPACES if outside.separate else Rung.LANDLOCK
    return Walls(rung, outside.why, judged_filter, max_threads)


def confine_judged_code(walls: Walls, *, processor_seconds: int, memory: int | None) -> None:
    """Puts this process, a child of a worker, behind the walls for judged code.

    That is code that a completion may control. The process has no descriptor of the worker by then:
    that is the caller's to see to.

    Args:
        walls: what the worker is behind.
        processor_seconds: processor time after which the kernel kills it.
        memory: bytes of address space; None keeps the worker's limit.
    """
    seconds = (processor_seconds, processor_seconds)
    resource.setrlimit(resource.RLIMIT_CPU, seconds)
    for limit, value in (
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
    ):
        resource.setrlimit(limit, (value, value))
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    if walls.max_threads > 0:
        _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        most = walls.max_threads
        if hard >= 0:  # negative: there is none
            most = min(most, hard)
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    if walls.judged_filter:
        kernel.load_filter(walls.judged_filter)


def home_directories() -> list[Path]:
    """Returns the folders in which this user's keys are.

    These are what the variable HOME says, which containers set anew, and the account's own.
    """
    homes: list[str] = []
    if os.environ.get("HOME"):
        homes.append(os.environ["HOME"])
    with contextlib.suppress(KeyError):  # a container's user may have no account
        homes.append(pwd.getpwuid(os.getuid()).pw_dir)
    return [Path(home).resolve() for home in homes or ["/"]]


def _readable_paths() -> list[str]:
    """Returns the paths that a worker may read.

    These are what the interpreter and this package's own modules are made of, and the folders of
    sys.path and LD_LIBRARY_PATH that hold modules or libraries only.

    A folder is left out that anyone may write to, as /tmp, or that has the working directory, the
    home directory or the checkout of this package in it: there is more in there. So is one that is
    not absolute: it would not be mounted below the new root but beside it.
    """
    package = Path(__file__).resolve().parents[2]
    interpreter = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib")}
    interpreter |= {f"{prefix}/lib" for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    private = [*home_directories(), Path.cwd(), package.parent]

    def holds_code_only(path: str) -> bool:
        folder = Path(path).resolve()
        # Unlike Path.exists, this is False too for what this user may not look at.
        if not os.path.isabs(path) or not os.path.exists(folder):
            return False
        if any(folder == other or folder in other.parents for other in private):
            return False
        return not folder.stat().st_mode & stat.S_IWOTH

    searched = [*sys.path, *os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)]
    code = [path for path in searched if holds_code_only(path)]
    paths = [*_SYSTEM, *sorted(interpreter), *code, str(package)]
    return [path for path in dict.fromkeys(paths) if os.path.exists(path)]


def _build_root(root: str, paths: Sequence[str]) -> None:
    """Mounts at `root` a small file system that shows `paths`, read-only, and a few devices."""
    # Private first: no mount below is to appear in the node's own namespace.
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    options = "mode=755,size=1m,nr_inodes=4096"
    kernel.mount("tmpfs", root, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, options)

    shown: list[Path] = []
    # Shorter paths first: what lies below a folder that is shown already needs no mount of its own.
    for path in sorted({*paths, *_DEVICES}, key=len):
        source = Path(path)
        if any(other in source.parents or other == source for other in shown):
            continue
        target = f"{root}{path}"
        if source.is_dir():
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            Path(target).touch()
        kernel.mount(path, target, None, kernel.MS_BIND | kernel.MS_REC)
        if path not in _DEVICES:
            kernel.make_read_only(target)
        shown.append(source)

    kernel.mount(None, root, None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY)


def _user_threads() -> int:
    """Returns a limit on the threads of this user that leaves judged code `_THREADS` of them.

    0 where none would hold. Newer kernels count within the user namespace, older ones everything
    that the user runs, so that is added.
    """
    # The kernel does not limit real root; user 0 in here may be another user of the machine.
    if os.geteuid() == 0:
        uid_map = Path("/proc/self/uid_map").read_text().split()
        if uid_map[:2] == ["0", "0"]:
            return 0

    present = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                present += len(os.listdir(f"{entry.path}/task"))
        except OSError:
            continue  # it ended meanwhile
    return present + _THREADS


def _become_nobody(number: int, needed: Sequence[str]) -> int:
    """Gives this process, which real root runs, a user id of its own.

    Only if such a user can read `needed`: that is tried in a child.

    Returns:
        The limit on threads; 0 where this process stays root.
    """
    user = _FIRST_USER + number % 0x8000000

    def change_user() -> None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            change_user()
            code = 0 if all(os.access(path, os.R_OK) for path in needed) else 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status != 0:  # without CAP_SETUID, or root keeps its files to itself
        return 0

    change_user()
    kernel.die_with_parent(signal.SIGKILL)  # a change of user undoes it
    return _THREADS


def _failure(flags: int) -> str:
    """Tries in a child whether a process may have namespaces and a root of its own.

    Returns:
        Why not; empty if it may.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _unshare(flags | kernel.CLONE_NEWNS)
            _build_root(_NEW_ROOT, [])
        except OSError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)

    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        why = pipe.read()
    os.waitpid(child, 0)
    return why


def _unshare(flags: int) -> None:
    """Gives this process namespaces; in a user namespace it stays the user that it is."""
    user = os.geteuid()
    group = os.getegid()
    kernel.unshare(flags)
    if flags & kernel.CLONE_NEWUSER:
        # The kernel asks for this before it takes a map of groups from an ordinary user.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
