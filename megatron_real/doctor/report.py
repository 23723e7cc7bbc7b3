"""The whole report: what each node finds by itself, and what the ranks find together."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from megatron_real.doctor.finding import Finding, merged
from megatron_real.runs.disk_needs import DiskNeeds


def report(run_dir: Path, needs: DiskNeeds | None = None) -> list[Finding]:
    """All findings, the same on every rank.

    Collective over the ranks of the process group, which must be there.
    """
    import torch.distributed as dist

    from megatron_real.doctor.containment import containment
    from megatron_real.doctor.machine import machine
    from megatron_real.doctor.network import network
    from megatron_real.doctor.software import software

    host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    local = (
        [*software(), *machine(run_dir, needs), containment()]
        if os.environ.get("LOCAL_RANK", "0") == "0"
        else []
    )
    gathered: list[tuple[str, list[Finding]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(gathered, (host, local))
    by_node = {node: findings for node, findings in gathered if findings}
    return [*merged(by_node), *network(run_dir, [node for node, _ in gathered])]
