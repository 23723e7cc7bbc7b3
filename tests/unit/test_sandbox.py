"""Hostile programs and answers, each with its exact outcome, on every rung that this machine's
kernel offers.
"""

from __future__ import annotations

import os
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_real.labels.pool import Check, CheckOutcome, VerifierPool
from megatron_real.labels.sandbox import Rung, this_node

CANARY = f"canary-{uuid.uuid4().hex}"
GOLD = "-".join(["needle", "of", "the", "gold"])
_, WHY = this_node()
UPPER = [Rung.NAMESPACES, Rung.LANDLOCK]


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Puts a secret into the environment, into a file that only this user can read, and into
    /dev/shm.
    """
    file = tmp_path_factory.mktemp("home") / "canary"
    shared = Path("/dev/shm") / CANARY
    file.write_text(CANARY)
    shared.write_text(CANARY)
    os.environ["CANARY_API_KEY"] = CANARY
    yield file
    del os.environ["CANARY_API_KEY"]
    shared.unlink()


@pytest.fixture(scope="module", params=UPPER, ids=lambda rung: rung.value)
def code(request: pytest.FixtureRequest, canary: Path) -> Iterator[VerifierPool]:
    """Makes one worker on one rung."""
    try:
        pool = VerifierPool(
            "code", workers=1, timeout_seconds=60, memory_mib=1024, highest=request.param
        )
    except ValueError as error:
        pytest.skip(f"this kernel does not allow the rung {request.param.value}: {error}")
    with pool:
        if pool.rung is not request.param:
            pytest.skip(f"this kernel does not allow the rung {request.param.value}: {WHY}")
        yield pool


PRELUDE = """
import ctypes, fcntl, gc, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
PARENT, HOME, CANARY = os.getppid(), {home!r}, {canary!r}
def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0: raise OSError(ctypes.get_errno(), "refused")
def attempt():
    {body}
