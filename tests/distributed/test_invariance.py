"""The proof of the project: loss and gradients of a minibatch are those of Eq. 8 under any layout.

The reference (reference.py) is transformers' model and the printed equation in float64. Rows are a
pairwise cover of all factors (layouts.py); each runs the real model, schedules and train step of
megatron-core.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_real.config import (
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
)
from megatron_real.config import OptimizerConfig as Optimizer
from tests.amount import core, on_first_version
from tests.distributed import jobs, reference
from tests.distributed.layouts import (
    CORE,
    LEVELS,
    Dtype,
    Layout,
    pairwise_cover,
    possible_pairs,
    random_layout,
)
from tests.distributed.world import World

ROWS = pairwise_cover()
TOLERANCE = {"fp64": 1e-10, "fp32": 2e-5, "bf16": 1e-1}
"""Relative error of each parameter's gradient, in the 2-norm. bf16's worst are the k biases, 6e-2:
softmax hardly feels them, so their gradient is small; the others stay below 3e-2.
"""

ModelMaker = Callable[..., Path]


@pytest.fixture(scope="session")
def expected(
    tiny_model: ModelMaker,
) -> Callable[[Layout], tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradients of the reference, once per model, number of layers, order and
    kind of minibatch.
    """

    @cache
    def compute(
        model: str, layers: int, order: int, first: bool
    ) -> tuple[float, dict[str, torch.Tensor]]:
        path, old_path = model_paths(tiny_model, model, layers)
        samples = reference.minibatch(order, vocab=101)
        if first:
            return reference.gradient(path, None, samples)
        return reference.gradient(path, old_path, samples)

    def expected_of(layout: Layout) -> tuple[float, dict[str, torch.Tensor]]:
        return compute(layout.model, layers_of(layout), layout.order, layout.first)

    return expected_of


def layers_of(layout: Layout) -> int:
    """Layers of the model: two in each chunk of a pipeline, but at most eight."""
    return min(8, 2 * layout.pp * layout.vpp)


def model_paths(tiny_model: ModelMaker, name: str, layers: int = 4) -> tuple[Path, Path]:
    """The policy, and the earlier weights that drew the rollouts."""
    family = name.split("-")[0]
    tied = name.endswith("tied")
    sizes = {"tie_word_embeddings": tied, "num_hidden_layers": layers}
    return tiny_model(family, moved=0.02, **sizes), tiny_model(family, **sizes)


def config_of(layout: Layout, path: Path, dtype: Dtype, **megatron: Any) -> Config:
    return Config(
        model=ModelConfig(
            path=str(path), dtype=dtype, logprobs=layout.logprobs, recompute=layout.recompute
        ),
        data=DataConfig(max_prompt_tokens=16),
        rollout=RolloutConfig(max_response_tokens=16, temperature=reference.TEMPERATURE),
        batch=BatchConfig(
            max_tokens=layout.max_tokens, layout=layout.packing, placement=layout.placement
        ),
        parallel=ParallelConfig(
            tp=layout.tp, pp=layout.pp, vpp=layout.vpp, cp=layout.cp, sp=layout.sp
        ),
        optimizer=Optimizer(distributed=False),
        megatron=megatron,
    )


def run(
    world: World, tiny_model: ModelMaker, layout: Layout, dtype: Dtype, **megatron: Any
) -> dict[str, Any]:
    path, old_path = model_paths(tiny_model, layout.model, layers_of(layout))
    results = world.run(
        jobs.gradient,
        layout.size,
        config=config_of(layout, path, dtype, **megatron),
        old_path=None if layout.first else str(old_path),
        samples=reference.minibatch(layout.order, vocab=101),
    )
    assert len({r["loss"] for r in results}) == 1, "every rank knows the same loss"
    return results[0]


