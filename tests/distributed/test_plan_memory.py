"""The memory that `megatron-real plan` foretells, against what real models under
real layouts allocate.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_real.config import (
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
)
from megatron_real.plan.memory import Shapes, StageMemory, stage_memory
from megatron_real.weights.architecture import Architecture
from tests.amount import core, on_first_version
from tests.distributed import memory_jobs
from tests.distributed.layouts import Dtype
from tests.distributed.reference import Sample
from tests.distributed.world import World

ModelMaker = Callable[..., Path]

SIZES = {
    "hidden_size": 192,
    "intermediate_size": 528,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1500,
}
SEQUENCES = 8
LENGTH = 128

CORE = ["bf16", "selective", "tp2-sp-full", "cp2", "pp2-tied", "pp2-vpp2", "tp2-sp-pp2-dp2"]
if not on_first_version():
    CORE = ["pp2-vpp2", "tp2-sp-pp2-dp2"]

# name -> (ranks, options); max_tokens in sequences, so that pipelines have micro-batches to fill.
# In fp32 but for two: a CPU without bf16 instructions is five times slower with it.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "bf16": (1, {"dtype": "bf16"}),
    "logits": (1, {"logprobs": "logits"}),
    "bf16-logits": (1, {"dtype": "bf16", "logprobs": "logits"}),
    "selective": (1, {"recompute": "selective"}),
    "full": (1, {"recompute": "full"}),
    "tied": (1, {"model": "tied"}),
    "qwen3": (1, {"model": "qwen3"}),
    "dp2": (2, {"max_tokens": 4}),
    "tp2": (2, {"tp": 2}),
    "tp2-sp": (2, {"tp": 2, "sp": True}),
    "tp2-sp-full": (2, {"tp": 2, "sp": True, "recompute": "full"}),
    "tp4-sp-over-kv-heads": (4, {"tp": 4, "sp": True}),
    "cp2": (2, {"cp": 2}),
    "pp2": (2, {"pp": 2, "max_tokens": 2}),
    "pp2-tied": (2, {"pp": 2, "max_tokens": 2, "model": "tied"}),
    "pp4": (4, {"pp": 4, "max_tokens": 1}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2, "max_tokens": 2}),
    "tp2-sp-pp2-dp2": (8, {"tp": 2, "sp": True, "pp": 2, "max_tokens": 1}),
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {"family": "qwen2"},
    "tied": {"family": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"family": "qwen3", "head_dim": 32},
}


def samples() -> list[Sample]:
    draw = random.Random(0)
    tokens = [
        tuple(draw.randrange(SIZES["vocab_size"]) for _ in range(LENGTH + 1))
        for _ in range(SEQUENCES)
    ]
    return [
        Sample(prompt=t[:8], response=t[8:], label=i % 2, group=i // 2)
        for i, t in enumerate(tokens)
    ]


def config_of(
    path: Path,
    *,
    dtype: Dtype = "fp32",
    logprobs: Literal["linear", "logits"] = "linear",
    recompute: Literal["none", "selective", "full"] = "none",
    max_tokens: int = SEQUENCES,
    **parallel: Any,
) -> Config:
    """Returns a configuration of SEQUENCES sequences, `max_tokens` of them in a micro-batch."""
    return Config(
        model=ModelConfig(path=str(path), dtype=dtype, logprobs=logprobs, recompute=recompute),
        data=DataConfig(max_prompt_tokens=8),
        rollout=RolloutConfig(max_response_tokens=LENGTH - 8, num_prompts=4, group_size=2),
        batch=BatchConfig(max_tokens=max_tokens * LENGTH, minibatch_prompts=4, placement="split"),
        parallel=ParallelConfig(**parallel),
    )


def foretold(config: Config, ranks: int) -> list[StageMemory]:
    parallel = config.parallel
    dp = ranks // (parallel.tp * parallel.pp * parallel.cp)
    count = SEQUENCES * LENGTH // config.batch.max_tokens // dp
    shapes = Shapes(micro_batches=count, layers="local", device="cpu")
    return stage_memory(Architecture.read(config.model.path), config, dp=dp, shapes=shapes)


def measure(
    world: World, tiny_model: ModelMaker, layout: str
) -> tuple[Config, list[dict[str, int]]]:
    """The configuration of a layout, and for each pipeline stage the rank that allocated most."""
    num_ranks, options = LAYOUTS[layout]
    options = dict(options)
    model = MODELS[options.pop("model", "qwen2")]
    config = config_of(tiny_model(**model, dtype="bfloat16", **SIZES), **options)

    ranks = world.run(memory_jobs.measured, num_ranks, config=config, samples=samples())

    # megatron-core's order of ranks: pipeline stages are the slowest axis.
    per_stage = num_ranks // config.parallel.pp
    stages = [ranks[i : i + per_stage] for i in range(0, num_ranks, per_stage)]
    return config, [{key: max(rank[key] for rank in stage) for key in stage[0]} for stage in stages]


@pytest.mark.parametrize("layout", core(list(LAYOUTS), CORE))
def test_foretold_memory_is_what_is_allocated(
    world: World, tiny_model: ModelMaker, layout: str
) -> None:
    config, measured = measure(world, tiny_model, layout)

    # Parameters are counted; activations are an estimate, with the wider bound.
    for stage, rank in zip(foretold(config, LAYOUTS[layout][0]), measured, strict=True):
        name = f"stage {stage.stage}"
        resident = stage.resident
        assert resident.parameters == rank["parameters"], name
        assert resident.gradients == pytest.approx(rank["gradients"], rel=0.01), name
        assert resident.total == pytest.approx(rank["held"], rel=0.1), name
        assert stage.update.total == pytest.approx(rank["update"], rel=0.2), name
        assert stage.old_logprobs.total == pytest.approx(rank["old_logprobs"], rel=0.2), name


@pytest.mark.one_version
def test_the_bounds_tell_layouts_apart(world: World, tiny_model: ModelMaker) -> None:
    """What is measured under SP at TP 4 is beyond the bounds for TP 1,
    for no SP and for full recomputation.
    """
    config, (rank,) = measure(world, tiny_model, "tp4-sp-over-kv-heads")
    path = Path(config.model.path)
    (unsharded,) = foretold(config_of(path), 1)
    (no_sp,) = foretold(config_of(path, tp=4), 4)
    (full,) = foretold(config_of(path, tp=4, sp=True, recompute="full"), 4)

    assert unsharded.resident.total != pytest.approx(rank["held"], rel=0.1)
    assert no_sp.update.total != pytest.approx(rank["update"], rel=0.2)
    assert full.update.total != pytest.approx(rank["update"], rel=0.2)


@pytest.mark.one_version
def test_a_pass_without_backward_keeps_no_activations(world: World, tiny_model: ModelMaker) -> None:
    """Four micro-batches are scored in the room of one: autograd is off,
    and nothing of them outlives its score.
    """
    peaks = []
    for max_tokens in (SEQUENCES, SEQUENCES // 4):
        config = config_of(tiny_model("qwen2", dtype="bfloat16", **SIZES), max_tokens=max_tokens)
        (rank,) = world.run(memory_jobs.measured, 1, config=config, samples=samples())
        peaks.append(rank["old_logprobs"])
        assert rank["old_logprobs"] < 0.5 * rank["update"]
    assert peaks[1] < 0.5 * peaks[0]