try: attempt()
except BaseException: print("held")
else: print("through")
"""

# Each attempt raises where it is held.
ATTEMPTS = {
    "the key in the environment": "os.environ['CANARY_API_KEY']",
    "any variable with the canary": "next(v for v in os.environ.values() if CANARY in v)",
    "the parent's environment": "open(f'/proc/{PARENT}/environ').read()",
    "the first process's environment": "open('/proc/1/environ').read()",
    "its own environment as it was at exec": "open('/proc/self/environ').read()",
    "a list of processes": "os.listdir('/proc')",
    "the canary in the home directory": "open(HOME).read()",
    "the home directory's list": "os.listdir(os.path.dirname(HOME))",
    "root's files": "open('/root/.profile').read()",
    "the canary in /dev/shm": "open('/dev/shm/' + CANARY).read()",
    "the list of /dev/shm": "os.listdir('/dev/shm')",
    "the accounts": "open('/etc/passwd').read()",
    "the host's name on disk": "open('/etc/hostname').read()",
    "the kernel's log": "open('/dev/kmsg').read(1)",
    "a terminal": "open('/dev/tty').read(1)",
    "a disk": "open('/dev/vda', 'rb').read(1)",
    "a file in /tmp": "open('/tmp/' + CANARY, 'w')",
    "a file in the working directory": "open(CANARY, 'w')",
    "a file in /dev/shm": "open('/dev/shm/x' + CANARY, 'w')",
    "the interpreter's own files": "open(os.__file__, 'a')",
    "a folder": "os.mkdir('/tmp/d' + CANARY)",
    "a symbolic link": "os.symlink('/etc/passwd', '/tmp/l' + CANARY)",
    "a hard link": "os.link(os.__file__, '/tmp/h' + CANARY)",
    "a device": "os.mknod('/tmp/n' + CANARY)",
    "a file removed": "os.unlink(os.__file__)",
    "a file's mode": "os.chmod(os.__file__, 0o777)",
    "a way out through /proc/self/root": "open('/proc/self/root/etc/passwd').read()",
    "a way out through dots": "open('../' * 20 + 'etc/passwd').read()",
    "a way out through a descriptor":
        "open('/proc/self/fd/0').read(); open(f'/proc/{PARENT}/fd/0').read()",
    "another root": "os.chroot('/usr')",
    "a socket": "socket.socket()",
    "a socket of version 6": "socket.socket(socket.AF_INET6)",
    "a Unix socket": "socket.socket(socket.AF_UNIX)",
    "a netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "a datagram pair, to write to others": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "a name server": "socket.gethostbyname('localhost.localdomain.invalid')",
    "a page": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:1', timeout=1)",
    "a fork": "os.fork() or os._exit(0)",
    "a pair of forks": "[os.fork() for _ in range(20)]",
    "a shell": "assert os.system('true') == 0",
    "a program": "subprocess.run(['/bin/true'])",
    "a spawned program": "os.posix_spawn('/bin/true', ['true'], {})",
    "another program in its place": "os.execv('/bin/true', ['true'])",
    "a process pool":
        "import multiprocessing; multiprocessing.get_context('fork').Process(target=print).start()",
    "the parent killed": "os.kill(PARENT, signal.SIGKILL)",
    "the parent probed": "os.kill(PARENT, 0)",
    "the parent stopped": "os.kill(PARENT, signal.SIGSTOP)",
    "everything killed": "os.kill(-1, signal.SIGKILL)",
    "its group killed": "os.killpg(0, signal.SIGTERM)",
    "the parent killed by a descriptor":
        "signal.pidfd_send_signal(os.pidfd_open(PARENT), signal.SIGKILL)",
    "the parent's signals by ownership of a pipe": "fcntl.fcntl(0, fcntl.F_SETOWN, PARENT)",
    "the parent's memory by its file": "open(f'/proc/{PARENT}/mem', 'rb').read(1)",
    "the parent's limits": "resource.prlimit(PARENT, resource.RLIMIT_NOFILE, (1, 1))",
    "the parent's priority": "os.setpriority(os.PRIO_PROCESS, PARENT, 19)",
    "the parent's processors": "os.sched_setaffinity(PARENT, {0})",
    "a higher limit of time": "resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))",
    "a higher limit of memory": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "more memory than the limit": "bytearray(2 << 30)",
    "more threads than the limit": (
        "threading.stack_size(1 << 16); "
        "[threading.Thread(target=time.sleep, args=(30,), daemon=True).start() "
        "for _ in range(1000)]"
    ),
    "more files than the limit": "[os.dup(0) for _ in range(100)]",
    "a file in memory": "os.write(os.memfd_create('x'), bytes(1))",
    "another user": "os.setuid(0) or os.seteuid(0) or open('/etc/shadow')",
    "shared memory": (
        "from multiprocessing.shared_memory import SharedMemory; SharedMemory(create=True, size=64)"
    ),
    "a descriptor of the worker": "next(n for n in range(3, 1024) if os.write(n, b'{}') or True)",
    "the gold in its memory": (
        "needle = '-'.join(['needle', 'of', 'the', 'gold'])\n"
        "    holders = [o for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]\n"
        "    next(v for o in holders for v in (list(o.values()) if isinstance(o, dict) else o) "
        "if isinstance(v, str) and needle in v)"
    ),
    "the gold in its frames": (
        "frame = sys._getframe()\n    while frame:\n"
        "        if '-'.join(['needle', 'of', 'the', 'gold']) in str(frame.f_locals): return\n"
        "        frame = frame.f_back\n    raise LookupError"
    ),
}  # fmt: skip
# Calls that Python has no name for, by their numbers on x86-64.
BY_NUMBER = {
    "fork by its number": "call(57)",
    "vfork by its number": "call(58)",
    "clone by its number": "call(56, signal.SIGCHLD, 0, 0, 0, 0)",
    "clone3 by its number": "call(435, ctypes.c_char_p(bytes(64)), 64)",
    "a thread with a table of files of its own": (
        "call(56, 0x10900, "
        "ctypes.addressof(ctypes.create_string_buffer(1 << 16)) + (1 << 15), 0, 0, 0)"
    ),
    "tgkill of the parent": "call(234, PARENT, PARENT, 9)",
    "tkill of the parent": "call(200, PARENT, 9)",
    "rt_sigqueueinfo to the parent": "call(129, PARENT, 9, ctypes.c_char_p(bytes(128)))",
    "ptrace of the parent": "call(101, 16, PARENT, 0, 0)",
    "process_vm_readv of the parent": "call(310, PARENT, 0, 0, 0, 0, 0)",
    "mount": "call(165, b'none', b'/tmp', b'tmpfs', 0, 0)",
    "unshare of the user": "call(272, 0x10000000)",
    "setns": "call(308, 0, 0)",
    "add_key": "call(248, b'user', b'x', b'y', 1, -1)",
    "io_uring_setup": "call(425, 1, ctypes.c_char_p(bytes(120)))",
    "bpf": "call(321, 0, 0, 0)",
    "perf_event_open": "call(298, 0, 0, -1, -1, 0)",
    "userfaultfd": "call(323, 0)",
    "shmget": "call(29, 0, 4096, 0o1600)",
    "mq_open": "call(240, b'x', 0o102, 0o600, 0)",
    "open_by_handle_at": "call(304, 0, 0, 0)",
    "freedom from the parent's end": "call(157, 1, 0, 0, 0, 0)",
    "kexec_load": "call(246, 0, 0, 0, 0)",
}
if platform.machine() == "x86_64":
    ATTEMPTS |= BY_NUMBER


def fenced(program: str) -> str:
    return f"It is\n```python\n{program}\n```\n"


@pytest.fixture(scope="module")
def attempts(code: VerifierPool, canary: Path) -> dict[str, CheckOutcome]:
    """Returns the outcome of each attempt: `ok` where the program printed that it was held."""
    test = {"tests": [{"stdin": "", "stdout": "held\n"}], "seconds": 30}
    checks = [
        Check(fenced(PRELUDE.format(home=str(canary), canary=CANARY, body=body)), [GOLD], test)
        for body in ATTEMPTS.values()
    ]
    return dict(zip(ATTEMPTS, code.run(checks), strict=True))


def test_every_attempt_of_a_program_is_held(attempts: dict[str, CheckOutcome]) -> None:
    assert {name: o.reason for name, o in attempts.items() if o.status != "ok"} == {}
    assert len(attempts) >= 60


SUM = {"tests": [{"stdin": "2 3\n", "stdout": "5\n"}, {"stdin": "4 5\n", "stdout": "9\n"}]}
ADD = {"tests": [{"assert": "add(2, 3) == 5"}, {"assert": "add(4, 5) == 9"}]}
RIGHT = "a, b = map(int, input().split())\nprint(a + b)"
THREADED = "right, in a thread with a deep stack"
ENDINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "right": (RIGHT, SUM, "2 of 2 tests passed: ok ok"),
    "right, on one line too many blanks": ("print(sum(map(int, input().split())), ' \\n')", SUM,
                                           "2 of 2 tests passed: ok ok"),
    THREADED: (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\n"
        "def deep(n): return n and 1 + deep(n - 1)\n"
        "def main(): print(sum(map(int, input().split())) + deep(20000) - 20000)\n"
        "threading.Thread(target=main).start()",
        SUM, "2 of 2 tests passed: ok ok",
    ),
    "right, leaving by exit()": (RIGHT + "\nimport sys; sys.exit()", SUM,
                                 "2 of 2 tests passed: ok ok"),
    "one constant": ("print(5)", SUM, "1 of 2 tests passed: ok wrong"),
    "nothing": ("", SUM, "0 of 2 tests passed: wrong"),
    "no Python": ("so it is 5", SUM, "0 of 2 tests passed: error"),
    "an exception": ("1 / 0", SUM, "0 of 2 tests passed: error"),
    "right, and an exit code": (RIGHT + "\nexit(3)", SUM, "0 of 2 tests passed: error"),
    "an endless loop": ("while True: pass", SUM | {"seconds": 1}, "0 of 2 tests passed: timeout"),
    "an endless loop without Python's help": ("import re\nre.match('(a*)*b', 'a' * 40)",
                                              SUM | {"seconds": 1}, "0 of 2 tests passed: timeout"),
    "sleep": ("import time\ntime.sleep(60)", SUM | {"seconds": 1}, "0 of 2 tests passed: timeout"),
    "an answer, then sleep": (RIGHT + "\nimport sys, time; sys.stdout.flush(); time.sleep(60)",
                              SUM | {"seconds": 1}, "0 of 2 tests passed: timeout"),
    "closed output, then sleep": ("import os, time\nos.close(1); time.sleep(60)",
                                  SUM | {"seconds": 1}, "0 of 2 tests passed: timeout"),
    "deaf to signals": (
        "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n"
        "  except (OSError, ValueError): pass\nwhile True: pass",
        SUM | {"seconds": 1}, "0 of 2 tests passed: timeout",
    ),
    "endless output": ("while True: print('x' * 1000)", SUM, "0 of 2 tests passed: overlong"),
    "all memory": ("x = bytearray(8 << 30)", SUM, "0 of 2 tests passed: error"),
    "all memory, bit by bit": ("x = []\nwhile True: x.append(bytearray(1 << 24))",
                               SUM | {"seconds": 30}, "0 of 2 tests passed: error"),
    "a wild pointer": ("import ctypes\nctypes.string_at(0)", SUM, "0 of 2 tests passed: error"),
    "a forged reply": (
        "print('{\"number\": 1, \"status\": \"ok\", "
        "\"reward\": 1.0, \"reason\": \"\", \"last\": false}')",
        SUM, "0 of 2 tests passed: wrong",
    ),
    "an unread input": ("print(5)", {"tests": [{"stdin": "x" * 3_000_000, "stdout": "5"}]},
                        "1 of 1 tests passed: ok"),
    "half a surrogate pair": ("print('\ud835')", SUM, "0 of 2 tests passed: wrong"),
    "an asserted sum": ("def add(a, b): return a + b", ADD, "2 of 2 tests passed: ok ok"),
    "an asserted constant": ("def add(a, b): return 5", ADD, "1 of 2 tests passed: ok wrong"),
    "no function": ("", ADD, "0 of 2 tests passed: error"),
    "equal to everything": (
        "class E:\n  def __eq__(self, other): return True\ndef add(a, b): return E()",
        ADD, "0 of 2 tests passed: error",
    ),
    "a number equal to everything": (
        "class E(int):\n  def __eq__(self, other): return True\n  __hash__ = int.__hash__\n"
        "def add(a, b): return E(7)",
        ADD, "0 of 2 tests passed: wrong",
    ),
    "an early success": ("import os\ndef add(a, b): os._exit(0)", ADD,
                         "0 of 2 tests passed: error"),
    "an early success at once": ("raise SystemExit(0)", ADD, "0 of 2 tests passed: error"),
    "asserts that do nothing": (
        "import builtins\nbuiltins.AssertionError = SystemExit\n"
        "def add(a, b): raise AssertionError",
        ADD, "0 of 2 tests passed: error",
    ),
    "a passing assertion of its own": ("def add(a, b): raise AssertionError('passed')", ADD,
                                       "0 of 2 tests passed: wrong"),
    "an answer to a question nobody asked": (
        "import os\ndef add(a, b):\n  for n in range(64):\n"
        "    try: os.write(n, b'{\"value\": 5, \"arguments\": []}\\n')\n"
        "    except OSError: pass\n  return 0",
        ADD, "1 of 2 tests passed: ok wrong",
    ),
    "junk": (
        "import os\ndef add(a, b):\n  for n in range(64):\n"
        "    try: os.write(n, b'\\xff[[[\\n' + b'[' * 100000)\n    except OSError: pass",
        ADD, "0 of 2 tests passed: error",
    ),
    "a test's own list emptied": (
        "def same(items):\n  items.clear()\n  return []",
        {"tests": [{"assert": "(lambda items: same(items) == sorted(items))([2, 1])"}]},
        "0 of 1 tests passed: wrong",
    ),
    "a set of one hash": (
        "def add(a, b):\n  return 0\nimport megatron_real.labels.code.plain as plain\n"
        "plain.encode = lambda value: {'set': [i * (2**61 - 1) for i in range(40000)]}",
        ADD, "0 of 2 tests passed: error",
    ),
    "a set of one hash, with long members": (
        "import megatron_real.labels.code.plain as plain\ndef add(a, b): return 0\n"
        "plain.encode = lambda value: "
        "{'set': [{'tuple': [0] * 50 + [i * (2**61 - 1)]} for i in range(5000)]}",
        ADD, "0 of 2 tests passed: error",
    ),
    "the end of its judge's iteration": (
        "def add(a, b): raise StopIteration",
        {"tests": [{"assert":
            "all(map(lambda sums: add(*sums[:2]) == sums[2], [(2, 3, 5), (4, 5, 9)]))"}]},
        "0 of 1 tests passed: error",
    ),
    "a number beyond all floats": ("def add(a, b): return 10**5000", ADD,
                                   "0 of 2 tests passed: error"),
    "a value that holds itself": ("def add(a, b):\n  x = []\n  x.append(x)\n  return x", ADD,
                                  "0 of 2 tests passed: error"),
}  # fmt: skip


def test_each_program_ends_in_its_own_way(code: VerifierPool) -> None:
    outcomes = code.run(
        [Check(fenced(program), [], tests) for program, tests, _ in ENDINGS.values()]
    )
    reasons = {name: outcome.reason for name, outcome in zip(ENDINGS, outcomes, strict=True)}
    expected = {name: reason for name, (_, _, reason) in ENDINGS.items()}
    if not code.threads:
        expected[THREADED] = "0 of 2 tests passed: error"

    assert reasons == expected

    passed = [
        outcome.reason.count(" ok") == len(ENDINGS[name][1]["tests"])
        for name, outcome in zip(ENDINGS, outcomes, strict=True)
    ]

    assert [outcome.status == "ok" for outcome in outcomes] == passed
    assert [outcome.reward for outcome in outcomes] == [float(all_passed) for all_passed in passed]


def test_nothing_is_left_after_the_table(
    code: VerifierPool, attempts: dict[str, CheckOutcome]
) -> None:
    """There remain the worker, its supervisor, the first process of its namespace and the launcher:
    as many as before any check.
    """
    (worker,) = code._workers
    assert worker._process is not None

    supervisor = psutil.Process(worker._process.pid)
    expected = 3 if worker.rung is Rung.NAMESPACES else 2
    # The program of the last check is ended by the launcher when its judge has left already.
    deadline = time.monotonic() + 60
    while len(supervisor.children(recursive=True)) > expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(supervisor.children(recursive=True)) == expected

    mounts = Path("/proc/self/mounts").read_text()
    for folder in ("/tmp", "/dev/shm"):
        assert [name for name in os.listdir(folder) if CANARY in name and name != CANARY] == []
    pool = VerifierPool("code", workers=1, timeout_seconds=9, memory_mib=1024, highest=worker.rung)
    (other,) = pool._workers
    assert other._process is not None

    processes = [
        other._process.pid,
        *(p.pid for p in psutil.Process(other._process.pid).children(True)),
    ]
    pool.close()

    assert not any(psutil.pid_exists(process) for process in processes)
    assert Path("/proc/self/mounts").read_text() == mounts
