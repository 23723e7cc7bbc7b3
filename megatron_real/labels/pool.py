"""Killable verifier processes with a hard wall clock per check.

Each process is a fresh interpreter, never a fork: it inherits no thread, lock, device or secret of
the trainer. A thread of this process owns it, feeds it one check at a time, ends it with all that
it started when the check's time is over, and starts the next one. worker.py says what it does,
docs/sandbox.md what holds it in.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_real.labels import own
from megatron_real.labels.sandbox import Rung
from megatron_real.labels.sandbox.supervisor import END

T = TypeVar("T")
logger = logging.getLogger(__name__)

_STARTUP_SECONDS = 120.0
_END_SECONDS = 5.0  # for the supervisor to end what a worker started; then it is killed itself
_MAX_REPLY_BYTES = 1 << 16
_STATUSES = ("ok", "wrong", "unparsable", "score", "timeout", "crashed")
# All that a worker gets to know of the trainer's environment, by name: nothing in there is a key or
# a token.
_ENVIRONMENT = (
    "PATH", "HOME", "LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONHASHSEED", "LANG", "LANGUAGE", "LC_ALL",
    "LC_CTYPE", "TZ",
)  # fmt: skip
# An honest check takes milliseconds. When many of the last checks ran out of time, the next get
# less processor time, so that a policy that has learned to write factorials cannot freeze a step;
# but never less than this. It is not the wall clock that is cut: on a busy machine an honest check
# may have to wait.
_RECENT_CHECKS = 100
_LEAST_SECONDS = 1.0


@dataclass(frozen=True)
class Check:
    """One completion to verify."""

    text: str
    """The decoded completion."""
    answers: Sequence[str]
    """Accepted gold answers."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The row's extra_info; must be JSON."""


@dataclass(frozen=True)
class Outcome:
    """What became of one check."""

    status: str
    """`ok`, `wrong`, `unparsable` or `score` from the verifier; `timeout` or `crashed` where it
    gave none."""
    reward: float | None
    """The verifier's number, finite; None where there is none."""
    seconds: float
    """Wall clock of the check, without the start of its process."""
    reason: str = ""
    """Why it crashed, or what a verifier says beside its verdict."""


