"""How a step's rollouts reach the ranks that train on them, and the disk: before and after,
side by side.

    python tools/bench_data_plane.py

    before   every rank's rollouts are pickled and gathered by all ranks (all_gather_object); files
             are JSON lines
    after    facts are summed as a table, tokens go once to the ranks that train on them
             (parallel/exchange.py); files are parquet

The first table is the real code on ranks of this machine, over gloo. The second is one process that
plays one rank of a large run, of the recipe's worst step: it does all that this rank's CPU does,
with the very bytes that would come from the others; its seconds are of the processor, and the
network takes no time. Data-parallel replicas are of 8 ranks there. The third is about files.

Bytes a rank counts what it sends and receives, a sum over ranks as a ring moves it (twice the
tensor). Peak is host memory beyond what the process had before.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import multiprocessing as mp
import os
import pickle
import random
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from bench_machine import add_options, apply_options, show
from numpy.typing import NDArray

from megatron_real.batching import Layout, plan
from megatron_real.parallel import exchange as exchange_module
from megatron_real.parallel.exchange import Exchange
from megatron_real.records import Completion, Prompt, Rollout, Verdict
from megatron_real.runs.columns import plain_rows, read_table, write_table

GROUP = 8
PROMPT_TOKENS = 256
RANKS_OF_A_REPLICA = 8


@dataclass(frozen=True)
class Cost:
    """What one way takes on one rank."""

    seconds: float
    """Of its CPU and, on real ranks, of waiting for others."""
    num_bytes: int
    """Sent and received."""
    peak_mib: float
    """Host memory beyond what was there before."""

    def row(self, way: str) -> dict[str, Any]:
        """For a table."""
        return {
            "way": way,
            "MiB a rank": self.num_bytes / 2**20,
            "peak MiB": self.peak_mib,
            "seconds": self.seconds,
        }


def made_rollouts(count: int, tokens: int, *, shared: bool) -> list[Rollout]:
    """Whole groups of rollouts that are equally long;
    `shared` where all may have the same arrays.
    """
    generator = numpy.random.default_rng(0)

    def completion() -> Completion:
        ids = generator.integers(0, 150_000, tokens, dtype=numpy.int32)
        logprobs = -generator.exponential(0.3, tokens).astype(numpy.float32)
        return Completion(ids, logprobs, "a" * (4 * tokens), finished=True, weight_version=1)

    if shared:
        completions = [completion()] * count
    else:
        completions = [completion() for _ in range(count)]
    verdicts = [Verdict("ok", label, float(label)) for label in (0, 1)]  # type: ignore[arg-type]
    prompts = [
        Prompt(f"p/{i}", "", tuple(range(PROMPT_TOKENS)), ("1",)) for i in range(count // GROUP)
    ]
    return [
        Rollout(prompts[i // GROUP], i // GROUP, i % GROUP, completions[i], verdicts[i % 2])
        for i in range(count)
    ]


def share_of(rollouts: Sequence[Rollout], rank: int, world: int) -> list[Rollout]:
    """The rollouts that a rank has sampled; the last ranks have none where there
    are more ranks than rollouts.
    """
    each = max(1, len(rollouts) // world)
    return list(rollouts[rank * each : (rank + 1) * each])


def wanted_of_ranks(rollouts: Sequence[Rollout], world: int, replica: int) -> list[list[int]]:
    """[ranks] what each trains on, by the real plan."""
    layout = Layout(dp=max(1, world // replica), max_tokens=10_240)
    planned = plan(
        [r.num_tokens for r in rollouts],
        [r.group for r in rollouts],
        layout=layout,
        placement="split",
        needs_scores=True,
    )
    of_replica = [[i for members in rank for i in members] for rank in planned.micro_batches]
    return [of_replica[rank // replica] for rank in range(world)]


def measured(
    action: Callable[[], int], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> Cost:
    """The median of the seconds, and the largest peak, after one round that warms up."""
    seconds = []
    peaks = []
    num_bytes = 0
    for _ in range(1 + rounds):
        gc.collect()
        # Linux: 5 resets the peak of the resident size to what it is now.
        Path("/proc/self/clear_refs").write_text("5")
        before = _peak()
        started = clock()
        num_bytes = action()
        seconds.append(clock() - started)
        peaks.append(_peak() - before)
    return Cost(statistics.median(seconds[1:]), num_bytes, max(peaks[1:]))


def _peak() -> float:
    """MiB: the most that this process has been resident with since the reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


