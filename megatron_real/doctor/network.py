"""What only the ranks together can tell. Every function is collective over all of them."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_real.doctor.finding import Finding
from megatron_real.doctor.machine import existing_folder
from megatron_real.parallel.collective import gathered_if_any, shared
from megatron_real.parallel.cpu import device

MAX_SKEW_SECONDS = 0.5
"""Clocks further apart order files and log lines of two nodes wrongly."""
SLOW_GB = {"node": 50.0, "nodes": 5.0}
"""GB/s of bus bandwidth on GPUs below which NVLink or InfiniBand is not in use: PCIe reaches some
20, TCP 1 to 3."""

_PINGS = 20


def network(run_dir: Path, hosts: Sequence[str]) -> list[Finding]:
    """Returns the findings of all ranks together, the same on each.

    Args:
        run_dir: where the run would write.
        hosts: [ranks] the node of each.
    """
    return [clocks(hosts), shared_directory(run_dir), all_reduce(nodes=len(set(hosts)))]


def clocks(hosts: Sequence[str]) -> Finding:
    """Compares the clocks of the nodes' first ranks with that of rank 0, by ping and pong.

    The quickest round counts, and the difference is known to half of its time.

    Args:
        hosts: [ranks] the node of each.
    """
    first_ranks = [hosts.index(host) for host in dict.fromkeys(hosts)]
    # gloo, whatever the run's backend: it is the CPUs that tell the time.
    gloo = dist.new_group(backend="gloo")
    # One node after the other: rounds at the same time would lengthen each other.
    skews = {hosts[rank]: _skew(rank, gloo) for rank in first_ranks[1:]}
    # Rank 0 alone has measured: the others take its figures.
    skews = shared(skews, group=gloo)
    dist.destroy_process_group(gloo)

    if not skews:
        return Finding("ok", "clock skew", "one node")
    host = max(skews, key=lambda name: abs(skews[name][0]))
    skew, error = skews[host]
    description = (
        f"{skew * 1e3:+.1f} ms (within {error * 1e3:.1f}) at most, on {host} against {hosts[0]}"
    )
    if abs(skew) - error > MAX_SKEW_SECONDS:
        return Finding("warn", "clock skew", description, "run chrony or ntpd on the nodes")

    return Finding("ok", "clock skew", description)


def _skew(peer: int, group: dist.ProcessGroup) -> tuple[float, float]:
    """Measures how far the clock of rank `peer` is ahead of that of rank 0.

    Returns:
        Seconds and their uncertainty on rank 0, nothing of use elsewhere.
    """
    rank = dist.get_rank()
    skew = 0.0
    uncertainty = float("inf")
    if rank not in (0, peer):
        return skew, uncertainty

    # In float32 the seconds since 1970 are rounded to two minutes.
    stamp = torch.zeros(1, dtype=torch.float64)
    for _ in range(_PINGS):
        if rank == peer:
            dist.recv(stamp, 0, group)
            dist.send(torch.tensor([time.time()], dtype=torch.float64), 0, group)
            continue
        # The wall clock: monotonic clocks of two machines have nothing to do with each other.
        sent = time.time()
        dist.send(stamp, peer, group)
        dist.recv(stamp, peer, group)
        # The peer's clock was read at some time in between: in the middle, give or take a half.
        half_round = (time.time() - sent) / 2
        if half_round < uncertainty:
            skew = stamp.item() - sent - half_round
            uncertainty = half_round
    return skew, uncertainty


def shared_directory(run_dir: Path) -> Finding:
    """Looks on every rank for a file that rank 0 writes.

    A run directory on a node's own disk tears a run apart.
    """
    name = shared(f".doctor-{uuid.uuid4().hex}", group=dist.group.WORLD)
    file = existing_folder(run_dir) / name
    if dist.get_rank() == 0:
        # Where it cannot be written no rank sees it, and the others must not wait for this one.
        with contextlib.suppress(OSError):
            file.touch()
    dist.barrier()  # no rank looks before the file is there

    deadline = time.monotonic() + 10  # NFS may take seconds to show a new file
    sees_file = file.exists()
    while not sees_file and time.monotonic() < deadline:
        time.sleep(0.2)
        sees_file = file.exists()

    blind_by_rank = gathered_if_any(not sees_file, group=dist.group.WORLD)
    if sees_file and dist.get_rank() == 0:
        file.unlink()
    # Nothing is gathered where no rank is blind.
    if not blind_by_rank:
        return Finding("ok", "shared directory", f"every rank sees {run_dir}")
    blind = [rank for rank, is_blind in enumerate(blind_by_rank) if is_blind]
    return Finding(
        "fail",
        "shared directory",
        f"ranks {blind} do not see {run_dir} as rank 0 does",
        "set trainer.run_dir to a file system that all nodes share",
    )


def all_reduce(*, nodes: int, size: int | None = None) -> Finding:
    """Sums over all ranks, checked and timed.

    Bus bandwidth is counted as nccl-tests does: 2 (n - 1) / n x bytes a second.

    Args:
        nodes: on which the ranks are.
        size: bytes; default: 512 MiB on GPUs, else 32 MiB.
    """
    num_ranks = dist.get_world_size()
    on_gpu = device().type == "cuda"
    default_size = 32 << 20
    if on_gpu:
        default_size = 512 << 20
    size = size or default_size

    # Five rounds, of which the quickest counts: the first one also makes connections and buffers.
    seconds: list[float] = []
    error = 0.0
    for _ in range(5):
        # Anew for each round, as the sum is written into it.
        tensor = torch.full((size // 4,), float(dist.get_rank() + 1), device=device())
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if on_gpu:
            # On a GPU the call returns when it is queued.
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        # 1 + 2 + ... + n, which is exact in float32 up to thousands of ranks.
        error = max(error, float((tensor - num_ranks * (num_ranks + 1) / 2).abs().max()))

    # The same figures on every rank: the quickest round of the slowest, and the largest error.
    worst = torch.tensor([min(seconds), error], device=device())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    quickest, error = worst.tolist()
    if error:
        return Finding(
            "fail",
            "all-reduce",
            f"the sum is off by {error:g}",
            "take the node out: a GPU or link is faulty",
        )
    if num_ranks == 1:
        return Finding("ok", "all-reduce", "one rank: it works, and has nothing to send")

    speed = 2 * (num_ranks - 1) / num_ranks * size / quickest / 1e9
    # Between nodes an all-reduce is slower than within one.
    unit = "node"
    if nodes > 1:
        unit = "nodes"
    description = (
        f"{num_ranks} ranks, {nodes} {unit}: {size >> 20} MiB in {quickest * 1e3:.1f} ms, "
        f"{speed:.2f} GB/s of bus bandwidth"
    )
    if on_gpu and speed < SLOW_GB[unit]:
        remedy = (
            "NCCL_DEBUG=INFO says which transport it took; see NCCL_IB_HCA and NCCL_SOCKET_IFNAME"
        )
        return Finding("warn", "all-reduce", description, remedy)

    return Finding("ok", "all-reduce", description)