def worst_error(gradients: dict[str, Any], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    assert gradients.keys() == expected.keys()
    errors = [
        (float((torch.from_numpy(g) - expected[k]).norm() / expected[k].norm()), k)
        for k, g in gradients.items()
    ]
    return max(errors)


def check(
    world: World, tiny_model: ModelMaker, expected: Any, layout: Layout, dtype: Dtype
) -> None:
    loss, gradients = expected(layout)

    result = run(world, tiny_model, layout, dtype)

    error, name = worst_error(result["gradients"], gradients)
    assert error <= TOLERANCE[dtype], f"gradient of {name}"
    assert result["loss"] == pytest.approx(loss, rel=TOLERANCE[dtype])
    placement = result["placement"]
    if layout.placement != "auto":
        assert placement == layout.placement

    # A group that is cut over micro-batches needs a pass for its scores before the gradient's;
    # on-policy they are 0 without one. Rows that recompute are left out: the hook counts whole
    # models, of which recomputation runs a part.
    if layout.recompute == "none":
        two_passes = not layout.first and placement == "split"
        assert result["forwards"] == 1 + two_passes, f"model forwards of {placement}"


def test_rows_cover_every_pair() -> None:
    assert frozenset().union(*(row.pairs for row in ROWS)) == possible_pairs()


def test_the_core_has_every_level() -> None:
    for factor, levels in LEVELS.items():
        assert {getattr(row, factor) for row in CORE} == set(levels), factor


@pytest.mark.parametrize("layout", core(ROWS, ROWS if on_first_version() else CORE), ids=str)
def test_float64(world: World, tiny_model: ModelMaker, expected: Any, layout: Layout) -> None:
    check(world, tiny_model, expected, layout, "fp64")


@pytest.mark.one_version
@pytest.mark.parametrize("layout", core(ROWS, CORE), ids=str)
def test_float32(world: World, tiny_model: ModelMaker, expected: Any, layout: Layout) -> None:
    check(world, tiny_model, expected, layout, "fp32")


@pytest.mark.one_version
@pytest.mark.parametrize(
    "layout",
    core(CORE, CORE[:2]),
    ids=str,
)
def test_bfloat16(world: World, tiny_model: ModelMaker, expected: Any, layout: Layout) -> None:
    check(world, tiny_model, expected, layout, "bf16")


@pytest.mark.grid
@pytest.mark.parametrize("seed", range(200))
def test_long_grid(world: World, tiny_model: ModelMaker, expected: Any, seed: int) -> None:
    import random

    check(world, tiny_model, expected, random_layout(random.Random(1000 + seed)), "fp64")


PLAIN = replace(
    ROWS[0], tp=1, sp=False, pp=1, vpp=1, cp=1, dp=1, max_tokens=64, packing="packed",
    placement="split", model="qwen2", logprobs="linear", recompute="none", first=False,
)  # fmt: skip


def test_control_averaging_pieces_of_groups_is_wrong(
    world: World, tiny_model: ModelMaker, expected: Any
) -> None:
    """What a trainer does that takes each micro-batch's rollouts for whole groups:
    off by more than 10 %.
    """
    path, old_path = model_paths(tiny_model, PLAIN.model, layers_of(PLAIN))

    (naive,) = world.run(
        jobs.naive_gradient,
        1,
        config=config_of(PLAIN, path, "fp64"),
        old_path=str(old_path),
        samples=reference.minibatch(PLAIN.order, vocab=101),
    )

    _, gradients = expected(PLAIN)
    assert worst_error(naive["gradients"], gradients)[0] > 0.1


def test_control_batched_p2p_breaks_the_interleaved_schedule(
    world: World, tiny_model: ModelMaker
) -> None:
    """megatron-core's default p2p under VPP: the loss is exact,
    the gradients are not (docs/design.md).
    """
    layout = replace(PLAIN, pp=2, vpp=2, first=True, placement="dp", max_tokens=256)
    path, _ = model_paths(tiny_model, layout.model, layers_of(layout))
    # Rollouts of one length: the default p2p needs micro-batches of one shape
    # (variable_seq_lengths is off with it).
    samples = [reference.Sample((5, 6, 7), (i, 9, i + 2, 4), i % 2, i // 4) for i in range(16)]
    loss, gradients = reference.gradient(path, None, samples)
    config = replace(
        config_of(layout, path, "fp64"), batch=BatchConfig(max_tokens=32, placement="dp")
    )
    batched = {"overlap_p2p_comm": False, "batch_p2p_comm": True, "variable_seq_lengths": False}

    sound, broken = (
        world.run(
            jobs.gradient,
            2,
            config=replace(config, megatron=megatron),
            old_path=None,
            samples=samples,
        )[0]
        for megatron in ({}, batched)
    )

    assert sound["loss"] == broken["loss"] == pytest.approx(loss, rel=1e-10)
    assert worst_error(sound["gradients"], gradients)[0] <= TOLERANCE["fp64"]
    assert worst_error(broken["gradients"], gradients)[0] > 0.1


def test_control_megatrons_averaging_is_seen(
    world: World, tiny_model: ModelMaker, expected: Any
) -> None:
    """Without calculate_per_token_loss, DDP divides by the data-parallel size."""
    layout = replace(PLAIN, dp=2, first=True)
    path, _ = model_paths(tiny_model, layout.model, layers_of(layout))
    _, gradients = expected(layout)
    results = world.run(
        jobs.averaged_gradient,
        2,
        config=config_of(layout, path, "fp64"),
        samples=reference.minibatch(layout.order, vocab=101),
    )
    assert worst_error(results[0]["gradients"], gradients)[0] == pytest.approx(0.5, abs=1e-6)
