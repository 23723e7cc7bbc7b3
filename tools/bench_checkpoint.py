"""How long a save keeps the training waiting, as a share of a plain synchronous save.

    python tools/bench_checkpoint.py                       # 100M parameters, one process
    python tools/bench_checkpoint.py --parameters 500 --saves 3
    torchrun --nproc-per-node 2 tools/bench_checkpoint.py

The plain save is megatron-core's own: dist_checkpointing.save of the same model and optimizer,
files fsynced, in its fastest format, `dp_reshardable` (`fully_reshardable`, which ours can be read
as, first gathers the optimizer at twice its size). Its saves come first, so that its memory and our
staged copy need not fit together; both write to the same disk. The first save of each is not
counted: it makes plans and memory that the later ones use again. `step while writing` against
`step` is what a save costs beyond its stand-still.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from bench_machine import add_result_options, show
from bench_model import shared_directory
from bench_policy import new_policy, rollouts
from megatron.core import dist_checkpointing
from rich.console import Console
from rich.progress import track

from megatron_real.checkpoint.state import sharded_state
from megatron_real.checkpoint.writer import Staging, write, write_common
from megatron_real.config import (
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
)
from megatron_real.parallel.ranks import Ranks
from megatron_real.policy.policy import Policy

LAYERS = 12
VOCABULARY = 32_000
CONFIG = Config(
    model=ModelConfig(dtype="bf16"),
    data=DataConfig(max_prompt_tokens=64),
    rollout=RolloutConfig(max_response_tokens=64, num_prompts=2, group_size=2),
    batch=BatchConfig(max_tokens=256, minibatch_prompts=2),
    optimizer=OptimizerConfig(lr=1e-5),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=int, default=100, help="of the model, in millions")
    parser.add_argument("--saves", type=int, default=3, help="counted saves of each kind")
    parser.add_argument(
        "--folder", default=None, help="where to write; a temporary directory by default"
    )
    add_result_options(parser)
    options = parser.parse_args()
    policy = new_policy(CONFIG, shape(options.parameters * 1e6))
    batch = policy.prepare(rollouts([[60, 60], [60, 60]], prompt_tokens=60, vocab=VOCABULARY))[0]
    with shared_directory(options.folder) as folder:
        figures = measure(policy, lambda: policy.update(batch), options.saves, folder / "saved")
    if dist.get_rank() == 0:
        rows = [{"figure": name, "value": value} for name, value in figures.items()]
        title = f"Saves of {options.parameters}M parameters, {dist.get_world_size()} processes"
        show(title, rows, options)


def shape(parameters: float) -> dict[str, int]:
    """Returns the sizes of a model with about that many parameters."""
    # 2 x vocabulary x hidden + layers x (attention 2.5 hidden^2 + 3 x 2.75 hidden^2), solved for
    # hidden.
    a = LAYERS * (2.5 + 3 * 2.75)
    b = 2 * VOCABULARY
    hidden = int((-b + (b * b + 4 * a * parameters) ** 0.5) / (2 * a)) // 128 * 128
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": LAYERS,
    }
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128 or 1}
    return {**sizes, **heads, "vocab_size": VOCABULARY, "max_position_embeddings": 256}


def measure(policy: Policy, step: Callable[[], object], saves: int, target: Path) -> dict[str, Any]:
    """Saves to `target`, first by megatron-core and then by us."""
    ranks = Ranks.of_all(timedelta(minutes=30))
    step()  # makes the optimizer's states
    content = {"distrib_optim_sharding_type": "dp_reshardable"}
    seconds: dict[str, list[float]] = defaultdict(list)

    def plain() -> None:
        make_empty(target, ranks)
        began = time.perf_counter()
        model = policy.chunks[0].sharded_state_dict()
        state = {
            "model": model,
            "optimizer": policy.optimizer.sharded_state_dict(model, metadata=content),
        }
        dist_checkpointing.save(state, str(target))
        seconds["plain"].append(time.perf_counter() - began)
        seconds["step"].append(timed(step))

    staging = Staging(policy.groups.dp_cp)
    thread = ThreadPoolExecutor(1)

    def ours() -> None:
        make_empty(target, ranks)
        began = time.perf_counter()
        by_key, common = staging.copy(sharded_state(policy))
        seconds["stood"].append(time.perf_counter() - began)
        if ranks.first:
            write_common(target, common)
        written = thread.submit(write, target, by_key, ranks.group)
        began = time.perf_counter()
        seconds["step while writing"].append(timed(step))
        written.result()
        seconds["written"].append(time.perf_counter() - began)

    for save in (plain, ours):
        for _ in track(
            range(saves + 1),
            f"{save.__name__} saves",
            console=Console(stderr=True),
            disable=not ranks.first,
        ):
            save()

    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    size = sum(file.stat().st_size for file in target.iterdir())
    return {
        "parameters": sum(p.numel() for p in policy.chunks[0].parameters()),
        "processes": ranks.world,
        "bytes": size,
        **{f"seconds {name}": round(value, 3) for name, value in medians.items()},
        "stood still / plain save": round(medians["stood"] / medians["plain"], 3),
    }


def make_empty(target: Path, ranks: Ranks) -> None:
    if ranks.first:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        os.sync()  # what an earlier save has left to write is not this one's
    ranks.wait()


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":  # megatron-core's own writer starts processes
    main()
    dist.destroy_process_group()
