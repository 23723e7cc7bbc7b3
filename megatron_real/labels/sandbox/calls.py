"""Which system calls are left to a worker and to judged code, as seccomp filters.

libseccomp compiles them. A call that is not left fails with ENOSYS, the answer of a kernel that
does not have it, which the C library copes with. The lists name what a Python interpreter needs to
compute, read files and start threads. What is not in them matters: sockets but for pairs, new
programs, tracing, other processes' memory and priorities, mounts, keys, io_uring, bpf, files in
memory (which no limit of memory counts), and for judged code also new processes and signals of any
kind.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_LIBRARY = "libseccomp.so.2"
_ALLOW = 0x7FFF0000  # seccomp.h: SCMP_ACT_ALLOW
_ENOSYS = 0x00050000 | 38  # SCMP_ACT_ERRNO(ENOSYS)
_MASKED_EQUAL = 7  # SCMP_CMP_MASKED_EQ


@dataclass(frozen=True)
class Where:
    """A condition on one argument of a call: argument & mask == value."""

    argument: int
    """Its position, from 0."""
    value: int
    """What its masked bits have to be."""
    mask: int = (1 << 64) - 1
    """Which bits are compared."""


_FREE_NAMES = """
    read write readv writev pread64 pwrite64 close lseek open openat stat fstat lstat newfstatat
    statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getcwd chdir getdents
    getdents64 dup dup2 dup3 pipe pipe2 poll ppoll select pselect6 epoll_create epoll_create1
    epoll_ctl epoll_wait epoll_pwait eventfd2 mmap munmap mremap mprotect madvise brk membarrier
    futex set_robust_list get_robust_list rseq set_tid_address arch_prctl sched_yield
    sched_getaffinity sched_getparam sched_getscheduler getcpu exit exit_group restart_syscall
    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack
    pause setitimer getitimer alarm clock_gettime clock_getres clock_nanosleep nanosleep
    gettimeofday time times getrusage getrlimit setrlimit getrandom sysinfo uname umask fadvise64
    getpid gettid getppid getuid geteuid getgid getegid getgroups getresuid getresgid getpgrp
    getpgid getsid sendto recvfrom sendmsg recvmsg shutdown getsockopt getsockname getpeername
"""

_CONDITIONAL: Mapping[str, Sequence[Where]] = {
    # Duplicates, flags and the size of a pipe; not F_SETOWN or F_SETSIG, which send signals to
    # anyone.
    "fcntl": [Where(1, command) for command in (0, 1, 2, 3, 4, 1030, 1032)],
    # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: what the interpreter asks of a new
    # file.
    "ioctl": [Where(1, request) for request in (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)],
    "prlimit64": [Where(0, 0)],  # of this process
}
_PAIR_OF_STREAMS = (Where(0, 1), Where(1, 1, 0xF))  # a datagram socket could still write to others
# CLONE_THREAD, and what a thread shares: with a table of files of its own it would have 64 more,
# each with a buffer in the kernel that no limit of memory counts. CLONE_VM, FS, FILES, SIGHAND.
_THREAD = Where(0, 0x10F00, 0x10F00)
_PRCTL = [Where(0, option) for option in (3, 15, 16, 0x53564D41)]  # own name, names of memory
_WORKER_NAMES = """
    clone fork vfork wait4 waitid kill tkill tgkill prctl seccomp setsid setpgid close_range unlink
    landlock_create_ruleset landlock_add_rule landlock_restrict_self setsockopt
"""


def available() -> bool:
    """Returns whether libseccomp is installed."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return False
    return True


def worker_filter() -> bytes:
    """Returns the filter of a worker, which starts clean children, but no other programs."""
    return _compiled(threads=True, extra=_WORKER_NAMES.split())


def judged_filter(*, threads: bool) -> bytes:
    """Returns the filter of code that a completion may control.

    It allows no new process, no signal and no new program.

    Args:
        threads: it may start threads; their number is limited elsewhere (RLIMIT_NPROC).
    """
    return _compiled(threads=threads, extra=())


class _Comparison(ctypes.Structure):
    """struct scmp_arg_cmp of seccomp.h."""

    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operation", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def _compiled(*, threads: bool, extra: Sequence[str]) -> bytes:
    """Returns the instructions of a filter.

    Args:
        threads: threads may be started.
        extra: calls that are allowed beside `_FREE_NAMES`, whatever their arguments.

    Raises:
        OSError: the library refuses a rule or the filter.
    """
    library = ctypes.CDLL(_LIBRARY, use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p,
    ]  # fmt: skip
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    context = library.seccomp_init(_ENOSYS)

    def allow(name: str, *conditions: Where) -> None:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number < 0:  # this architecture, or this version of the library, does not know it
            return
        comparisons = (_Comparison * len(conditions))()
        for i, where in enumerate(conditions):
            comparisons[i] = _Comparison(where.argument, _MASKED_EQUAL, where.mask, where.value)
        error = library.seccomp_rule_add_array(
            context, _ALLOW, number, len(conditions), comparisons
        )
        if error:
            raise OSError(-error, f"seccomp rule for {name}: {os.strerror(-error)}")

    for name in (*_FREE_NAMES.split(), *extra):
        allow(name)

    # Several rules for one call are alternatives: one of them has to hold.
    conditional = dict(_CONDITIONAL)
    if "prctl" not in extra:
        conditional["prctl"] = _PRCTL
    if threads and "clone" not in extra:
        conditional["clone"] = [_THREAD]
    for name, alternatives in conditional.items():
        for where in alternatives:
            allow(name, where)
    allow("socketpair", *_PAIR_OF_STREAMS)

    # The library writes to a descriptor only; a filter of this size fits a pipe.
    reader, writer = os.pipe()
    try:
        error = library.seccomp_export_bpf(context, writer)
        if error:
            raise OSError(-error, f"seccomp filter: {os.strerror(-error)}")
        os.close(writer)
        with open(reader, "rb", closefd=False) as pipe:
            return pipe.read()
    finally:
        os.close(reader)
        library.seccomp_release(context)