class VerifierPool:
    """Verifies on `workers` processes. A check that outlasts its time costs its own worker only.

    Example:
        with VerifierPool("math_verify", workers=2, timeout_seconds=10, memory_mib=1024) as pool:
            outcomes = pool.run([Check("so it is \\boxed{5}", ["5"])])
    """

    def __init__(
        self,
        verifier: str,
        *,
        workers: int,
        timeout_seconds: float,
        memory_mib: int,
        sandbox: str = "auto",
        require_think: bool = False,
        require_boxed: bool = True,
        partial: bool = False,
        highest: Rung = Rung.NAMESPACES,
    ) -> None:
        """Starts the workers.

        Args:
            sandbox: `labels.sandbox`.
            partial: `code` rewards the share of passed tests; else all of them or nothing.
            highest: the first rung that is tried; the lower ones are those of other nodes.

        Raises:
            ValueError: the verifier cannot be loaded, or this node does not hold it in as `sandbox`
                asks.
        """
        options = {
            "verifier": verifier,
            "timeout_seconds": timeout_seconds,
            "memory_mib": memory_mib,
            "sandbox": sandbox,
            "require_think": require_think,
            "require_boxed": require_boxed,
            "partial": partial,
            "highest": highest.value,
        }
        self._workers = [_Worker(options) for _ in range(workers)]
        self._tasks: queue.SimpleQueue[Callable[[_Worker], None] | None] = queue.SimpleQueue()
        self._clock = _Clock(timeout_seconds)
        try:
            for worker in self._workers:
                worker.start()
            for worker in self._workers:
                worker.wait_until_ready()
        except ValueError:
            self.close()
            raise
        self._say_rung(options)
        # Daemons: an interrupted run does not wait for the checks that are left.
        self._threads = [
            threading.Thread(target=self._serve, args=(w,), daemon=True) for w in self._workers
        ]
        for thread in self._threads:
            thread.start()

    @property
    def threads(self) -> bool:
        """Whether judged code may start threads: not where real root cannot become another user."""
        return self._workers[0].threads

    @property
    def rung(self) -> Rung:
        """What holds the workers in."""
        return self._workers[0].rung

    def submit(self, check: Check, then: Callable[[Outcome], T]) -> Future[T]:
        """`then` of the check's outcome, once there is one.

        Never raises for what a completion holds.
        """
        future: Future[T] = Future()

        def task(worker: _Worker) -> None:
            try:
                future.set_result(then(worker.check(check, self._clock)))
            except (
                Exception
            ) as error:  # a worker that cannot be started again: whoever waits must hear of it
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def run(self, checks: Sequence[Check]) -> list[Outcome]:
        """[checks] outcomes, in order."""
        return [
            future.result()
            for future in [self.submit(check, lambda outcome: outcome) for check in checks]
        ]

    def close(self) -> None:
        """Ends the processes.

        Checks that are still in flight count as crashed, those that wait are dropped.
        """
        for worker in self._workers:
            self._tasks.put(None)
            worker.close()

    def _say_rung(self, options: Mapping[str, Any]) -> None:
        rung, why = self._workers[0].rung, self._workers[0].why
        own_text = own.is_own(options["verifier"]) and not own.is_trusted(options["verifier"])
        if own_text and options["sandbox"] == "auto" and not rung.contains:
            logger.warning(
                "labels.verifier = %s is not contained on this node (%s): %s. Say TRUSTED = True in it if it never runs "
                "what a completion says",
                options["verifier"],
                why,
                rung.meaning,
            )

    def _serve(self, worker: _Worker) -> None:
        while (task := self._tasks.get()) is not None and not worker.closed:
            task(worker)
        worker.kill()  # lets go of its descriptors too, which nobody else reads by now

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Clock:
    """How long checks may take."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._lock = seconds, threading.Lock()
        self._recent: deque[bool] = deque(maxlen=_RECENT_CHECKS)

    def processor_seconds(self) -> float:
        """Processor time of the next check: the wall clock's, divided by 1 + the timeouts among the
        last checks.
        """
        with self._lock:
            return max(self.seconds / (1 + sum(self._recent)), min(self.seconds, _LEAST_SECONDS))

    def count(self, *, timeout: bool) -> None:
        """Remembers how a check ended."""
        with self._lock:
            self._recent.append(timeout)


class _Junk(Exception):
    """A worker's reply is none."""


