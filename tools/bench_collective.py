"""What ranks tell each other beside tensors: calls, bytes and time, and the sockets that it takes.

    python tools/bench_collective.py
    # with the collectives of an earlier commit beside today's
    python tools/bench_collective.py --before 5f464ca

Real ranks on gloo, processes of this machine. Bytes are what a rank receives, its own part among
them, counted at torch.distributed: W parts of an all-gather, one of a broadcast, two of a sum. The
step is one of two machines with one chunk of rollouts and a comparison of checksums: the first rank
looks for the chunk, two writes must go well on all ranks, and no rank complains of a tensor.

Sockets are those of one process after one, two and three gloo groups of all ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_machine import add_options, apply_options, show
from earlier import module_at
from torch.distributed import distributed_c10d as c10d

from megatron_real.parallel import collective

Way = Callable[[Any, dist.ProcessGroup], None]


def nothing() -> None:
    """An action that goes well."""


def all_well(module: Any, group: dist.ProcessGroup) -> None:
    """Every rank acts, and nobody needs the results."""
    if hasattr(module, "all_well"):
        module.all_well(nothing, group=group)
    else:
        module.on_every_rank(nothing, group=group)


def from_first(module: Any, group: dist.ProcessGroup, *, size: int = 0) -> None:
    """The first rank acts, and all get its result, of so many bytes."""

    def action() -> bytes:
        if dist.get_rank() == 0:
            return bytes(size)
        return b""

    if hasattr(module, "on_first"):
        module.on_first(action, group=group)
    else:
        module.on_every_rank(action, group=group)


def no_complaint(module: Any, group: dist.ProcessGroup) -> None:
    """Every rank has a list of complaints, which is empty."""
    if hasattr(module, "gathered_if_any"):
        module.gathered_if_any([], group=group)
    else:
        dist.all_gather_object([None] * dist.get_world_size(group), [], group=group)


def step(module: Any, group: dist.ProcessGroup) -> None:
    """What the module's docstring says."""
    from_first(module, group)
    all_well(module, group)
    all_well(module, group)
    no_complaint(module, group)


WAYS: dict[str, Way] = {
    "all went well": all_well,
    "from the first": from_first,
    "1 MiB from the first": lambda module, group: from_first(module, group, size=1 << 20),
    "no complaint": no_complaint,
    "a step": step,
}


class Counted:
    """Counts the calls of torch.distributed and the bytes that this rank receives."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        for name, parts in {"all_gather": 0, "broadcast": 1, "all_reduce": 2}.items():
            counted = self._counting(getattr(c10d, name), parts)
            # In both: torch's collectives of objects look them up in c10d, our code in dist.
            setattr(c10d, name, counted)
            setattr(dist, name, counted)

    def _counting(self, call: Callable[..., Any], parts: int) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            if parts:
                received = parts * arguments[0].nbytes
            else:
                # An all-gather's first argument is the list of what comes.
                received = sum(tensor.nbytes for tensor in arguments[0])
            self.counts["calls"] += 1
            self.counts["bytes"] += received
            return call(*arguments, **options)

        return counting


def num_sockets() -> int:
    """Of this process."""
    count = 0
    for file in Path("/proc/self/fd").iterdir():
        if file.is_symlink():
            count += "socket:" in str(file.readlink())
    return count


def rank_of(rank: int, world: int, options: argparse.Namespace, file: str, out: Any) -> None:
    """One rank; the first one sends the rows to `out`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    sockets = [num_sockets()]
    group = dist.new_group(backend="gloo")
    sockets.append(num_sockets())
    another = dist.new_group(backend="gloo")
    sockets.append(num_sockets())

    modules = {"now": collective}
    if options.before:
        modules = {
            "before": module_at(options.before, "megatron_real/collective.py"),
            "now": collective,
        }
    counted = Counted()
    rows = []
    for name, act in WAYS.items():
        for when, module in modules.items():
            # The first call makes connections, and is not counted.
            act(module, group)
            dist.barrier()
            counted.counts.clear()
            started = time.perf_counter()
            for _ in range(options.rounds):
                act(module, group)
            seconds = (time.perf_counter() - started) / options.rounds
            row = {"ranks": world, "what": name, "way": when}
            row |= {key: counted.counts[key] // options.rounds for key in ("calls", "bytes")}
            rows.append(row | {"ms": 1e3 * seconds})
    if rank == 0:
        out.put((rows, {"ranks": world, **dict(zip("123", sockets, strict=True))}))
    dist.barrier(another)
    dist.destroy_process_group()


def measured(world: int, options: argparse.Namespace) -> tuple[list[Any], dict[str, Any]]:
    """The first rank's rows, and its sockets."""
    context = mp.get_context("fork")
    out = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "store")
        processes = [
            context.Process(target=rank_of, args=(rank, world, options, file, out), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        # Read before the ranks are joined: one whose queue is not emptied does not end.
        rows_and_sockets: tuple[list[Any], dict[str, Any]] = out.get(timeout=600)
        for process in processes:
            process.join()
    return rows_and_sockets


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", default="", help="a commit whose way is measured too")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8])
    add_options(parser, rounds=20)
    options = parser.parse_args()
    apply_options(options)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    rows = []
    sockets = []
    for world in options.ranks:
        rows_of_world, sockets_of_world = measured(world, options)
        rows += rows_of_world
        sockets.append(sockets_of_world)
    show("What ranks tell each other", rows, options)
    show("Sockets of a process, by gloo groups", sockets, options)


if __name__ == "__main__":
    main()
