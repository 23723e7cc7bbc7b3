"""Running programs that a completion wrote.

Each runs in a process that has seen nothing and has nothing but its own pipes:

    worker       keeps `Launcher`'s socket
      launcher   a copy of the worker from before its first check; forks one process for each
                 program, and ends it
        program  clean: no expected value was ever in its memory, no descriptor but its own pipes
      child      judges one check: asks the launcher for a program, feeds it, reads it, compares

Judge and program meet in pipes only. What a program does to itself costs itself.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_real.labels.code import plain
from megatron_real.labels.sandbox import kernel
from megatron_real.labels.sandbox.walls import Walls, confine_judged_code

# Descriptors of a program: its input, its output, and its source.
_IN = 0
_OUT = 1
_PROGRAM = 3
_MESSAGE_BYTES = 1 << 12
_GRACE_SECONDS = 0.05  # in which the launcher ends a program whose time is over, and says so
MAX_OUTPUT_BYTES = 1 << 20
"""Beyond this a program's output is not read."""


@dataclass(frozen=True)
class ProgramLimits:
    """How long one program may run, and how much memory it may take."""

    seconds: float
    """Wall clock, and rounded up to whole seconds processor time."""
    memory: int
    """Bytes of address space."""


@dataclass(frozen=True)
class Ending:
    """How a program ended."""

    output: bytes
    """What it wrote to standard output, at most MAX_OUTPUT_BYTES."""
    code: int
    """Exit code, negative for a signal."""
    status: str
    """`ok`; `error`: another exit code, an exception or a signal; `timeout`; `overlong`: it wrote
    too much."""


class Launcher:
    """Starts programs. Made by a worker behind its walls, before it has seen any check."""

    def __init__(self, walls: Walls) -> None:
        self._socket, theirs = socket.socketpair()
        if os.fork() == 0:
            try:
                # Of the worker's descriptors, requests and replies above all, only standard error
                # is left.
                os.dup2(theirs.fileno(), 3)
                os.closerange(4, os.sysconf("SC_OPEN_MAX"))
                nothing = os.open(os.devnull, os.O_RDWR)
                os.dup2(nothing, 0)
                os.dup2(nothing, 1)
                os.close(nothing)
                _launch(socket.socket(fileno=3), walls)
            except Exception:  # nothing may return into the parent's code: this is its copy
                traceback.print_exc()
            finally:
                os._exit(1)
        theirs.close()

    def is_running(self) -> bool:
        """Returns whether the process that starts programs is there.

        Nothing that it runs can end it, but the kernel may.
        """
        poller = select.poll()
        poller.register(self._socket, 0)
        return not poller.poll(0)

    def run(self, source: str, stdin: bytes, limits: ProgramLimits) -> Ending:
        """Runs a program as a script on `stdin`, to its end."""
        with _Program(self._socket, "script", source, limits) as program:
            return program.finish(stdin)

    def functions(self, source: str, limits: ProgramLimits) -> Functions:
        """Returns the program's functions, to be called from here.

        The program runs until the result is closed.
        """
        return Functions(_Program(self._socket, "functions", source, limits))