class _Worker:
    """One verifier process, started anew whenever it had to be killed or died."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._verifier = options["verifier"]
        self._process: subprocess.Popen[bytes] | None = None
        self._replies = -1
        self._checks = 0
        self._warned = False
        self.closed = False
        self.rung, self.why = Rung.LIMITS, ""
        self.threads = True

    def start(self) -> None:
        """Starts the process; its imports take a while."""
        self._replies, theirs = os.pipe()
        options = json.dumps({**self._options, "replies": theirs})
        self._checks = 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_real.labels.worker", options],
            bufsize=0,
            env=_environment(self._verifier),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs,),
        )
        os.close(theirs)
        assert self._process.stdin is not None, "a pipe"
        # A process that does not read must not stop the clock.
        os.set_blocking(self._process.stdin.fileno(), False)

    def wait_until_ready(self) -> None:
        """Raises ValueError if the verifier cannot be loaded."""
        line = self._exchange(b"", _STARTUP_SECONDS)
        if not line:
            error = f"its process {'ended' if line == b'' else 'does not answer'}"
        else:
            try:
                reply = json.loads(line)
                error = reply["error"]
                if error is None:
                    self.rung, self.why = Rung(reply["rung"]), reply["why"]
                    self.threads = reply["threads"]
            except (ValueError, TypeError, KeyError):
                error = "its process answered with something else"
        if error is not None:
            self.kill()
            raise ValueError(f"labels.verifier = {self._verifier} cannot be loaded ({error})")

    def check(self, check: Check, clock: _Clock) -> Outcome:
        """The verifier's outcome, `timeout` when its time was over, or `crashed` when the process
        ended.
        """
        # It may have died while it was idle.
        if self._process is None or self._process.poll() is not None:
            self.kill()
            self.start()
            self.wait_until_ready()
        started, processor_seconds = time.monotonic(), clock.processor_seconds()
        request = {
            "text": check.text,
            "answers": list(check.answers),
            "metadata": dict(check.metadata),
            "processor_seconds": processor_seconds,
        }
        self._checks += 1
        line = self._exchange(json.dumps(request).encode() + b"\n", clock.seconds)
        seconds = time.monotonic() - started
        if line:
            try:
                outcome, last = self._outcome(line, seconds)
            except _Junk:
                self.kill()
                clock.count(timeout=False)
                return Outcome("crashed", None, seconds, "the worker's reply is none")
            if last:
                self.kill()
                self._warn_of_small_memory()
            clock.count(timeout=outcome.status == "timeout")
            return outcome
        code = self.kill(patience=0 if line is None else 1)
        clock.count(timeout=line is None or code == -signal.SIGPROF)
        if line is None:
            return Outcome("timeout", None, seconds, f"no answer within {clock.seconds:.3g} s")
        if code == -signal.SIGPROF:
            reason = f"no answer within {processor_seconds:.3g} s of processor time"
            return Outcome("timeout", None, seconds, reason)
        return Outcome("crashed", None, seconds, f"the verifier process ended with code {code}")

    def _outcome(self, line: bytes, seconds: float) -> tuple[Outcome, bool]:
        """What the reply says, and whether it is the worker's last.

        Raises:
            _Junk: it is no reply to the last request. A verifier's own code may have written it.
        """
        try:
            match json.loads(line):
                case {
                    "number": int(number),
                    "status": str(status),
                    "reward": (None | int() | float()) as reward,
                    "reason": str(reason),
                    "last": bool(last),
                } if number == self._checks and status in _STATUSES:
                    if reward is None or math.isfinite(reward):
                        return Outcome(status, reward, seconds, reason), last
        except (ValueError, RecursionError, OverflowError):
            pass
        raise _Junk

    def _warn_of_small_memory(self) -> None:
        """Says once that workers are replaced after every check: that is a second or more for each."""
        if self._checks == 1 and not self._warned:
            self._warned = True
            logger.warning(
                "a worker of labels.verifier = %s was replaced after one check, because that took more than half of "
                "labels.memory_mib = %d; raise it",
                self._verifier,
                self._options["memory_mib"],
            )

    def kill(self, *, patience: float = 0) -> int | None:
        """Ends the process and all that it started.

        Returns its exit code, its own if it ends within `patience` s.
        """
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None, "a pipe"
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            code = _end(process)
        process.stdin.close()
        os.close(self._replies)
        return code

    def close(self) -> None:
        """Ends the process for good; the thread that waits for it finds that it ended."""
        self.closed, process = True, self._process
        if process is not None:
            _end(process)

    def _exchange(self, request: bytes, seconds: float) -> bytes | None:
        """The process's next line after `request`, b"" when it ended, None when the time is over."""
        assert self._process is not None and self._process.stdin is not None, "it was started"
        to, back = self._process.stdin.fileno(), self._replies
        deadline, line = time.monotonic() + seconds, b""
        # select() cannot take file descriptors above 1023, which a trainer may have.
        poller = select.poll()
        poller.register(back, select.POLLIN)
        while not line.endswith(b"\n") and len(line) <= _MAX_REPLY_BYTES:
            if request:
                poller.register(to, select.POLLOUT)
            left = deadline - time.monotonic()
            ready = dict(poller.poll(max(left, 0) * 1000))
            if back in ready:
                piece = os.read(back, 1 << 16)
                if not piece:
                    return b""
                line += piece
            elif to in ready:
                try:
                    request = request[os.write(to, request) :]
                except BrokenPipeError:
                    return b""
                if not request:
                    poller.unregister(to)
            elif left <= 0:
                return None
        return line


def _end(process: subprocess.Popen[bytes]) -> int:
    """Has the supervisor end everything below it; returns its exit code."""
    process.send_signal(END)
    try:
        return process.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _environment(verifier: str) -> dict[str, str]:
    """A worker's environment: that of the trainer for a trusted verifier, else the few variables it
    needs.
    """
    names = os.environ if own.is_own(verifier) and own.is_trusted(verifier) else _ENVIRONMENT
    kept = {name: os.environ[name] for name in names if name in os.environ}
    path = os.pathsep.join(path for path in sys.path if path)
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
