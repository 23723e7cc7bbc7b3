"""What the doctor's tests run on every rank, on pretended nodes and with pretended faults."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_real.doctor import machine, network, report
from megatron_real.doctor.finding import Finding


def clocks(*, nodes: int, ahead: float) -> Finding:
    """Compares clocks over `nodes` nodes; that of the last node is `ahead` seconds fast."""
    rank = dist.get_rank()
    size = dist.get_world_size()
    hosts = [f"n{r * nodes // size}" for r in range(size)]

    on_last_node = hosts[rank] == f"n{nodes - 1}"
    offset = ahead * on_last_node
    true_time = time.time
    with mock.patch.object(time, "time", lambda: true_time() + offset):
        return network.clocks(hosts)


def shared_directory(*, directories: list[Path]) -> Finding:
    """Runs the check of the run directory, which each rank sees at its own path."""
    return network.shared_directory(directories[dist.get_rank()])


def all_reduce(*, faulty_rank: int | None) -> Finding:
    """Runs the check of sums, in which a faulty rank adds 1 to one element."""
    true_all_reduce = dist.all_reduce

    def wrong(tensor: Any, **options: Any) -> None:
        true_all_reduce(tensor, **options)
        # The check itself sums without options; what the ranks agree on afterwards stays right.
        if not options and dist.get_rank() == faulty_rank:
            tensor[-1] += 1

    with mock.patch.object(dist, "all_reduce", wrong):
        return network.all_reduce(nodes=2, size=4 << 20)


def reported(*, run_dir: Path) -> list[Finding]:
    """Returns the whole report of two nodes, whose disks are made to differ.

    Without that, a throttled disk could give both the same figure, and the test would not see
    two findings.
    """
    rank = dist.get_rank()
    true_figures = machine._written_and_read

    def measured(file: Path) -> tuple[float, float]:
        write_mb, read_mb = true_figures(file)
        return write_mb + 1e6 * (rank // 2), read_mb

    place = {
        "SLURMD_NODENAME": f"n{rank // 2}",
        "LOCAL_RANK": str(rank % 2),
        "LOCAL_WORLD_SIZE": "2",
    }
    with (
        mock.patch.dict(os.environ, place),
        mock.patch.object(machine, "_written_and_read", measured),
    ):
        return report(run_dir)
