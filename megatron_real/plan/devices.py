"""GPUs that a plan knows, and the rates that its times come from, each with its source.

Nothing here was measured by this project: it has not run on these GPUs. Times are estimates from
other people's figures. tools/gpu_day.py measures what takes their place (`--rates`,
plan/measured.py), and a run's own metrics do (`--train-utilization`, `--decode-utilization`,
`--mean-response`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_real.runs.peak import PEAK_TFLOPS


@dataclass(frozen=True)
class Device:
    """One kind of GPU in a cluster of nodes of eight."""

    name: str
    """As on the command line."""
    memory_gib: float
    """Memory that a process can allocate, as nvidia-smi shows it."""
    tflops: float
    """Peak of dense bf16 matrix products: the data sheet."""
    bandwidth_gb: float
    """GB/s of device memory: the data sheet."""
    link_gb: float
    """GB/s that a GPU moves within its node in a collective, measured (bus bandwidth)."""
    network_gb: float
    """GB/s of a GPU's share of the network between nodes."""
    utilization: Mapping[float, float]
    """Billions of parameters -> share of `tflops` that training reaches, recomputation counted as
    work."""
    usd_per_hour: float
    """List price of one GPU on demand; prices move, `--price` replaces it."""
    measured: str = ""
    """File that `utilization` was measured in; empty: it is published."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Where each rate comes from."""
        training, *others = SOURCES
        if self.measured:
            training = f"training: measured by tools/gpu_day.py, {self.measured}"
        return (training, *others)

    def train_utilization(self, num_parameters: int) -> float:
        """Returns the share of peak FLOP/s that training reaches for a model of this size.

        It is linear between the sizes of the table and that of the nearest size outside them.
        """
        sizes = sorted(self.utilization)
        size = num_parameters / 1e9
        right = bisect_left(sizes, size)
        if right in (0, len(sizes)):
            return self.utilization[sizes[min(right, len(sizes) - 1)]]

        low = sizes[right - 1]
        high = sizes[right]
        share = (size - low) / (high - low)
        return self.utilization[low] * (1 - share) + self.utilization[high] * share


# Hardware FLOPs utilisation (column HFU) of MosaicML's llm-foundry,
# scripts/train/benchmarking/README.md, on 8 GPUs at 8192 tokens (13b on H100: 4096). Megatron-LM's
# README has 41-47 % for 2B to 462B on H100.
_FOUNDRY_H100 = {0.77: 0.348, 1.33: 0.377, 2.67: 0.403, 6.68: 0.495, 12.9: 0.555}
_FOUNDRY_A100 = {0.36: 0.538, 0.77: 0.553, 1.33: 0.567, 2.67: 0.593, 6.68: 0.726, 12.9: 0.748}

DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        # link: 208 GB/s measured, NVIDIA/nccl-tests issue 178; network 200 Gb/s a GPU.
        Device("a100-40g", 39.5, PEAK_TFLOPS["A100"], 1555, 208, 25, _FOUNDRY_A100, 1.3),
        Device("a100-80g", 79.2, PEAK_TFLOPS["A100"], 2039, 208, 25, _FOUNDRY_A100, 2.0),
        # link: 370 GB/s, NCCL's author in NVIDIA/nccl-tests issue 212; network 400 Gb/s a GPU.
        Device("h100-80g", 79.6, PEAK_TFLOPS["H100"], 3350, 370, 50, _FOUNDRY_H100, 3.0),
        Device("h200-141g", 139.8, PEAK_TFLOPS["H200"], 4800, 370, 50, _FOUNDRY_H100, 3.5),
        # No published bf16 figures for dense models of this size were found: H100's share of the
        # peak, twice its link.
        Device("b200-180g", 178.3, PEAK_TFLOPS["B200"], 7700, 740, 50, _FOUNDRY_H100, 5.0),
    )
}

GPUS_PER_NODE = 8

# Share of memory bandwidth that decoding reaches with batches in the hundreds, scheduling included.
# vLLM's published 12,500 tokens/s of Llama 3.1 8B in bf16 on an H100 (morphllm.com/vllm-benchmarks)
# are 0.43 of the weights and KV cache that such a batch of 256 reads; a single sequence on an A100
# reaches 0.77 (johnmusgrave.com, vLLM 0.23).
DECODE_UTILIZATION = 0.45

# Share of peak FLOP/s of prefill and of large decode batches: forward passes, as in training.
PREFILL_UTILIZATION = 0.4

# Seconds below which no decode step goes: launch, sampling, scheduling. Assumed.
DECODE_STEP_FLOOR = 0.004

# Share of the response budget that an average answer takes, where --mean-response does not say:
# DeepScaleR reports 5,500 of 8,192 tokens falling to 3,500 for R1-Distill-Qwen-1.5B in its first
# stage.
MEAN_RESPONSE_SHARE = 0.5

# Share of the prompt limit that an average prompt takes: competition problems have some 100 to 300
# tokens. Assumed.
MEAN_PROMPT_SHARE = 0.25

SOURCES = (
    "training: MosaicML llm-foundry, scripts/train/benchmarking/README.md, column HFU, 8 GPUs, "
    "8192 tokens",
    "decoding: 0.45 of memory bandwidth, from vLLM's 12,500 tokens/s of Llama 3.1 8B on an H100 "
    "(morphllm.com)",
    "links: NVIDIA/nccl-tests issues 178 (A100) and 212 (H100); memory, bandwidth and FLOP/s: "
    "NVIDIA's data sheets",
    "B200: utilisation as on H100 and twice its link, both guesses; the floor of a decode step, "
    "4 ms, is assumed",
    "prices: typical on-demand list prices of 2026; they move",
)
