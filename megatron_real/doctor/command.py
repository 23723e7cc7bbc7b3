"""`megatron-real doctor [--run-dir DIR]`: by itself, or under torchrun or srun on the nodes of a job.

Exit codes: 0 nothing failed (warnings allowed), 1 something did.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
from pathlib import Path
from typing import Any

from megatron_real.doctor.finding import Finding, merged

_JOIN_MINUTES = 3.0


def add_command(commands: Any) -> None:
    """Adds `doctor` to the command line's parsers."""
    parser = commands.add_parser("doctor", help="what a run will use here, and what falls back", description=__doc__)
    parser.add_argument("--run-dir", default=".", metavar="DIR", help="where the run would write (default: here)")
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(chosen: argparse.Namespace) -> int:
    """Runs `doctor`; returns the exit code, the same on every rank."""
    from megatron_real.policy.layout import join_world, leave_world

    first = os.environ.get("RANK", "0") == "0"
    try:
        join_world(_JOIN_MINUTES)
        findings = report(Path(chosen.run_dir))
        leave_world()
    except RuntimeError as error:  # each rank says which node failed: rank 0 may be the one that never answers
        said = " ".join(str(error).split())
        findings, first = [Finding("fail", "process group", f"{socket.gethostname()}: {said}", _PROCESS_GROUP)], True
    if first:
        print(json.dumps([dataclasses.asdict(f) for f in findings], indent=2) if chosen.json else _text(findings))
    return 1 if any(finding.verdict == "fail" for finding in findings) else 0


_PROCESS_GROUP = "check MASTER_ADDR, MASTER_PORT and the firewall between nodes; NCCL_DEBUG=INFO says more"


def report(run_dir: Path) -> list[Finding]:
    """All findings, the same on every rank. Collective over the ranks of the process group, which must be there."""
    import torch.distributed as dist

    from megatron_real.doctor.machine import machine
    from megatron_real.doctor.network import network
    from megatron_real.doctor.software import software

    host = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    local = [*software(), *machine(run_dir)] if os.environ.get("LOCAL_RANK", "0") == "0" else []
    gathered: list[tuple[str, list[Finding]]] = [("", [])] * dist.get_world_size()
    dist.all_gather_object(gathered, (host, local))
    by_node = {node: findings for node, findings in gathered if findings}
    return [*merged(by_node), *network(run_dir, [node for node, _ in gathered])]


def _text(findings: list[Finding]) -> str:
    counts = {verdict: sum(f.verdict == verdict for f in findings) for verdict in ("ok", "warn", "fail")}
    return "\n".join([*map(str, findings), ", ".join(f"{count} {verdict}" for verdict, count in counts.items())])