# ---- the real code, on ranks of this machine ----


def real_rank(rank: int, world: int, port: int, options: argparse.Namespace, out: Any) -> None:
    """One rank of the first table; sends the rows' costs to `out`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    rollouts = made_rollouts(options.rollouts, options.tokens, shared=False)
    prompts = [r.prompt for r in rollouts[::GROUP]]
    own = share_of(rollouts, rank, world)
    wanted = wanted_of_ranks(rollouts, world, 2)
    del rollouts
    exchange = Counted(rank, world)

    def before() -> int:
        mine = {(r.group, r.sample): (r.completion, r.verdict) for r in own}
        shares: list[Any] = [None] * world
        dist.all_gather_object(shares, mine)
        return (world + 1) * len(pickle.dumps(mine))

    def after() -> int:
        exchange.num_bytes = 0
        shared = exchange.share(own, prompts)
        exchange.bring(shared, wanted)
        return exchange.num_bytes

    costs = [measured(before, options.rounds), measured(after, options.rounds)]
    # Plain figures: what starts this file as a module of another name could not read a class of it
    # back.
    out.put((rank, [astuple(cost) for cost in costs]))
    dist.barrier()
    dist.destroy_process_group()


def as_bytes(array: NDArray[Any]) -> NDArray[numpy.uint8]:
    """The bytes of an array, as the exchange sends them."""
    return numpy.ascontiguousarray(array).view(numpy.uint8)


class Counted(Exchange):
    """Counts the bytes that this rank sends and receives."""

    num_bytes = 0

    def _sum(self, tensor: torch.Tensor) -> None:
        self.num_bytes += 2 * tensor.nbytes
        super()._sum(tensor)

    def _all_to_all(
        self, outgoing: Sequence[Sequence[NDArray[Any]]], sizes: Sequence[int]
    ) -> NDArray[numpy.uint8]:
        self.num_bytes += sum(a.nbytes for arrays in outgoing for a in arrays) + sum(sizes)
        return super()._all_to_all(outgoing, sizes)


def real(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The largest costs over the ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    out = context.Queue()
    world = options.processes
    processes = [
        context.Process(target=real_rank, args=(rank, world, port, options, out))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    of_rank = dict(out.get(timeout=1800) for _ in processes)
    for process in processes:
        process.join()
    rows = []
    for way in (0, 1):
        figures = zip(*(of_rank[rank][way] for rank in range(world)), strict=True)
        largest = Cost(*map(max, figures))
        rows.append({"ranks": world} | largest.row(("before", "after")[way]))
    return rows


# ---- one rank of many, played ----


class Played(Counted):
    """The first of many ranks: what the others would send has been made ready."""

    def __init__(self, world: int, rollouts: Sequence[Rollout], own: int) -> None:
        super().__init__(0, world)
        self._own = own
        holders = [0] * own + [1 + i % (world - 1) for i in range(len(rollouts) - own)]
        table_R = numpy.zeros(len(rollouts), dtype=exchange_module._FACTS)
        for row, (rollout, holder) in enumerate(zip(rollouts, holders, strict=True)):
            if holder:
                table_R[row] = self._facts(rollout)
                table_R[row]["holder"] = holder
        self._table = torch.from_numpy(table_R.view(numpy.int32))
        self._counts = torch.bincount(torch.tensor(holders), minlength=world)
        self._counts[0] = 0
        self.received: NDArray[numpy.uint8] = numpy.zeros(0, dtype=numpy.uint8)
        self.is_sharing = False

    def _sum(self, tensor: torch.Tensor) -> None:
        self.num_bytes += 2 * tensor.nbytes
        if not self.is_sharing:
            return
        if tensor.shape == self._table.shape:
            tensor += self._table
        else:
            tensor += self._counts

    def _all_to_all(
        self, outgoing: Sequence[Sequence[NDArray[Any]]], sizes: Sequence[int]
    ) -> NDArray[numpy.uint8]:
        parts = [as_bytes(a) for arrays in outgoing for a in arrays]
        # The empty array is for a rank that sends nothing: numpy concatenates no empty list.
        sent = numpy.concatenate([numpy.zeros(0, dtype=numpy.uint8), *parts])
        self.num_bytes += sent.nbytes + sum(sizes)
        return self.received[: sum(sizes)].copy()


def played(world: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The costs of the first rank of `world`."""
    rollouts = made_rollouts(options.worst_rollouts, options.worst_tokens, shared=True)
    prompts = [r.prompt for r in rollouts[::GROUP]]
    # With arrays of their own: pickle writes one that occurs twice once.
    own = [_copied(rollout) for rollout in share_of(rollouts, 0, world)]
    wanted = wanted_of_ranks(rollouts, world, RANKS_OF_A_REPLICA)

    def facts_and_verdicts(share: Sequence[Rollout]) -> dict[Any, Any]:
        return {(r.group, r.sample): (r.completion, r.verdict) for r in share}

    # Every rank has as many as the first one; the last ones of a world larger than the step have
    # none.
    num_shares = len(rollouts) // len(own)
    theirs = pickle.dumps(facts_and_verdicts(own))
    nothing = pickle.dumps({})

    def before() -> int:
        mine = pickle.dumps(facts_and_verdicts(own))
        # all_gather_object pads every rank's bytes to the longest, and keeps all of them.
        gathered = numpy.empty((world, len(mine)), dtype=numpy.uint8)
        gathered[:num_shares] = numpy.frombuffer(theirs, dtype=numpy.uint8)
        gathered[num_shares:, : len(nothing)] = numpy.frombuffer(nothing, dtype=numpy.uint8)
        known = [pickle.loads(row.tobytes()) for row in gathered]
        assert len(known) == world
        return (world + 1) * len(mine)

    player = Played(world, rollouts, len(own))
    # All rollouts are equally long, so that what one of them sends stands for any.
    of_rollout = numpy.concatenate(
        [as_bytes(a) for a in exchange_module._arrays(rollouts[0], 0, text=False)]
    )
    player.received = numpy.tile(of_rollout, len(wanted[0]))

    def after() -> int:
        player.num_bytes = 0
        player.is_sharing = True
        shared = player.share(own, prompts)
        player.is_sharing = False
        brought = player.bring(shared, wanted)
        assert all(brought[i].completion.num_trained for i in wanted[0])
        return player.num_bytes

    return [
        {"ranks": world} | measured(before, options.rounds, time.process_time).row("before"),
        {"ranks": world} | measured(after, options.rounds, time.process_time).row("after"),
    ]


