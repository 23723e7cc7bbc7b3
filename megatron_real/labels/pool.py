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

# A worker imports sympy and the like, perhaps from a slow shared file system.
_STARTUP_SECONDS = 120.0
_END_SECONDS = 5.0  # for the supervisor to end what a worker started; then it is killed itself
# A reply is a status, a number and a short reason.
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
class CheckOutcome:
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

        # All are started before the first is waited for: their imports take seconds.
        try:
            for worker in self._workers:
                worker.start()
            for worker in self._workers:
                worker.wait_until_ready()
        except ValueError:
            self.close()
            raise

        runs_own_text = own.is_own(verifier) and not own.is_trusted(verifier)
        if runs_own_text and sandbox == "auto" and not self.rung.contains:
            logger.warning(
                "labels.verifier = %s is not contained on this node (%s): %s. Say TRUSTED = True "
                "in it if it never runs what a completion says",
                verifier,
                self._workers[0].why,
                self.rung.meaning,
            )

        # Daemons: an interrupted run does not wait for the checks that are left.
        self._threads: list[threading.Thread] = []
        for worker in self._workers:
            self._threads.append(threading.Thread(target=self._serve, args=(worker,), daemon=True))
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

    def submit(self, check: Check, then: Callable[[CheckOutcome], T]) -> Future[T]:
        """Returns `then` of the check's outcome, once there is one.

        Never raises for what a completion holds.
        """
        future: Future[T] = Future()

        def task(worker: _Worker) -> None:
            try:
                future.set_result(then(worker.check(check, self._clock)))
            except Exception as error:
                # A worker that cannot be started again: whoever waits must hear of it.
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def run(self, checks: Sequence[Check]) -> list[CheckOutcome]:
        """Returns [checks] outcomes, in order."""
        futures = [self.submit(check, lambda outcome: outcome) for check in checks]
        return [future.result() for future in futures]

    def close(self) -> None:
        """Ends the processes.

        Checks that are still in flight count as crashed, those that wait are dropped.
        """
        for worker in self._workers:
            self._tasks.put(None)
            worker.close()

    def _serve(self, worker: _Worker) -> None:
        """Runs tasks on one worker until None is one; the body of the worker's thread."""
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
        self.seconds = seconds
        self._lock = threading.Lock()
        self._recent_timeouts: deque[bool] = deque(maxlen=_RECENT_CHECKS)

    def processor_seconds(self) -> float:
        """Returns the processor time of the next check.

        That is the wall clock's, divided by 1 + the timeouts among the last checks.
        """
        with self._lock:
            share = self.seconds / (1 + sum(self._recent_timeouts))
            return max(share, min(self.seconds, _LEAST_SECONDS))

    def count(self, *, timeout: bool) -> None:
        """Remembers how a check ended."""
        with self._lock:
            self._recent_timeouts.append(timeout)


class _BrokenReplyError(Exception):
    """A worker's reply is not one."""


