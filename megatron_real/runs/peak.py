"""Peak speed of known devices, for the model FLOPs utilisation (MFU)."""

from __future__ import annotations

import re

# Dense bf16 TFLOP/s on tensor cores, from the vendors' data sheets. Where a sheet gives the figure
# "with sparsity", this is half of it. The words of a key are looked for in the device's name; the
# longest key wins, so that "NVIDIA H100 PCIe" is not taken for the faster SXM module. The value is
# that of the full-power part.
PEAK_TFLOPS = {
    "A100": 312.0,
    "A800": 312.0,
    "A30": 165.0,
    "A40": 149.7,
    "L4": 121.0,
    "L40S": 362.0,
    "H20": 148.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H800": 989.0,
    "H800 PCIe": 756.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "MI250X": 383.0,
    "MI300X": 1307.4,
}


def peak_tflops(device_name: str, configured: float = 0.0) -> float | None:
    """Returns the peak bf16 TFLOP/s of a device, None where it is not known.

    Args:
        device_name: as CUDA reports it.
        configured: the value of the configuration, which counts unless it is 0.

    Example: peak_tflops("NVIDIA H100 80GB HBM3") -> 989.0
    """
    if configured:
        return configured

    words = _words(device_name)
    # Whole words: "A10" must not be taken for an A100.
    known = [key for key in PEAK_TFLOPS if _words(key) <= words]
    if not known:
        return None
    return PEAK_TFLOPS[max(known, key=len)]


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))
