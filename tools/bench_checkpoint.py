"""How long a save keeps the training waiting, as a share of a plain synchronous save.

    python tools/bench_checkpoint.py                       # 100M parameters, one process
    python tools/bench_checkpoint.py --parameters 500 --saves 3
    torchrun --nproc-per-node 2 tools/bench_checkpoint.py

The plain save is megatron-core's own: dist_checkpointing.save of the same model and optimizer, files fsynced, in its
fastest format, `dp_reshardable` (`fully_reshardable`, which ours can be read as, first gathers the optimizer at twice
its size). Its saves come first, so that its memory and our staged copy need not fit together; both write to the same
disk. The first save of each is not counted: it makes plans and memory that the later ones use again. `step while
writing` against `step` is what a save costs beyond its stand-still.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from megatron_real import cpu
from megatron_real.config import BatchConfig, Config, DataConfig, ModelConfig, OptimizerConfig, RolloutConfig

cpu.enable()
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_real.policy.layout import join_world  # noqa: E402
from megatron_real.runs.ranks import Ranks  # noqa: E402

LAYERS, VOCABULARY = 12, 32_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=100, help="of the model, in millions")
    parser.add_argument("--saves", type=int, default=3, help="counted saves of each kind")
    parser.add_argument("--folder", default=None, help="where to write; a temporary directory by default")
    chosen = parser.parse_args()
    join_world(30)
    ranks = Ranks.of_all(timedelta(minutes=30))
    folder = Path(ranks.shared(tempfile.mkdtemp(dir=chosen.folder) if ranks.first else ""))
    try:
        figures = measure(chosen.parameters * 1e6, chosen.saves, ranks, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if ranks.first:
        print(json.dumps(figures, indent=1))


def measure(parameters: float, saves: int, ranks: Ranks, folder: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    from megatron_real.policy.state import sharded_state
    from megatron_real.runs.staging import Staging, write, write_common

    ranks.on_first(lambda: write_model(parameters, folder / "model"))
    policy, step = trainer(folder / "model")
    step()
    content = {"distrib_optim_sharding_type": "dp_reshardable"}

    found: dict[str, list[float]] = defaultdict(list)

    def plain() -> None:
        target = fresh(ranks, folder / "saved")
        began = time.perf_counter()
        model = policy.chunks[0].sharded_state_dict()
        state = {"model": model, "optimizer": policy.optimizer.sharded_state_dict(model, metadata=content)}
        dist_checkpointing.save(state, str(target))
        found["plain"].append(time.perf_counter() - began)
        found["step"].append(timed(step))

    staging, thread = Staging(policy.groups.dp_cp), ThreadPoolExecutor(1)

    def ours() -> None:
        target = fresh(ranks, folder / "saved")
        began = time.perf_counter()
        by_key, common = staging.copy(sharded_state(policy))
        found["stood"].append(time.perf_counter() - began)
        if ranks.first:
            write_common(target, common)
        written = thread.submit(write, target, by_key, ranks.group)
        began = time.perf_counter()
        found["step while writing"].append(timed(step))
        written.result()
        found["written"].append(time.perf_counter() - began)

    for save in (plain, ours):
        for _ in track(
            range(saves + 1), f"{save.__name__} saves", console=Console(stderr=True), disable=not ranks.first
        ):
            save()
    medians = {name: statistics.median(values[1:]) for name, values in found.items()}
    size = sum(file.stat().st_size for file in (folder / "saved").iterdir())
    return {
        "parameters": sum(p.numel() for p in policy.chunks[0].parameters()),
        "processes": ranks.world,
        "bytes": size,
        **{f"seconds {name}": round(value, 3) for name, value in medians.items()},
        "stood still / plain save": round(medians["stood"] / medians["plain"], 3),
    }


def write_model(parameters: float, path: Path) -> None:
    """A model of about that size with random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    # 2 x vocabulary x hidden + layers x (attention 2.5 hidden^2 + 3 x 2.75 hidden^2), solved for hidden.
    a, b = LAYERS * (2.5 + 3 * 2.75), 2 * VOCABULARY
    hidden = int((-b + (b * b + 4 * a * parameters) ** 0.5) / (2 * a)) // 128 * 128
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128 or 1}
    model = Qwen2Config(**sizes, **heads, vocab_size=VOCABULARY, max_position_embeddings=256)
    Qwen2ForCausalLM(model).to(torch.bfloat16).save_pretrained(path)


def trainer(path: Path) -> tuple[Any, Callable[[], object]]:
    """A policy with the weights of `path`, and one update of it."""
    from megatron_real.policy.layout import set_up
    from megatron_real.policy.policy import Policy
    from megatron_real.records import Completion, Prompt, Rollout, Verdict
    from megatron_real.weights.architecture import Architecture
    from megatron_real.weights.hf import HfWeights

    config = Config(
        model=ModelConfig(path=str(path), dtype="bf16"),
        data=DataConfig(max_prompt_tokens=64),
        rollout=RolloutConfig(max_response_tokens=64, num_prompts=2, group_size=2),
        batch=BatchConfig(max_tokens=256, minibatch_prompts=2),
        optimizer=OptimizerConfig(lr=1e-5),
    )
    policy = Policy(config, Architecture.read(str(path)), set_up(config.parallel), num_updates=100)
    policy.load(HfWeights(str(path)))
    tokens = tuple(range(60))
    rollouts = [
        Rollout(Prompt("p", "", tokens, ("",)), g, k, Completion(tokens, (0.0,) * 60, "", True), Verdict("ok", k, None))
        for g in range(2)
        for k in range(2)
    ]
    return policy, lambda: policy.update(policy.prepare(rollouts)[0])


def fresh(ranks: Any, target: Path) -> Path:
    if ranks.first:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        os.sync()  # what an earlier save has left to write is not this one's
    ranks.wait()
    return target


def timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


if __name__ == "__main__":  # megatron-core's own writer starts processes
    main()
    dist.destroy_process_group()
