"""What ranks run in the fault-injection tests.

    python -m tests.faults.jobs CASE RANK WORLD PORT FOLDER

Each case has real lifelines, ranks, watches and gloo collectives, but no model: faults come in the
places where a training run has them, and the run ends within seconds.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_real.parallel.collective import RankFailed
from megatron_real.parallel.ranks import Ranks
from megatron_real.progress import StageTimer
from megatron_real.supervision.lifeline import Lifeline

LIMIT_SECONDS = 3.0
"""After which a rank that is frozen counts as silent, and one that sleeps as hanging."""
LONG_SECONDS = 600.0
"""The same limits where the planned fault is another one: no busy machine passes them."""


class Run:
    """One rank of a run of stages, which can be disturbed at a named point."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        planned_point, _, rest = os.environ.get("FAULT", "").partition(":")
        planned_rank, _, self.kind = rest.partition(":")
        self.place = (planned_point, planned_rank)
        self.timer = StageTimer()
        self.ranks = Ranks.of_all(timedelta(seconds=300))
        self.lifeline = Lifeline(
            self.ranks.rank,
            self.ranks.world,
            gathered=self.ranks.gathered,
            stage=self.timer.at,
            beat_seconds=0.3,
            silent_seconds=LIMIT_SECONDS if self.kind == "freeze" else LONG_SECONDS,
            hang_seconds=LIMIT_SECONDS if self.kind == "sleep" else LONG_SECONDS,
        )

    def reached(self, point: str) -> None:
        """Records that this rank has come to a point, and does the fault that is planned there."""
        (self.folder / f"{point}-{self.ranks.rank}").touch()
        if (point, str(self.ranks.rank)) != self.place:
            return

        if self.kind == "sleep":
            time.sleep(600)
        if self.kind == "freeze":
            os.kill(os.getpid(), 19)  # SIGSTOP
        if self.kind == "kill":
            os.kill(os.getpid(), 9)
        if self.kind == "error":
            raise OSError(5, "Input/output error")
        if self.kind == "exit":
            self.lifeline.close("an error that every rank should have")
            os._exit(3)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Tells the other ranks of an error, and waits for the word that one of them has ended
        first.
        """
        try:
            yield
        except BaseException as error:
            self.lifeline.say_end(f"{type(error).__name__}: {error}")
            raise
        self.lifeline.close()

    def steps(self) -> None:
        """Three stages with a collective each, and work of the first rank alone
        between two of them.
        """
        with self.watched():
            for step in range(1, 4):
                with self.timer.stage("rollout"):
                    self.reached(f"rollout{step}")
                    dist.all_reduce(torch.ones(1))
                with self.timer.stage("update"):
                    self.reached(f"update{step}")
                    dist.all_reduce(torch.ones(1))
                self.reached(f"between{step}")
                with self.timer.stage("label"):
                    self.ranks.every(partial(self.reached, f"gathered{step}"))


def steps(folder: Path) -> None:
    """The lifeline under every fault."""
    Run(folder).steps()


def thread(folder: Path) -> None:
    """A collective in a thread, as a checkpoint's writer has: what fails there fails on every rank,
    and all go on.
    """
    run = Run(folder)
    writers = Ranks.of_all(timedelta(seconds=300))
    heard: list[str] = []

    def write() -> None:
        try:
            writers.every(lambda: run.reached("digests"))
        except RankFailed as error:
            heard.append(str(error))

    writer = threading.Thread(target=write)
    writer.start()
    writer.join(60)
    assert not writer.is_alive(), "this rank is still in the collective"
    print(f"heard {heard}", flush=True)
    run.steps()


def store(folder: Path) -> None:
    """A sync whose main thread waits in the job's store, and holds its client meanwhile."""
    from torch.distributed.distributed_c10d import _get_default_store

    from megatron_real.rollout import watch

    run = Run(folder)
    first = run.ranks.rank == 0
    # The first rank's watch ends the run; the other's must not come before it.
    sync = watch.Watch(1, 2.0 if first else LONG_SECONDS)
    sync.at = "a key that nobody sets"
    if first:
        # The other's watch has said by then what it waits for.
        watch.own_store(timedelta(seconds=240)).wait([watch._key(1)])
    with run.watched(), sync:
        _get_default_store().get("never")


def main() -> None:
    case, rank, world, port, folder = sys.argv[1:]
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.update(RANK=rank, WORLD_SIZE=world, MASTER_PORT=port)
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    job: Any = {"steps": steps, "thread": thread, "store": store}[case]

    job(Path(folder))

    print("finished", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
