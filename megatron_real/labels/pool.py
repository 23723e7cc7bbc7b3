"""Killable verifier processes with a hard wall clock per check.

Each process is a fresh interpreter, never a fork: it inherits no thread, lock or device of the trainer. A thread of
this process owns it, feeds it one check at a time, kills it when the check's time is over, and starts the next one.
"""

from __future__ import annotations

import json
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

T = TypeVar("T")

_STARTUP_SECONDS = 120.0
# An honest check takes milliseconds. When many of the last checks ran out of time, the next get less processor time, so
# that a policy that has learned to write factorials cannot freeze a step; but never less than this. It is not the wall
# clock that is cut: on a busy machine an honest check may have to wait.
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
    """`ok`, `wrong`, `unparsable` or `score` from the verifier; `timeout` or `crashed` where it gave none."""
    reward: float | None
    """The verifier's number, finite; None where there is none."""
    seconds: float
    """Wall clock of the check, without the start of its process."""
    reason: str = ""
    """Why it crashed."""


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
        require_think: bool = False,
        require_boxed: bool = True,
    ) -> None:
        """Starts the workers.

        Raises:
            ValueError: the verifier cannot be loaded.
        """
        options = {"verifier": verifier, "memory_mib": memory_mib}
        options |= {"require_think": require_think, "require_boxed": require_boxed}
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
        # Daemons: an interrupted run does not wait for the checks that are left.
        self._threads = [threading.Thread(target=self._serve, args=(w,), daemon=True) for w in self._workers]
        for thread in self._threads:
            thread.start()

    def submit(self, check: Check, then: Callable[[Outcome], T]) -> Future[T]:
        """`then` of the check's outcome, once there is one. Never raises for what a completion holds."""
        future: Future[T] = Future()

        def task(worker: _Worker) -> None:
            try:
                future.set_result(then(worker.check(check, self._clock)))
            except Exception as error:  # a worker that cannot be started again: whoever waits must hear of it
                future.set_exception(error)

        self._tasks.put(task)
        return future

    def run(self, checks: Sequence[Check]) -> list[Outcome]:
        """[checks] outcomes, in order."""
        return [future.result() for future in [self.submit(check, lambda outcome: outcome) for check in checks]]

    def close(self) -> None:
        """Ends the processes. Checks that are still in flight count as crashed, those that wait are dropped."""
        for worker in self._workers:
            self._tasks.put(None)
            worker.close()

    def _serve(self, worker: _Worker) -> None:
        while (task := self._tasks.get()) is not None and not worker.closed:
            task(worker)

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
        """Processor time of the next check: the wall clock's, divided by 1 + the timeouts among the last checks."""
        with self._lock:
            return max(self.seconds / (1 + sum(self._recent)), min(self.seconds, _LEAST_SECONDS))

    def count(self, *, timeout: bool) -> None:
        """Remembers how a check ended."""
        with self._lock:
            self._recent.append(timeout)


class _Worker:
    """One verifier process, started anew whenever it had to be killed or died."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._command = [sys.executable, "-m", "megatron_real.labels.worker", json.dumps(options)]
        self._verifier = options["verifier"]
        self._process: subprocess.Popen[bytes] | None = None
        self.closed = False

    def start(self) -> None:
        """Starts the process; its imports take a while."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            self._command, bufsize=0, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None, "a pipe"
        os.set_blocking(self._process.stdin.fileno(), False)  # a process that does not read must not stop the clock

    def wait_until_ready(self) -> None:
        """Raises ValueError if the verifier cannot be loaded."""
        line = self._exchange(b"", _STARTUP_SECONDS)
        error = json.loads(line)["error"] if line else f"its process {'ended' if line == b'' else 'does not answer'}"
        if error is not None:
            self.kill()
            raise ValueError(f"labels.verifier = {self._verifier} cannot be loaded ({error})")

    def check(self, check: Check, clock: _Clock) -> Outcome:
        """The verifier's outcome, `timeout` when its time was over, or `crashed` when the process ended."""
        if self._process is None or self._process.poll() is not None:  # it may have died while it was idle
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
        line = self._exchange(json.dumps(request).encode() + b"\n", clock.seconds)
        seconds = time.monotonic() - started
        code = None if line else self.kill(patience=0 if line is None else 1)
        clock.count(timeout=line is None or code == -signal.SIGPROF)
        if line is None:
            return Outcome("timeout", None, seconds, f"no answer within {clock.seconds:.3g} s")
        if code == -signal.SIGPROF:
            return Outcome("timeout", None, seconds, f"no answer within {processor_seconds:.3g} s of processor time")
        if not line:
            return Outcome("crashed", None, seconds, f"the verifier process ended with code {code}")
        reply = json.loads(line)
        if reply["last"]:
            self.kill()
        return Outcome(reply["status"], reply["reward"], seconds, reply["reason"])

    def kill(self, *, patience: float = 0) -> int | None:
        """Ends the process, whatever it is doing; returns its exit code, its own if it ends within `patience` s."""
        process, self._process = self._process, None
        if process is None:
            return None
        assert process.stdin is not None and process.stdout is not None, "pipes"
        try:
            code = process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        process.stdin.close()
        process.stdout.close()
        return code

    def close(self) -> None:
        """Ends the process for good; the thread that waits for it finds that it ended."""
        self.closed, process = True, self._process
        if process is not None:
            process.kill()
            process.wait()

    def _exchange(self, request: bytes, seconds: float) -> bytes | None:
        """The process's next line after `request`, b"" when it ended, None when the time is over."""
        assert self._process is not None, "it was started"
        assert self._process.stdin is not None and self._process.stdout is not None, "pipes"
        to, back = self._process.stdin.fileno(), self._process.stdout.fileno()
        deadline, line = time.monotonic() + seconds, b""
        poller = select.poll()  # select() cannot take file descriptors above 1023, which a trainer may have
        poller.register(back, select.POLLIN)
        while not line.endswith(b"\n"):
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
