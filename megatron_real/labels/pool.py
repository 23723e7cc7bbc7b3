"""Killable verifier processes with a hard wall clock per check."""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from megatron_real.labels.verifiers import Result

logger = logging.getLogger(__name__)

_STARTUP_SECONDS = 120.0


@dataclass(frozen=True)
class Check:
    """One completion to verify."""

    text: str
    """The decoded completion."""
    answers: Sequence[str]
    """Accepted gold answers."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """The row's extra_info; must be JSON."""


class VerifierPool:
    """`run(checks)` verifies on `workers` processes. A check that outlasts its time costs its own worker only.

    Example:
        with VerifierPool("math_verify", workers=2, timeout_seconds=10, memory_mib=1024) as pool:
            results = pool.run([Check("so it is \\boxed{5}", ["5"])])
    """

    def __init__(self, verifier: str, *, workers: int, timeout_seconds: float, memory_mib: int) -> None:
        self._workers = [_Worker(verifier, timeout_seconds, memory_mib) for _ in range(workers)]
        self._idle: queue.Queue[_Worker] = queue.Queue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verifier")
        list(self._threads.map(_Worker.start, self._workers))

    def run(self, checks: Sequence[Check]) -> list[tuple[Result, float]]:
        """[checks] (status and reward, seconds), in order. Never raises for what a completion holds."""
        return list(self._threads.map(self._one, checks))

    def _one(self, check: Check) -> tuple[Result, float]:
        worker = self._idle.get()
        try:
            started = time.monotonic()
            return worker.check(check), time.monotonic() - started
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.kill()

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """One verifier process, started anew whenever it had to be killed or died."""

    def __init__(self, verifier: str, timeout_seconds: float, memory_mib: int) -> None:
        self._command = [sys.executable, "-m", "megatron_real.labels.worker", verifier, str(memory_mib)]
        self._timeout = timeout_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process and waits until its imports are done.

        Raises:
            RuntimeError: it ended or did not answer.
        """
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        if self._answer(_STARTUP_SECONDS) != b"ready\n":
            self.kill()
            raise RuntimeError(f"a verifier process did not start: {' '.join(self._command)}")

    def check(self, check: Check) -> Result:
        """The verifier's result, `timeout` after the wall clock, or `crashed` when the process ended."""
        if self._process is None:
            self.start()
        assert self._process is not None and self._process.stdin is not None, "started above"
        request = json.dumps({"text": check.text, "answers": list(check.answers), "metadata": dict(check.metadata)})
        try:
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
            line = self._answer(self._timeout)
        except BrokenPipeError:
            line = b""
        if line:
            status, reward = json.loads(line)
            return status, reward
        self.kill()
        return ("timeout", None) if line is None else ("crashed", None)

    def kill(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answer(self, seconds: float) -> bytes | None:
        """One line of the process, b"" when it ended, None when the time is over."""
        assert self._process is not None and self._process.stdout is not None, "the process runs"
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else None
