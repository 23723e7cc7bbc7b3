"""`megatron-real doctor [CONFIG]`: what a run will use on this machine, and what would break it.

It runs by itself, or under torchrun or srun on the nodes of a job.

Exit codes: 0 nothing failed (warnings allowed), 1 something did, 2 the configuration was refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import socket
from pathlib import Path

from megatron_real import config as configuration
from megatron_real.commands.arguments import add_overrides
from megatron_real.commands.terminal import hanging, input_checks, is_first_rank
from megatron_real.doctor.finding import Finding
from megatron_real.doctor.report import report
from megatron_real.runs.disk_needs import disk_needs
from megatron_real.weights.architecture import Architecture

SUMMARY = "say what a run will use on this machine, and what would break it"
EXAMPLES = """\
examples:
  megatron-real doctor
  megatron-real doctor my.yaml
  srun megatron-real doctor --run-dir /shared/runs      on the nodes of a job

exit codes: 0 nothing failed (warnings allowed), 1 something did, 2 the input
was refused
"""

# Long enough for nodes that start one after the other; a firewall shows as this timeout.
_JOIN_MINUTES = 3.0
_INDENT = 28
"""Where a finding's words begin, after its verdict and its name."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "config", nargs="?", help="YAML file of the run, whose disk space is counted then"
    )
    add_overrides(parser)
    parser.add_argument(
        "--run-dir", metavar="DIR", help="where the run would write (default: CONFIG's, or here)"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(options: argparse.Namespace) -> int:
    """Runs `doctor`; returns the exit code, the same on every rank."""
    from megatron_real.parallel.groups import join_world, leave_world

    speaks = is_first_rank()
    run_dir = options.run_dir
    needs = None
    with input_checks():
        if options.config is not None:
            config = configuration.load(options.config, options.overrides)
            needs = disk_needs(config, Architecture.read(config.model.path))
            run_dir = run_dir or config.trainer.run_dir

    try:
        join_world(_JOIN_MINUTES)
        # Collective: every rank reports, and the first has all findings.
        findings = report(Path(run_dir or "."), needs)
        leave_world()
    # torch.distributed's own errors, timeouts among them, are RuntimeErrors.
    except RuntimeError as error:
        # Each rank says which node failed: rank 0 may be the one that never answers.
        speaks = True
        # On one line: torch's messages have several.
        reason = " ".join(str(error).split())
        findings = [
            Finding(
                "fail",
                "process group",
                f"{socket.gethostname()}: {reason}",
                "check MASTER_ADDR, MASTER_PORT and the firewall between nodes; NCCL_DEBUG=INFO "
                "says more",
            )
        ]

    if speaks and options.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    elif speaks:
        print(_text(findings))

    if any(finding.verdict == "fail" for finding in findings):
        return 1
    return 0


def _text(findings: list[Finding]) -> str:
    """Returns the findings, a paragraph each, and how many there are of each verdict."""
    lines = [hanging(str(finding), _INDENT) for finding in findings]
    counts = []
    for verdict in ("ok", "warn", "fail"):
        count = sum(finding.verdict == verdict for finding in findings)
        counts.append(f"{count} {verdict}")
    lines.append(", ".join(counts))
    return "\n".join(lines)
