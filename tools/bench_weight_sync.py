"""Weight sync from the policy to vLLM in the same process, as ratios to a memcpy of the same bytes.

    python tools/bench_weight_sync.py [--dtype bf16]
    torchrun --nproc-per-node 2 tools/bench_weight_sync.py --tp 2

    memcpy           every HF tensor copied into memory that exists
    to the engine    the sync with its checks of names and shapes, up to the engine's own weights
    with packing     on a CPU vLLM computes with a copy of each matrix in oneDNN's layout, made anew
                     by each sync
    with checksums   and every tensor summed on both sides (rollout.sync.checksum_every)

To reach: at most 3 times the memcpy to the engine.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from bench_engine import configured
from bench_machine import add_options, apply_options, interleaved, show

from megatron_real.config import Config
from megatron_real.parallel.groups import set_up
from megatron_real.policy.policy import Policy, PolicySettings
from megatron_real.records import Prompt
from megatron_real.rollout import build_engine
from megatron_real.rollout.engines import vllm as vllm_engine
from megatron_real.rollout.sync import WeightSync
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.hf import HfWeights


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument(
        "--tp", type=int, default=1, help="tensor parallel size of the policy; the engines have 1"
    )
    add_options(parser, rounds=7)
    options = parser.parse_args()
    with configured(
        dtype=options.dtype, response_tokens=64, kv_cache_mib=256, tp=options.tp
    ) as config:
        apply_options(options)
        measure(config, options)


def measure(config: Config, options: argparse.Namespace) -> None:
    architecture = Architecture.read(config.model.path)
    policy = Policy(
        PolicySettings.of(config),
        architecture,
        HfWeights(config.model.path),
        set_up(config.parallel),
        num_updates=1,
    )
    engine = build_engine(config, say=lambda _: None)
    # Both held whole: a copy out of memory that is made on the way would be no plain memcpy.
    copies = {name: torch.empty_like(tensor) for name, tensor in policy.stream()}
    sources = {name: tensor.clone() for name, tensor in policy.stream()}
    sync = WeightSync(
        engine, config.rollout.sync, tied=False, probe=Prompt("", "", (2,), ("",)), temperature=1.0
    )

    def memcpy() -> None:
        for name, tensor in sources.items():
            copies[name].copy_(tensor)

    def synced(*, packing: bool, checksums: bool) -> Callable[[], Callable[[], Any]]:
        pack = vllm_engine.pack

        def prepare() -> Callable[[], Any]:
            vllm_engine.pack = pack
            if not packing:
                vllm_engine.pack = lambda model: None
            sync.config = dataclasses.replace(sync.config, checksum_every=int(checksums))
            return lambda: sync.run(policy.stream())

        return prepare

    seconds = interleaved(
        {
            "memcpy": lambda: memcpy,
            "to the engine": synced(packing=False, checksums=False),
            "with packing": synced(packing=True, checksums=False),
            "with checksums": synced(packing=True, checksums=True),
        },
        options,
    )
    size = sum(tensor.numel() * tensor.element_size() for tensor in sources.values())
    rows = [
        {"path": name, "seconds": s, "x memcpy": s / seconds["memcpy"], "GB/s": size / s / 1e9}
        for name, s in seconds.items()
    ]
    if dist.get_rank() == 0:
        show(
            f"Weight sync, {size / 1e6:.0f} MB in {options.dtype}, "
            f"policy TP {options.tp}, engine TP 1",
            rows,
            options,
        )


if __name__ == "__main__":
    main()
