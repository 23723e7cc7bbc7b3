"""How far this node holds in verifiers that run what a completion says."""

from __future__ import annotations

import subprocess

from megatron_real.doctor.finding import Finding
from megatron_real.labels.sandbox import REMEDY, this_node


def containment() -> Finding:
    """The rung of labels/sandbox that this node stands on, tried by building a sandbox."""
    try:
        rung, why = this_node()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return Finding("fail", "sandbox", str(error), REMEDY)
    what = f"{rung.value}: {rung.meaning}"
    if not rung.contains:
        return Finding("warn", "sandbox", f"{what} ({why})", REMEDY)
    return Finding("ok", "sandbox", f"{what} ({why})" if why else what)
