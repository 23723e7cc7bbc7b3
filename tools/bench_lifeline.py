"""What holds all ranks together (supervision/lifeline.py): sockets, and seconds to the last end.

    python tools/bench_lifeline.py
    # with the lifeline of an earlier commit beside today's
    python tools/bench_lifeline.py --before 5f464ca

Every rank is a process with a lifeline and nothing else, all on this machine; machines of 8 ranks
are made up by their names. One rank is killed: the first, the first of the second machine, below
which there are others, or the last. Seconds go from the kill to the end of the last process; every
process must have ended by the killed one's name.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from earlier import source_at

from megatron_real.supervision import lifeline

RANKS_OF_A_MACHINE = 8


def source_of(commit: str) -> str:
    """runs/lifeline.py as it was at a commit, with today's place of what it imports."""
    source = source_at(commit, "megatron_real/runs/lifeline.py")
    return source.replace("megatron_real.runs.places", "megatron_real.supervision.places")


def module_of(file: str) -> Any:
    """Today's lifeline, or the one in a file."""
    if not file:
        return lifeline
    spec = importlib.util.spec_from_file_location("lifeline_before", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def num_sockets() -> int:
    """Of this process."""
    count = 0
    for file in Path("/proc/self/fd").iterdir():
        # The lifeline's thread opens and closes files meanwhile.
        with suppress(OSError):
            count += "socket:" in str(file.readlink())
    return count


def be_rank(module: Any, rank: int, world: int, parent: Connection, errors: str) -> None:
    """One rank, which joins, tells how many sockets it has, and waits for its end."""
    # Appending, so that sentences of ranks that end together do not overwrite each other.
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), 2)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    # Machines are told apart by their names alone.
    module.socket.gethostname = lambda: f"n{rank // RANKS_OF_A_MACHINE}"

    def gathered(value: Any) -> list[Any]:
        parent.send(value)
        values: list[Any] = parent.recv()
        return values

    before = num_sockets()
    if hasattr(module, "tree"):
        module.Lifeline(rank, world, gathered=gathered)
    else:
        module.Lifeline(rank, world, share=lambda value: gathered(value)[0])
    parent.send(num_sockets() - before)
    time.sleep(3600)


def killed(file: str, world: int, victim: int) -> dict[str, Any]:
    """Sockets of the busiest rank, seconds until all have joined, and until the last has ended."""
    module = module_of(file)
    context = mp.get_context("fork")
    pipes = []
    processes = []
    with tempfile.NamedTemporaryFile() as errors:
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=be_rank, args=(module, rank, world, theirs, errors.name), daemon=True
            )
            process.start()
            # Else a rank that dies would leave its end open here, and the read below would hang.
            theirs.close()
            pipes.append(ours)
            processes.append(process)

        values = [pipe.recv() for pipe in pipes]
        started = time.perf_counter()
        for pipe in pipes:
            pipe.send(values)
        # The earlier lifeline shared one value; today's gathers twice.
        if not file:
            values = [pipe.recv() for pipe in pipes]
            for pipe in pipes:
                pipe.send(values)
        try:
            sockets = [pipe.recv() for pipe in pipes]
        except EOFError:
            sentences = Path(errors.name).read_text(encoding="utf-8")
            raise RuntimeError(f"a rank did not join: {sentences[-2000:]}") from None
        joined = time.perf_counter() - started

        started = time.perf_counter()
        os.kill(processes[victim].pid or 0, signal.SIGKILL)
        for process in processes:
            process.join(300)
        ended = time.perf_counter() - started
        sentences = Path(errors.name).read_text(encoding="utf-8")
    # Every other rank must have ended by the killed one's name, and not by a neighbour's.
    name = f"rank {victim} on n{victim // RANKS_OF_A_MACHINE} ended without a word"
    assert sentences.count(name) == world - 1, sentences[-2000:]
    return {
        "sockets of the busiest rank": max(sockets),
        "seconds to join": joined,
        "seconds to the last end": ended,
    }


def send_killed(parent: Connection, *arguments: Any) -> None:
    """Sends what `killed` returns."""
    parent.send(killed(*arguments))


def in_a_small_process(*arguments: Any) -> dict[str, Any]:
    """Calls `killed` in a process that has not imported torch, of which 512 are forked quickly."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([lifeline.__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=send_killed, args=(theirs, *arguments))
    process.start()
    theirs.close()
    row: dict[str, Any] = ours.recv()
    process.join()
    return row


def main() -> None:
    # Not at the top: every rank imports this file, and this would import torch.
    from bench_machine import add_options, apply_options, show

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", default="", help="a commit whose lifeline is measured too")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--killed", type=int, nargs="+", help="ranks; default: those named above")
    add_options(parser, rounds=1)
    options = parser.parse_args()
    apply_options(options)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {"now": ""}
        if options.before:
            earlier = Path(folder) / "lifeline_before.py"
            earlier.write_text(source_of(options.before), encoding="utf-8")
            files = {"before": str(earlier), "now": ""}
        for world in options.ranks:
            victims = options.killed or [0, RANKS_OF_A_MACHINE, world - 1]
            for victim in sorted(set(victims) & set(range(world))):
                for way, file in files.items():
                    row = {"ranks": world, "killed": victim, "way": way}
                    rows.append(row | in_a_small_process(file, world, victim))
    show("One rank is killed", rows, options)


if __name__ == "__main__":
    main()
