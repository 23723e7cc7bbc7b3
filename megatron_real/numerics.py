"""Number formats that the configuration names: their sizes, and which of them a machine computes fast.

Loadable without torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

DTYPE_BYTES: Mapping[str, int] = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Value of model.dtype -> bytes of one number."""

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""What Linux calls the bf16 instructions of x86 and ARM processors."""


def fast_dtype(*, gpu: Path = Path("/dev/nvidia0"), cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the number format that this machine computes fast, and logs why it is that one.

    Without bf16 instructions a processor computes bf16 through fp32, several times as slowly as fp32 itself.
    """
    if gpu.exists():
        dtype, reason = "bf16", "there is a GPU"
    elif _BF16_FLAGS & _cpu_flags(cpuinfo):
        dtype, reason = "bf16", "this CPU has bf16 instructions"
    else:
        dtype, reason = "fp32", "there is no GPU, and this CPU has no bf16 instructions"
    logger.info("model.dtype=auto is %s: %s", dtype, reason)
    return dtype


def _cpu_flags(cpuinfo: Path) -> set[str]:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    flags = [line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))]
    return set(flags[0].split()) if flags else set()
