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

MAX_SKEW_SECONDS = 0.5
"""Clocks further apart order files and log lines of two nodes wrongly."""
SLOW_GB = {"node": 50.0, "nodes": 5.0}
"""GB/s of bus bandwidth on GPUs below which NVLink or InfiniBand is not in use: PCIe reaches some
20, TCP 1 to 3."""

_PINGS = 20


def network(run_dir: Path, hosts: Sequence[str]) -> list[Finding]:
    """Findings of all ranks together, the same on each; `hosts` are those of the ranks."""
    return [clocks(hosts), shared_directory(run_dir), all_reduce(nodes=len(set(hosts)))]


def clocks(hosts: Sequence[str]) -> Finding:
    """The clocks of the nodes' first ranks against that of rank 0, by ping and pong.

    The quickest round counts, and the difference is known to half of its time.
    """
    firsts = [hosts.index(host) for host in dict.fromkeys(hosts)]
    gloo = dist.new_group(backend="gloo")
    skews = {hosts[rank]: _skew(rank, gloo) for rank in firsts[1:]}
    told = [skews]
    dist.broadcast_object_list(told, src=0, group=gloo)
    dist.destroy_process_group(gloo)
    if not told[0]:
        return Finding("ok", "clock skew", "one node")
    host, (skew, error) = max(told[0].items(), key=lambda item: abs(item[1][0]))
    found = f"{skew * 1e3:+.1f} ms (within {error * 1e3:.1f}) at most, on {host} against {hosts[0]}"
    if abs(skew) - error > MAX_SKEW_SECONDS:
        return Finding("warn", "clock skew", found, "run chrony or ntpd on the nodes")
    return Finding("ok", "clock skew", found)


def _skew(other: int, group: dist.ProcessGroup) -> tuple[float, float]:
    """(seconds that the clock of rank `other` is ahead, its uncertainty), on rank 0.

    Nothing of use elsewhere.
    """
    me, best = dist.get_rank(), (0.0, float("inf"))
    stamp = torch.zeros(1, dtype=torch.float64)
    for _ in range(_PINGS if me in (0, other) else 0):
        if me == other:
            dist.recv(stamp, 0, group)
            dist.send(torch.tensor([time.time()], dtype=torch.float64), 0, group)
            continue
        sent = time.time()
        dist.send(stamp, other, group)
        dist.recv(stamp, other, group)
        error = (time.time() - sent) / 2
        best = min(best, (stamp.item() - sent - error, error), key=lambda pair: pair[1])
    return best


def shared_directory(run_dir: Path) -> Finding:
    """Whether every rank sees the file that rank 0 writes: a run directory on a node's own disk
    tears a run apart.
    """
    name = [f".doctor-{uuid.uuid4().hex}"]
    dist.broadcast_object_list(name, src=0)
    file = existing_folder(run_dir) / name[0]
    if dist.get_rank() == 0:
        with contextlib.suppress(
            OSError
        ):  # then no rank sees it, and the others must not wait for this one
            file.touch()
    dist.barrier()
    deadline = time.monotonic() + 10  # NFS may take seconds to show a new file
    while not (seen := file.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    everywhere: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(everywhere, seen)
    if seen and dist.get_rank() == 0:
        file.unlink()
    if all(everywhere):
        return Finding("ok", "shared directory", f"every rank sees {run_dir}")
    blind = [rank for rank, sees in enumerate(everywhere) if not sees]
    remedy = "set trainer.run_dir to a file system that all nodes share"
    return Finding(
        "fail", "shared directory", f"ranks {blind} do not see {run_dir} as rank 0 does", remedy
    )


def all_reduce(*, nodes: int, size: int | None = None) -> Finding:
    """Sums over all ranks, checked and timed.

    Bus bandwidth as nccl-tests counts it: 2 (n - 1) / n x bytes a second.
    """
    ranks, on_gpu = dist.get_world_size(), torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    size = size or (512 << 20 if on_gpu else 32 << 20)
    seconds, wrong = [], 0.0
    for _ in range(5):
        tensor = torch.full((size // 4,), float(dist.get_rank() + 1), device=device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        wrong = max(wrong, float((tensor - ranks * (ranks + 1) / 2).abs().max()))
    worst = torch.tensor([min(seconds), wrong], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    quickest, wrong = worst.tolist()
    if wrong:
        return Finding(
            "fail",
            "all-reduce",
            f"the sum is off by {wrong:g}",
            "take the node out: a GPU or link is faulty",
        )
    if ranks == 1:
        return Finding("ok", "all-reduce", "one rank: it works, and has nothing to send")
    speed = 2 * (ranks - 1) / ranks * size / quickest / 1e9
    took = f"{size >> 20} MiB in {quickest * 1e3:.1f} ms, {speed:.2f} GB/s of bus bandwidth"
    found = f"{ranks} ranks, {nodes} node{'s' if nodes > 1 else ''}: {took}"
    if on_gpu and speed < SLOW_GB["nodes" if nodes > 1 else "node"]:
        remedy = (
            "NCCL_DEBUG=INFO says which transport it took; see NCCL_IB_HCA and NCCL_SOCKET_IFNAME"
        )
        return Finding("warn", "all-reduce", found, remedy)
    return Finding("ok", "all-reduce", found)
