"""How far this node holds in verifiers that run what a completion says."""

from __future__ import annotations

import subprocess

from megatron_real.doctor.finding import Finding
from megatron_real.labels.sandbox import REMEDY, this_node


def containment() -> Finding:
    """Builds a sandbox, and returns the rung that this node stands on (labels/sandbox)."""
    try:
        rung, why = this_node()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return Finding("fail", "sandbox", str(error), REMEDY)

    description = f"{rung.value}: {rung.meaning}"
    if why:
        description = f"{description} ({why})"
    if not rung.contains:
        return Finding("warn", "sandbox", description, REMEDY)
    return Finding("ok", "sandbox", description)
