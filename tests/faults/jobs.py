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

SILENT_SECONDS = 3.0
HANG_SECONDS = 3.0


class Run:
    """One rank of a run of stages, which can be disturbed at a named point."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.timer = StageTimer()
        self.ranks = Ranks.of_all(timedelta(seconds=300))
        self.lifeline = Lifeline(
            self.ranks.rank,
            self.ranks.world,
            gathered=self.ranks.gathered,
            stage=self.timer.at,
            beat_seconds=0.3,
            silent_seconds=SILENT_SECONDS,
            hang_seconds=HANG_SECONDS,
        )

    def reached(self, point: str) -> None:
        """Records that this rank has come to a point, and does the fault that is planned there."""
        (self.folder / f"{point}-{self.ranks.rank}").touch()
        planned_point, _, rest = os.environ.get("FAULT", "").partition(":")
        planned_rank, _, kind = rest.partition(":")
        if (planned_point, planned_rank) != (point, str(self.ranks.rank)):
            return

        if kind == "sleep":
            time.sleep(600)
        if kind == "freeze":
            os.kill(os.getpid(), 19)  # SIGSTOP
        if kind == "kill":
            os.kill(os.getpid(), 9)
        if kind == "error":
            raise OSError(5, "Input/output error")
        if kind == "exit":
            self.lifeline.close("an error that every rank should have")
            os._exit(3)

    def steps(self) -> None:
        """Three stages with a collective each, and work of the first rank alone
        between two of them.
        """
        try:
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
        except BaseException as error:
            self.lifeline.say_end(f"{type(error).__name__}: {error}")
            raise
        self.lifeline.close()


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

    from megatron_real.rollout.watch import Watch

    run = Run(folder)
    # The first rank's watch ends the run; the other's must not come before it.
    seconds = 60.0
    if run.ranks.rank == 0:
        seconds = 2.0
    with Watch(1, seconds) as watch:
        watch.at = "a key that nobody sets"
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
