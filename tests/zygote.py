"""Starts command lines of Python by a fork of a process that has imported torch,
megatron-core and transformers.

A new interpreter needs seven seconds of CPU time for these imports, a fork milliseconds. `Popen`
and `run` take the place of those of `subprocess`: a command line of this interpreter (`python -m
MODULE ...` or `python SCRIPT ...`) is forked from the zygote and has its own environment,
directory, standard streams and session; any other command, and one with a `preexec_fn`, is started
as usual. The ranks that torchrun starts are forked in the same way.

The vLLM servers that such a process starts are forked too: first the guard, then by the guard the
server, and by the server its engine.

What a fork cannot show is that the imports themselves are right and enough: some tests start real
processes, and `REAL_SERVERS` has a process start real servers.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import multiprocessing
import os
import pickle
import runpy
import select
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
_VLLM = "vllm"
"""The kind of zygote that has imported vLLM too, which takes twice as long to start."""
REAL_SERVERS = "MEGATRON_REAL_TESTS_REAL_SERVERS"
"""Environment variable of a forked process that is to start its vLLM servers as new processes."""
_GUARD = "vllm_server/guard.py"


@dataclass(frozen=True)
class Request:
    """One process to fork."""

    words: list[str]
    """What follows the interpreter and its -W options: `-m MODULE ...` or `SCRIPT ...`."""
    directory: str
    environment: dict[str, str]
    own_session: bool
    requester: int
    """The process that asked for it."""


class Popen(subprocess.Popen[Any]):
    """As subprocess.Popen; the process is the zygote's child,
    which reports its end over a socket.
    """

    def __init__(self, args: Sequence[Any], **options: Any) -> None:
        self._words = _forkable(args, options)
        self._own_session = bool(options.get("start_new_session"))
        self._report: socket.socket | None = None
        super().__init__(args, **options)

    def _execute_child(self, *arguments: Any) -> None:
        if self._words is None:
            super()._execute_child(*arguments)  # type: ignore[misc]
            return

        # The order of CPython 3.10 to 3.13: ..., cwd, env, ..., p2cread, p2cwrite, c2pread, ...
        cwd = arguments[5]
        env = arguments[6]
        pipes = arguments[10:16]
        stdin = pipes[0]
        stdout = pipes[3]
        stderr = pipes[5]
        # -1 stands for this process's own stream.
        streams = [
            number if stream == -1 else stream
            for number, stream in enumerate((stdin, stdout, stderr))
        ]
        request = Request(
            words=self._words,
            directory=os.path.abspath(cwd or "."),
            environment=dict(os.environ if env is None else env),
            own_session=self._own_session,
            requester=os.getpid(),
        )
        kind = _VLLM if any("vllm" in word for word in request.words) else "plain"
        try:
            self.pid, self._report = _ask(kind, request, streams)
            self._child_created = True
        finally:
            self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """Returns the process's id and its wait status; (0, 0) while it runs and
        nobody wants to wait.
        """
        if self._report is None:
            return super()._try_wait(wait_flags)  # type: ignore[misc]
        if wait_flags & os.WNOHANG and not _has_word(self._report):
            return 0, 0
        status = self._report.recv(16)
        if not status:
            raise RuntimeError("the zygote of the tests has ended")
        self._report.close()
        return self.pid, int(status)

    def _internal_poll(self, *arguments: Any, **options: Any) -> int | None:
        if self._report is None:
            return super()._internal_poll(*arguments, **options)  # type: ignore[misc]
        with self._waitpid_lock:  # type: ignore[attr-defined]
            if self.returncode is None:
                pid, status = self._try_wait(os.WNOHANG)
                if pid:
                    self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode


def _has_word(connection: socket.socket) -> bool:
    """Whether something can be read. select() knows no descriptor above 1023,
    and tests that keep tensors have more.
    """
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(0))


def run(
    args: Sequence[Any], *, timeout: float, capture_output: bool = False, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """As subprocess.run with a time limit."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    check = options.pop("check", False)
    with Popen(args, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:  # as subprocess.run does
            process.kill()
            raise
    done = subprocess.CompletedProcess(args, process.returncode, stdout, stderr)
    if check:
        done.check_returncode()
    return done


def _forkable(args: Any, options: Mapping[str, Any]) -> list[str] | None:
    """Returns the words after the interpreter where the zygote can run this command line,
    else None.
    """
    words = [os.fspath(word) for word in args]
    is_special = any(options.get(name) for name in ("shell", "preexec_fn", "pass_fds"))
    if is_special or words[0] != sys.executable:
        return None
    words = words[1:]
    while words[:1] == ["-W"]:
        words = words[2:]
    if words[:1] == ["-u"]:
        words = words[1:]
    is_script = bool(words) and words[0].endswith(".py")
    if is_script or words[:1] == ["-m"]:
        return words
    return None


def _ask(kind: str, request: Request, streams: Sequence[int]) -> tuple[int, socket.socket]:
    """Returns the new process's id and the socket that will bring its wait status."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_address(kind))
    with tempfile.TemporaryFile() as file:
        # A request is longer than a datagram may be: its text goes as a file, like the streams.
        file.write(pickle.dumps(request))
        file.flush()
        file.seek(0)
        socket.send_fds(connection, [b"x"], [file.fileno(), *streams])
        answer = connection.recv(16)
    if not answer:
        raise RuntimeError("the zygote of the tests has ended")
    return int(answer), connection


def add_interpreter(folder: Path, kind: str) -> str:
    """Makes an executable `python` that forks from the zygote of a kind, for shell scripts;
    returns a PATH with it first.

    Args:
        folder: An empty directory for it.
        kind: `plain`, or `vllm`.
    """
    stand_in = folder / "python"
    stand_in.write_text(
        f"#!{sys.executable} -S\n"
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.zygote import run_as_stand_in\n"
        f"run_as_stand_in({_address(kind)!r})\n"
    )
    stand_in.chmod(0o755)
    return os.pathsep.join([str(folder), os.path.dirname(sys.executable), os.environ["PATH"]])


def run_as_stand_in(address: str) -> NoReturn:
    """Runs this process's command line in a fork of a zygote, and ends with its exit code."""
    _addresses.update({"plain": address, _VLLM: address})
    with Popen([sys.executable, *sys.argv[1:]]) as process:
        sys.exit(process.wait())


_addresses: dict[str, str] = {}
"""Paths of the sockets of the zygotes that run, by kind.

In a forked process all kinds are the zygote it is from.
"""
_starting = threading.Lock()


def _address(kind: str) -> str:
    """Returns the path of a zygote's socket, and starts the zygote where there is none yet."""
    with _starting:
        if kind not in _addresses:
            folder = tempfile.mkdtemp(prefix="zygote-")
            address = os.path.join(folder, "socket")
            process = subprocess.Popen(
                [sys.executable, "-c", "from tests.zygote import main; main()", address, kind],
                cwd=ROOT,
                stdin=subprocess.PIPE,  # its end is how the zygote learns of ours
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            assert process.stdin is not None and process.stdout is not None
            assert process.stdout.readline() == b"ready\n", "the zygote did not start"
            _addresses[kind] = address
            atexit.register(shutil.rmtree, folder)
            atexit.register(process.wait)
            atexit.register(process.stdin.close)
    return _addresses[kind]


class _Child(subprocess.Popen[Any]):
    """As subprocess.Popen for one of this interpreter's command lines;
    the process is a fork of this one.

    It is in this process's group, which a guard ends as a whole; the zygote's children have other
    groups.
    """

    def _execute_child(self, *arguments: Any) -> None:
        words = _forkable(arguments[0], {})
        stdin = arguments[10]  # as in Popen above
        if words is None:
            super()._execute_child(*arguments)  # type: ignore[misc]
            return

        self.pid = os.fork()
        if self.pid == 0:
            subprocess.Popen = _NewProcess  # type: ignore[misc]
            os.dup2(stdin, 0)
            _run_and_exit(words)
        self._child_created = True
        self._close_pipe_fds(*arguments[10:16])  # type: ignore[attr-defined]


_NewProcess = subprocess.Popen


def _start_server(args: Sequence[Any], **options: Any) -> subprocess.Popen[Any]:
    """As subprocess.Popen for the guard of a vLLM server."""
    if os.environ.get(REAL_SERVERS):
        return subprocess.Popen(args, **options)
    return Popen(args, **options)


class Server:
    """The zygote's loop: it forks, and reports the end of each of its children."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(address)
        self._listener.listen(64)
        self._running: dict[int, socket.socket] = {}
        self._requesters: dict[int, int] = {}
        """Process -> the one that asked for it; without guards,
        which find out by themselves who has ended.
        """
        # A child's end wakes the loop by a byte in this pipe.
        self._wakes, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._wake = wake

    def serve(self) -> Request | None:
        """Returns None at the end of standard input and, in each child, the child's request."""
        with selectors.DefaultSelector() as events:
            for file in (0, self._wakes, self._listener):
                events.register(file, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in events.select()]
                if self._wakes in ready:
                    os.read(self._wakes, 4096)
                self._report_ends()
                if self._listener in ready:
                    request = self._fork()
                    if request is not None:
                        return request
                if 0 in ready and not os.read(0, 1):
                    return None

    def _report_ends(self) -> None:
        while self._running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            report = self._running.pop(pid)
            self._requesters.pop(pid, None)
            if os.WIFSIGNALED(status):
                # A test that kills torchrun means the whole job, and its ranks are in sessions of
                # their own.
                for child, requester in self._requesters.items():
                    if requester == pid:
                        os.kill(child, signal.SIGKILL)
            with contextlib.suppress(OSError):  # nobody waits for it any more
                report.send(str(status).encode())
            report.close()

    def _fork(self) -> Request | None:
        """Returns the request in the child, None in the zygote."""
        connection, _ = self._listener.accept()
        _, files, _, _ = socket.recv_fds(connection, 1, 4)
        with open(files[0], "rb") as file:
            request: Request = pickle.load(file)

        pid = os.fork()
        if pid == 0:
            self._become(request, files[1:])
            connection.close()
            return request
        for file_number in files[1:]:
            os.close(file_number)
        self._running[pid] = connection
        if not request.words[0].endswith(_GUARD):
            self._requesters[pid] = request.requester
        connection.send(str(pid).encode())
        return None

    def _become(self, request: Request, streams: Sequence[int]) -> None:
        """Makes this fork what a new process with the request's settings would be."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for theirs in (self._listener, *self._running.values()):
            theirs.close()
        os.close(self._wakes)
        os.close(self._wake)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        if request.own_session:
            os.setsid()
        _addresses.update({"plain": self._address, _VLLM: self._address})
        os.chdir(request.directory)
        os.environ.clear()
        os.environ.update(request.environment)


def _run_as_main(words: Sequence[str]) -> int:
    """Runs a module or a script as the interpreter would, to its exit code."""
    code: object = 0
    _customize()
    _fork_the_ranks()
    if words[0].endswith(_GUARD):
        subprocess.Popen = _Child  # type: ignore[misc]
    try:
        if words[0] == "-m":
            sys.argv = list(words[1:])
            sys.path[0] = os.getcwd()
            runpy._run_module_as_main(sys.argv[0])  # type: ignore[attr-defined]
        else:
            sys.argv = list(words)
            sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except BaseException:  # as the interpreter does with whatever a program does not catch
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    return int(code or 0)  # type: ignore[call-overload]


def _customize() -> None:
    """Runs the sitecustomize.py of PYTHONPATH, as a new interpreter does."""
    for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        script = os.path.join(folder, "sitecustomize.py")
        if folder and os.path.exists(script):
            runpy.run_path(script)
            return


def _fork_the_ranks() -> None:
    """Has torchrun, which this process may be, fork its ranks.

    Verifiers are started by a run as usual: they look at their process group, their limits and
    their memory.
    """
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
    from torch.distributed.elastic.rendezvous import dynamic_rendezvous

    subprocess_handler.Popen = Popen  # type: ignore[attr-defined, assignment]

    # For the name of a record, torchrun would look up the source of each of its frames among all
    # modules: with the thousands that a fork has, these names take seconds.
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name


LATER = (
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "megatron_real.commands",
    "megatron_real.loop",
    "omegaconf",
    "pandas",
    "pyarrow.parquet",
    "torch.distributed.run",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_sentencepiece",
)
"""What commands import only when they come to it: a third of the CPU time of a run of one step."""


def _draw_no_pictures() -> None:
    """Leaves out the picture of a forked run, which is another third of its CPU time.

    Runs in pytest's own process and on Slurm draw theirs.
    """
    from megatron_real.runs import reporter

    def draw_nothing(*_: Any, **__: Any) -> None:
        pass

    reporter.plot_curves = draw_nothing  # type: ignore[attr-defined]


def _import_vllm() -> None:
    """As megatron_real imports it for the engine in its processes."""
    from megatron_real.rollout.engines.vllm import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    # Each engine would compile its small functions, for 10 s and more; processes that are not
    # forked do.
    import torch._dynamo.config

    torch._dynamo.config.disable = True
    import vllm.entrypoints.launchers.api_server.entry
    import vllm.entrypoints.llm
    import vllm.model_executor.layers.quantization.online.base
    import vllm.model_executor.models.registry
    import vllm.platforms.cpu
    import vllm.utils.system_utils
    import vllm.v1.engine.llm_engine
    import vllm.v1.engine.utils
    import vllm.v1.executor.multiproc_executor
    import vllm.v1.worker.cpu_worker

    # vLLM looks at a model's class in a new process, once for each architecture and machine.
    vllm.model_executor.models.registry._run_in_subprocess = lambda look: look()
    # Each engine would look for Triton's kernels in all modules, to replace them: once is enough.
    platform = vllm.platforms.cpu.CpuPlatform
    platform.register_triton_kernel_overrides()
    platform.register_triton_kernel_overrides = staticmethod(lambda: None)
    # On a CPU, vLLM would spawn a server's engine, which imports everything again.
    forking = partial(multiprocessing.get_context, "fork")
    vllm.utils.system_utils.get_mp_context = forking
    vllm.v1.engine.utils.get_mp_context = forking
    vllm.v1.executor.multiproc_executor.get_mp_context = forking


def _fork_the_servers() -> None:
    """Has runs start the guards of their vLLM servers by `_start_server`."""
    from megatron_real.rollout.vllm_server import server

    forking = {**vars(subprocess), "Popen": _start_server}
    server.subprocess = types.SimpleNamespace(**forking)  # type: ignore[attr-defined, assignment]


def main() -> None:
    import gc

    import torch._dynamo.utils as dynamo

    from tests.distributed import preload  # noqa: F401

    for module in LATER:
        importlib.import_module(module)
    _draw_no_pictures()
    # At its end each fork would import a library to lay out what torch has compiled, and take back
    # all operators that torch has registered, one after the other.
    atexit.unregister(dynamo.dump_compile_times)
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    if sys.argv[2] == _VLLM:
        _import_vllm()
        _fork_the_servers()
    warnings.resetwarnings()
    warnings.filterwarnings("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()  # forks share the imported objects as long as nobody touches them
    server = Server(sys.argv[1])
    print("ready", flush=True)
    request = server.serve()
    if request is None:
        os._exit(0)

    _run_and_exit(request.words)


def _run_and_exit(words: Sequence[str]) -> NoReturn:
    """Runs a command line and ends as an interpreter does, but without the seconds that it takes to
    throw modules away.
    """
    code = _run_as_main(words)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
