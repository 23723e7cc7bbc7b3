"""Number formats that the configuration names: sizes, and which of them a machine computes fast.

The module needs no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

DTYPE_BYTES: Mapping[str, int] = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Value of model.dtype -> bytes of one number."""

_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""What Linux calls the bf16 instructions of x86 and ARM processors."""


def fast_dtype(*, gpu: Path = Path("/dev/nvidia0"), cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the number format that this machine computes fast, and logs why it is that one.

    Without bf16 instructions a processor computes bf16 through fp32, several times as slowly as
    fp32 itself.

    Args:
        gpu: device file that is there where a GPU is.
        cpuinfo: Linux's description of the processors; without it they count as slow.
    """
    flags: set[str] = set()
    with suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.startswith(("flags", "Features")):  # x86 and ARM call them so
                flags = set(line.partition(":")[2].split())
                break  # every core has its own line, and the same flags

    # By the driver's device file, as torch is not imported for this.
    if gpu.exists():
        dtype = "bf16"
        reason = "there is a GPU"
    elif _BF16_FLAGS & flags:
        dtype = "bf16"
        reason = "this CPU has bf16 instructions"
    else:
        dtype = "fp32"
        reason = "there is no GPU, and this CPU has no bf16 instructions"

    logger.info("model.dtype=auto is %s: %s", dtype, reason)
    return dtype