class Functions:
    """Functions of a program that runs elsewhere: plain values in, plain values out."""

    def __init__(self, program: _Program) -> None:
        self._program = program

    def __enter__(self) -> Functions:
        return self

    def __exit__(self, *_: object) -> None:
        self._program.close()

    def __getitem__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            return self._call(name, arguments, named)

        call.__name__ = name
        return call

    def _call(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Calls one function.

        Where it returns None, lists, dicts and sets among the arguments become what it made of
        them. Only there: a function that answers must not change what its test compares the answer
        with.

        Raises:
            ProgramEnded: the program ended, ran out of time or answered with something else.
            Exception: the builtin exception that the function raised, or RuntimeError for one of
                its own.
        """
        request = json.dumps([name, plain.encode(arguments), plain.encode(named)])
        line = self._program.exchange(request.encode() + b"\n")

        error: Exception | None = None
        result: Any = None
        changed_arguments: list[Any] = []
        try:
            match json.loads(line):
                case {"raised": str(kind), "text": str(text)}:
                    error = _exception(kind, text)
                case {"value": value, "arguments": list(after)}:
                    result = plain.decode(value)
                    changed_arguments = [plain.decode(item) for item in after]
                case _:
                    raise ValueError("an answer of another form")
        except (ValueError, TypeError, RecursionError) as broken:
            raise ProgramEnded("error") from broken
        if error is not None:
            raise error

        if result is None:
            for argument, changed in zip(arguments, changed_arguments, strict=False):
                if type(argument) is not type(changed):
                    continue
                if isinstance(argument, list):
                    argument[:] = changed
                elif isinstance(argument, (dict, set)):
                    argument.clear()
                    argument.update(changed)
        return result


class ProgramEnded(Exception):
    """The program of some functions cannot answer; `args[0]` is a status of `Ending`."""


def _exception(kind: str, text: str) -> Exception:
    """Returns the builtin exception of that name, else a RuntimeError."""
    import builtins

    cls = getattr(builtins, kind, None)
    # The end of an iteration is no error to map(), all() or a loop of the judge: they would stop
    # early and succeed.
    ends_iteration = kind in ("StopIteration", "StopAsyncIteration")
    if isinstance(cls, type) and issubclass(cls, Exception) and not ends_iteration:
        try:
            return cls(text)
        except TypeError:  # UnicodeDecodeError takes five arguments
            pass
    return RuntimeError(f"{kind}: {text}")


class _Program:
    """One running program, as its judge sees it."""

    def __init__(
        self, launcher: socket.socket, mode: str, source: str, limits: ProgramLimits
    ) -> None:
        self._source = source.encode("utf-8", "replace")
        self._deadline = time.monotonic() + limits.seconds
        self._unread = b""

        theirs_program, self._to_program = os.pipe()
        theirs_in, self._stdin = os.pipe()
        self._stdout, theirs_out = os.pipe()
        self._ending, theirs_ending = os.pipe()
        self._open = {self._to_program, self._stdin, self._stdout, self._ending}

        # The launcher knows the descriptors by their order.
        theirs = [theirs_program, theirs_in, theirs_out, theirs_ending]
        order = {"mode": mode, "seconds": limits.seconds, "memory": limits.memory}
        socket.send_fds(launcher, [json.dumps(order).encode()], theirs)
        for descriptor in theirs:
            os.close(descriptor)
        # A program that does not read must not stop its judge.
        for descriptor in (self._to_program, self._stdin):
            os.set_blocking(descriptor, False)

    def finish(self, stdin: bytes) -> Ending:
        """Feeds the program and reads it to its end."""
        pending = {self._to_program: self._source, self._stdin: stdin}
        output = b""
        while self._stdout in self._open and len(output) <= MAX_OUTPUT_BYTES:
            piece = self._pump(pending)
            if piece is None:
                break
            output += piece
        if len(output) > MAX_OUTPUT_BYTES:
            return Ending(output[:MAX_OUTPUT_BYTES], 0, "overlong")
        code, status = self._wait()
        return Ending(output, code, status)

    def exchange(self, request: bytes) -> bytes:
        """Sends the request and returns the program's next line.

        Raises:
            ProgramEnded: it ended before, or its time is over.
        """
        pending = {self._to_program: self._source, self._stdin: request}
        keep_open = {self._stdin}
        while b"\n" not in self._unread:
            piece = self._pump(pending, keep_open)
            if piece is None or self._stdout not in self._open:
                _, status = self._wait()
                # A program that ends well has not answered either.
                raise ProgramEnded("error" if status == "ok" else status)
            self._unread += piece
            if len(self._unread) > MAX_OUTPUT_BYTES:
                raise ProgramEnded("overlong")
        self._source = pending.get(self._to_program, b"")
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def close(self) -> None:
        """Lets go of the pipes, upon which the launcher ends the program."""
        while self._open:
            os.close(self._open.pop())

    def __enter__(self) -> _Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pump(
        self,
        pending: dict[int, bytes],
        keep_open: set[int] = frozenset(),  # type: ignore[assignment]
    ) -> bytes | None:
        """Writes what fits and returns what came, perhaps nothing.

        Args:
            pending: by descriptor what is still to be written; what was written is taken from it.
            keep_open: descriptors that stay open when all is written.

        Returns:
            A piece of the program's output; None when the time is over.
        """
        for descriptor in list(pending):
            if not pending[descriptor]:
                del pending[descriptor]
                if descriptor not in keep_open:
                    self._close(descriptor)

        poller = select.poll()
        poller.register(self._stdout, select.POLLIN)
        for descriptor in pending:
            if descriptor in self._open:
                poller.register(descriptor, select.POLLOUT)
        left = self._deadline + _GRACE_SECONDS - time.monotonic()
        ready = dict(poller.poll(max(left, 0) * 1000))
        if not ready:
            return None if left <= 0 else b""

        for descriptor in ready.keys() & pending.keys():
            try:
                num_written = os.write(descriptor, pending[descriptor])
                pending[descriptor] = pending[descriptor][num_written:]
            except BlockingIOError:
                pass
            except BrokenPipeError:  # it does not read its input to the end
                pending[descriptor] = b""

        if self._stdout not in ready:
            return b""
        piece = os.read(self._stdout, 1 << 16)
        if not piece:
            self._close(self._stdout)
        return piece

    def _wait(self) -> tuple[int, str]:
        """Returns exit code and status, once the launcher has seen the program end or ended it."""
        for descriptor in self._open - {self._ending}:
            self._close(descriptor)
        report = b""
        while piece := os.read(self._ending, 1 << 10):
            report += piece

        # Without a report the launcher itself has ended.
        code, is_timeout = json.loads(report or b"[1, false]")
        if is_timeout:
            return code, "timeout"
        if code == 0:
            return code, "ok"
        return code, "error"

    def _close(self, descriptor: int) -> None:
        """Closes one of the pipes, if it is open."""
        if descriptor in self._open:
            self._open.remove(descriptor)
            os.close(descriptor)


def _launch(orders: socket.socket, walls: Walls) -> None:
    """Runs one program at a time, until the worker's socket closes. Does not return."""
    kernel.die_with_parent(signal.SIGKILL)
    # The end of a child writes to this pipe, so that one poll waits for it and for a deadline.
    woken, wake = os.pipe()
    for descriptor in (woken, wake):
        os.set_blocking(descriptor, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        message, descriptors, _, _ = socket.recv_fds(orders, _MESSAGE_BYTES, 4)
        if not message:
            os._exit(0)
        order = json.loads(message)
        *theirs, ending = descriptors
        program = os.fork()
        if program == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _become_program(order, theirs, walls)
        for descriptor in theirs:
            os.close(descriptor)
        _watch(program, order["seconds"], ending, woken)


def _watch(program: int, seconds: float, ending: int, woken: int) -> None:
    """Waits for the program's end and reports it.

    Ends the program when its time is over or its judge has gone.

    Args:
        program: its process id.
        seconds: how long it may run.
        ending: the pipe for the report, which is closed after it.
        woken: readable when a child of this process has ended.
    """
    deadline = time.monotonic() + seconds
    is_late = False
    poller = select.poll()
    poller.register(woken, select.POLLIN)
    poller.register(ending, 0)  # POLLERR: nobody reads it any more
    while True:
        ended, status, usage = os.wait4(program, os.WNOHANG)
        if ended:
            break
        left = deadline - time.monotonic()
        ready = dict(poller.poll(max(left, 0) * 1000))
        if woken in ready:
            os.read(woken, 1 << 10)
            continue
        is_late = ending not in ready
        os.kill(program, signal.SIGKILL)
        _, status, usage = os.wait4(program, 0)
        break

    code = os.waitstatus_to_exitcode(status)
    # The kernel's limit of processor time kills as well.
    is_spent = code < 0 and usage.ru_utime + usage.ru_stime >= seconds
    with contextlib.suppress(BrokenPipeError):
        os.write(ending, json.dumps([code, is_late or is_spent]).encode())
    os.close(ending)


def _become_program(order: dict[str, Any], theirs: list[int], walls: Walls) -> None:
    """Turns this fresh child of the launcher into the program. Does not return."""
    code = 1
    try:
        kernel.die_with_parent(signal.SIGKILL)
        source_end, stdin, stdout = (os.dup(descriptor) for descriptor in theirs)
        # Above all that are in use: what is copied down must not be overwritten before.
        os.dup2(stdin, _IN)
        os.dup2(stdout, _OUT)
        devnull = os.open(os.devnull, os.O_RDWR)
        os.dup2(devnull, 2)
        os.dup2(source_end, _PROGRAM)
        os.closerange(_PROGRAM + 1, os.sysconf("SC_OPEN_MAX"))
        os.chdir("/")

        # The source is whole before the walls: reading its pipe closes the last descriptor that
        # the program does not need.
        with open(_PROGRAM, "rb") as file:
            source = file.read()
        seconds = math.ceil(order["seconds"])
        confine_judged_code(walls, processor_seconds=seconds, memory=order["memory"])
        code = _run(source, order["mode"])
    except MemoryError:
        code = 1
    finally:
        os._exit(code)


def _run(source: bytes, mode: str) -> int:
    """Runs the program as a script, or its functions on request; returns the exit code."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]

    requests = None
    answers = None
    if mode == "functions":
        # The program's own input and output are nothing; requests and answers have descriptors of
        # their own.
        requests = os.fdopen(os.dup(_IN), "rb")
        answers = os.fdopen(os.dup(_OUT), "wb")
        for descriptor in (_IN, _OUT):
            os.dup2(2, descriptor)
    sys.stdin = os.fdopen(_IN, encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(_OUT, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)

    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
        if requests is not None and answers is not None:
            _serve(module, requests, answers)
        # As the interpreter does at its end.
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
        sys.stdout.flush()
    except SystemExit as leaving:
        sys.stdout.flush()
        # exit("text") is 1 and exit() is 0, as the interpreter has them.
        if isinstance(leaving.code, int):
            return leaving.code
        return int(leaving.code is not None)
    except BaseException:  # whatever a program raises is its end
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        return 1
    return 0


def _serve(module: types.ModuleType, requests: io.BufferedReader, answers: Any) -> None:
    """Calls functions of the program as they are asked for, one request a line."""
    for line in requests:
        name, encoded_arguments, named = json.loads(line)
        try:
            arguments = plain.decode(encoded_arguments)
            value = getattr(module, name)(*arguments, **plain.decode(named))
            # What the function may have changed goes back with its value.
            after = [
                plain.encode(argument) if isinstance(argument, (list, dict, set)) else None
                for argument in arguments
            ]
            answer: dict[str, Any] = {"value": plain.encode(value), "arguments": after}
        except Exception as error:  # the function's own, to be raised where it was called
            answer = {"raised": type(error).__name__, "text": str(error)[:200]}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
