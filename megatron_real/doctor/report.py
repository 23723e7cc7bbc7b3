"""The whole report: what each node finds by itself, and what the ranks find together."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from megatron_real.doctor.finding import Finding, merged
from megatron_real.runs.disk_needs import DiskNeeds


def report(run_dir: Path, needs: DiskNeeds | None = None) -> list[Finding]:
    """Returns all findings, the same on every rank.

    Collective over the ranks of the process group, which must be there.

    Args:
        run_dir: where the run would write.
        needs: what it would write there, where that is known.
    """
    import torch.distributed as dist

    from megatron_real.doctor.containment import containment
    from megatron_real.doctor.machine import machine
    from megatron_real.doctor.network import network
    from megatron_real.doctor.software import software
    from megatron_real.parallel.collective import gathered

    # Slurm's name of the node, by which a job can exclude it.
    host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    # One rank of each node looks at it: two that measure one disk halve its speed.
    own_findings: list[Finding] = []
    if os.environ.get("LOCAL_RANK", "0") == "0":
        own_findings = [*software(), *machine(run_dir, needs), containment()]

    by_rank = gathered((host, own_findings), group=dist.group.WORLD)
    # Ranks that have not looked sent an empty list.
    by_node = {node: findings for node, findings in by_rank if findings}
    return [*merged(by_node), *network(run_dir, [node for node, _ in by_rank])]
