"""A persistent set of processes that run test functions in process groups of any size.

Starting a process costs seconds (torch, megatron-core), forming a gloo group milliseconds: so one set of workers serves
the whole test session, and each call forms the group that it needs.
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing as mp
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

SECONDS = 90
"""Longest that one call may take; a layout needs about one second."""


class World:
    """`run(function, size, **arguments)` calls function(**arguments) on `size` ranks and returns their results."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()
        atexit.register(self.close)

    def run(self, function: Callable[..., Any], size: int, **arguments: Any) -> list[Any]:
        """Raises AssertionError with the ranks' tracebacks, TimeoutError where a rank does not answer."""
        assert size <= self.size, f"{size} ranks asked of {self.size}"
        port = _free_port()
        for rank, pipe in enumerate(self._pipes[:size]):
            pipe.send((function, rank, size, port, arguments))
        deadline = time.monotonic() + SECONDS
        answers: dict[int, tuple[bool, Any]] = {}
        while len(answers) < size and time.monotonic() < deadline and all(ok for ok, _ in answers.values()):
            for rank, pipe in enumerate(self._pipes[:size]):
                if rank not in answers and pipe.poll(0.01):
                    answers[rank] = pipe.recv()
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in answers.items() if not ok]
        if failures or len(answers) < size:
            # The other ranks may wait for the failed one for ever.
            self.close()
            self._start()
            if failures:
                raise AssertionError("\n".join(failures))
            raise TimeoutError(f"{function.__name__}: only ranks {sorted(answers)} of {size} answered in {SECONDS} s")
        return [answers[rank][1] for rank in range(size)]

    def close(self) -> None:
        """Lets idle workers end, and with them what they started; kills those that do not."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + 5
        for process in self._processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
            process.kill()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(self.size):
            ours, theirs = context.Pipe()
            # Not a daemon: megatron-core's checkpoint writer starts processes of its own.
            process = context.Process(target=_serve, args=(theirs,))
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _serve(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from megatron_real import cpu

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    cpu.enable()
    from megatron.core import parallel_state

    while True:
        try:
            function, rank, size, port, arguments = pipe.recv()
        except EOFError:
            return  # the session is over
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            dist.init_process_group("gloo", rank=rank, world_size=size)
            pipe.send((True, function(**arguments)))
        except Exception:  # whatever went wrong is the test's to report
            pipe.send((False, traceback.format_exc()))
        finally:
            parallel_state.destroy_model_parallel()
            if dist.is_initialized():
                dist.destroy_process_group()
            gc.collect()  # each gloo group that something still refers to keeps threads that poll