def _copied(rollout: Rollout) -> Rollout:
    """The same with arrays and a text of its own."""
    c = rollout.completion
    completion = Completion(
        numpy.array(c.token_ids),
        numpy.array(c.logprobs),
        str(bytes(c.text, "ascii"), "ascii"),
        c.finished,
        numpy.array(c.trained, dtype=bool),
        numpy.array(c.weight_version),
    )
    return replace(rollout, completion=completion)


# ---- files ----


def files(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A step's file as JSON lines and as parquet."""
    rollouts = made_rollouts(options.rollouts, options.tokens, shared=False)
    num_tokens = options.rollouts * options.tokens
    write_table(io.BytesIO(), rollouts[:1], step=1, figures={}, header={})  # imports
    started = time.perf_counter()
    file = io.BytesIO()
    write_table(file, rollouts, step=1, figures={}, header={})
    parquet_seconds = time.perf_counter() - started
    rows = list(plain_rows(read_table(file.getvalue())))
    started = time.perf_counter()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    json_seconds = time.perf_counter() - started
    return [
        {
            "file": name,
            "bytes a token": size / num_tokens,
            "us a token": 1e6 * seconds / num_tokens,
        }
        for name, size, seconds in (
            ("JSON lines", len(lines), json_seconds),
            ("parquet", len(file.getvalue()), parquet_seconds),
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=8, help="real ranks")
    parser.add_argument("--rollouts", type=int, default=256, help="of the real ranks")
    parser.add_argument("--tokens", type=int, default=2048, help="of each of their answers")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512, 4096], help="played")
    parser.add_argument("--worst-rollouts", type=int, default=1024, help="of a played step")
    parser.add_argument("--worst-tokens", type=int, default=8192, help="of each of their answers")
    add_options(parser, rounds=3)
    options = parser.parse_args()
    apply_options(options)
    random.seed(0)
    show("Real ranks on gloo, the largest of all ranks", real(options), options)
    rows = [row for world in options.ranks for row in played(world, options)]
    show("One rank of many, played", rows, options)
    show("A step's file", files(options), options)


if __name__ == "__main__":
    main()