class _Worker:
    """One verifier process, started anew whenever it had to be killed or died."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._verifier = options["verifier"]
        self._process: subprocess.Popen[bytes] | None = None
        self._replies = -1
        self._num_checks = 0
        """Checks that this process has been given."""
        self._has_warned = False
        self.closed = False
        # What the process says of itself once it is ready.
        self.rung = Rung.LIMITS
        self.why = ""
        self.threads = True

    def start(self) -> None:
        """Starts the process; its imports take a while."""
        # A pipe of their own: a verifier may print to standard output.
        self._replies, theirs = os.pipe()
        options = json.dumps({**self._options, "replies": theirs})
        self._num_checks = 0

        # A trusted verifier has the trainer's environment, any other the few variables it needs.
        if own.is_own(self._verifier) and own.is_trusted(self._verifier):
            environment = dict(os.environ)
        else:
            environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        # Several workers are the parallelism.
        environment["OMP_NUM_THREADS"] = "1"
        # Where this process found its packages; the project need not be installed.
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)

        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_real.labels.worker", options],
            bufsize=0,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs,),
        )
        # The worker has the only writing end now, so that the pipe ends when the worker does.
        os.close(theirs)
        assert self._process.stdin is not None, "a pipe"
        # A process that does not read must not stop the clock.
        os.set_blocking(self._process.stdin.fileno(), False)

    def wait_until_ready(self) -> None:
        """Waits for the process's first line, in which it says what it is behind.

        Raises:
            ValueError: the verifier cannot be loaded.
        """
        line = self._exchange(b"", _STARTUP_SECONDS)
        if line is None:
            error = "its process does not answer"
        elif line == b"":
            error = "its process ended"
        else:
            try:
                reply = json.loads(line)
                error = reply["error"]
                if error is None:
                    self.rung = Rung(reply["rung"])
                    self.why = reply["why"]
                    self.threads = reply["threads"]
            except (ValueError, TypeError, KeyError):
                error = "its process answered with something else"

        if error is not None:
            self.kill()
            raise ValueError(f"labels.verifier = {self._verifier} cannot be loaded ({error})")

    def check(self, check: Check, clock: _Clock) -> CheckOutcome:
        """Runs one check.

        Returns:
            The verifier's outcome, `timeout` when its time was over, or `crashed` when the process
            ended.
        """
        # It may have died while it was idle.
        if self._process is None or self._process.poll() is not None:
            self.kill()
            self.start()
            self.wait_until_ready()

        started = time.monotonic()
        processor_seconds = clock.processor_seconds()
        request = {
            "text": check.text,
            "answers": list(check.answers),
            "metadata": dict(check.metadata),
            "processor_seconds": processor_seconds,
        }
        self._num_checks += 1
        line = self._exchange(json.dumps(request).encode() + b"\n", clock.seconds)
        seconds = time.monotonic() - started

        if line is None:
            self.kill()
            clock.count(timeout=True)
            return CheckOutcome("timeout", None, seconds, f"no answer within {clock.seconds:.3g} s")

        if line == b"":
            # The process is about to end: patience, on a busy machine too, gets its own exit code.
            code = self.kill(patience=_END_SECONDS)
            clock.count(timeout=code == -signal.SIGPROF)
            if code == -signal.SIGPROF:
                reason = f"no answer within {processor_seconds:.3g} s of processor time"
                return CheckOutcome("timeout", None, seconds, reason)
            reason = f"the verifier process ended with code {code}"
            return CheckOutcome("crashed", None, seconds, reason)

        try:
            outcome, is_last = self._outcome(line, seconds)
        except _BrokenReplyError:
            self.kill()
            clock.count(timeout=False)
            return CheckOutcome("crashed", None, seconds, "the worker's reply is none")

        if is_last:
            self.kill()
        if is_last and self._num_checks == 1 and not self._has_warned:
            # Workers are replaced after every check: that is a second or more for each.
            self._has_warned = True
            logger.warning(
                "a worker of labels.verifier = %s was replaced after one check, because that took "
                "more than half of labels.memory_mib = %d; raise it",
                self._verifier,
                self._options["memory_mib"],
            )
        clock.count(timeout=outcome.status == "timeout")
        return outcome

    def _outcome(self, line: bytes, seconds: float) -> tuple[CheckOutcome, bool]:
        """Returns what the reply says, and whether it is the worker's last.

        Raises:
            _BrokenReplyError: it is no reply to the last request. A verifier's own code may have
                written it.
        """
        try:
            match json.loads(line):
                case {
                    "number": int(number),
                    "status": str(status),
                    "reward": (None | int() | float()) as reward,
                    "reason": str(reason),
                    "last": bool(last),
                } if number == self._num_checks and status in _STATUSES:
                    if reward is None or math.isfinite(reward):
                        return CheckOutcome(status, reward, seconds, reason), last
        except (ValueError, RecursionError, OverflowError):
            pass
        raise _BrokenReplyError

    def kill(self, *, patience: float = 0) -> int | None:
        """Ends the process and all that it started.

        Returns its exit code, its own if it ends within `patience` s.
        """
        process = self._process
        self._process = None
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
        self.closed = True
        process = self._process  # the thread sets it to None at any time
        if process is not None:
            _end(process)

    def _exchange(self, request: bytes, seconds: float) -> bytes | None:
        """Sends `request` and returns the process's next line.

        b"" when the process ended, None when the time is over.
        """
        assert self._process is not None and self._process.stdin is not None, "it was started"
        requests = self._process.stdin.fileno()
        deadline = time.monotonic() + seconds
        line = b""

        # select() cannot take file descriptors above 1023, which a trainer may have.
        poller = select.poll()
        poller.register(self._replies, select.POLLIN)
        while not line.endswith(b"\n") and len(line) <= _MAX_REPLY_BYTES:
            if request:
                poller.register(requests, select.POLLOUT)
            left = deadline - time.monotonic()
            # In milliseconds.
            ready = dict(poller.poll(max(left, 0) * 1000))

            # Replies first: a worker that has ended is seen before more is written to it.
            if self._replies in ready:
                piece = os.read(self._replies, 1 << 16)
                if not piece:
                    return b""
                line += piece
            elif requests in ready:
                try:
                    num_written = os.write(requests, request)
                except BrokenPipeError:
                    return b""
                request = request[num_written:]
                if not request:
                    poller.unregister(requests)
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
