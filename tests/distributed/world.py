"""Process groups of any size for test functions: each call has fresh processes,
forked from one that has imported all.

Importing torch and megatron-core costs seconds, forking milliseconds. Fresh processes carry nothing
over from one test to the next: no process group, whose threads would go on polling, and no random
state.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.ports import free_port

SECONDS = 600
"""Longest that one call may take: for ranks that hang.

A layout of twenty cases needs ten on an idle machine, and a busy one has needed a hundred.
"""


class World:
    """Runs a test's function on any number of ranks, each a fresh process."""

    def __init__(self, preload: str = "tests.distributed.preload") -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload([preload])

    def run(self, function: Callable[..., Any], size: int, **arguments: Any) -> list[Any]:
        """Calls function(**arguments) on `size` ranks and returns their results in rank order.

        Raises:
            AssertionError: a rank raised; the message has the tracebacks.
            TimeoutError: a rank did not answer within SECONDS.
        """
        port = free_port()
        ranks: dict[Connection, int] = {}
        processes = []
        for rank in range(size):
            ours, theirs = self._context.Pipe()
            # Not a daemon: megatron-core's checkpoint writer starts processes of its own.
            process = self._context.Process(
                target=_serve, args=(theirs, function, rank, size, port, arguments)
            )
            process.start()
            theirs.close()
            ranks[ours] = rank
            processes.append(process)

        try:
            answers = _answers(ranks)
        finally:
            deadline = time.monotonic() + 5
            for process in processes:
                process.join(timeout=max(0.0, deadline - time.monotonic()))
                process.kill()

        # A failure is reported before a rank that gave no answer: it is most often the cause.
        failures = [f"rank {rank}:\n{value}" for rank, (ok, value) in answers.items() if not ok]
        if failures:
            raise AssertionError("\n".join(failures))
        if len(answers) < size:
            raise TimeoutError(
                f"{function.__name__}: only ranks {sorted(answers)} of {size} answered "
                f"in {SECONDS} s"
            )
        return [answers[rank][1] for rank in range(size)]


def _answers(ranks: dict[Connection, int]) -> dict[int, tuple[bool, Any]]:
    """Returns for each rank whether its call succeeded, and the result or the traceback.

    Reading stops after the first failure, so later ranks may be missing.
    """
    answers: dict[int, tuple[bool, Any]] = {}
    waiting = dict(ranks)
    deadline = time.monotonic() + SECONDS
    while waiting and time.monotonic() < deadline and all(ok for ok, _ in answers.values()):
        for pipe in wait(list(waiting), timeout=1):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            try:
                answers[rank] = pipe.recv()
            except EOFError:
                answers[rank] = False, "the process ended without an answer"
            pipe.close()
    return answers


def _serve(
    pipe: Connection,
    function: Callable[..., Any],
    rank: int,
    size: int,
    port: int,
    arguments: dict[str, Any],
) -> None:
    import torch.distributed as dist

    from megatron_real.parallel.groups import leave_world

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        dist.init_process_group("gloo", rank=rank, world_size=size)
        pipe.send((True, function(**arguments)))
    except Exception:  # whatever went wrong is the test's to report
        pipe.send((False, traceback.format_exc()))
        return
    leave_world()  # a rank that ends early makes the others' threads abort
    pipe.poll(None)  # tensors of the answer lie in this process's memory until they are taken
