"""Updates, weights in and out, and log-probs against transformers, across layouts."""

from __future__ import annotations

import io
import os
import re
import runpy
from collections.abc import Callable
from contextlib import redirect_stdout
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
from megatron_real.parallel.groups import leave_world
from megatron_real.weights import WeightsError
from tests.amount import cover, thinned
from tests.distributed import jobs, reference
from tests.distributed.world import World
from tests.ports import free_port

ModelMaker = Callable[..., Path]


def config_of(
    path: Path, *, megatron: dict[str, Any] | None = None, distributed: bool = True, **parallel: Any
) -> Config:
    return Config(
        model=ModelConfig(path=str(path), dtype="fp32"),
        data=DataConfig(max_prompt_tokens=16),
        rollout=RolloutConfig(
            max_response_tokens=16, temperature=reference.TEMPERATURE, num_prompts=6
        ),
        batch=BatchConfig(max_tokens=96, minibatch_prompts=2),
        parallel=ParallelConfig(**parallel),
        optimizer=Optimizer(lr=1e-3, distributed=distributed),
        megatron=megatron or {},
    )


OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# name -> (ranks, options of `config_of`)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "tp2-sp": (2, {"tp": 2, "sp": True}),
    "tp4-over-kv-heads": (4, {"tp": 4}),
    "pp2-dp2": (4, {"pp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
    "cp2-dp2": (4, {"cp": 2}),
    "dp2-not-distributed": (2, {"distributed": False}),
    "dp2-overlap": (2, {"megatron": OVERLAP}),
    "tp2-sp-dp2-overlap": (4, {"tp": 2, "sp": True, "megatron": OVERLAP}),
    "tp4-dp2-overlap": (8, {"tp": 4, "megatron": OVERLAP}),
}


@pytest.fixture(scope="session")
def updated(world: World, tiny_model: ModelMaker) -> Callable[[str, bool], dict[str, Any]]:
    """Losses, gradient norms and weights of three updates,
    once for each layout and kind of head.
    """

    @cache
    def compute(layout: str, tied: bool) -> dict[str, Any]:
        size, options = LAYOUTS[layout]
        path = tiny_model("qwen2", tie_word_embeddings=tied)
        samples = reference.minibatch(1, vocab=101)
        config = config_of(path, **options)
        outcome: dict[str, Any] = world.run(jobs.updates, size, config=config, samples=samples)[0]
        return outcome

    return compute


@pytest.mark.parametrize(
    ("layout", "tied"),
    thinned(cover([name for name in LAYOUTS if name != "plain"], [False, True]), kept=4),
)
def test_three_updates_agree(
    updated: Callable[[str, bool], dict[str, Any]], layout: str, tied: bool
) -> None:
    """Parameters move by about 3e-3 (lr 1e-3, three updates); layouts differ by fp32 rounding,
    which Adam amplifies where a gradient is nearly 0. Stale weights under overlap_param_gather
    would differ by the whole movement.
    """
    plain = updated("plain", tied)
    other = updated(layout, tied)

    assert other["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert other["grad_norms"] == pytest.approx(plain["grad_norms"], rel=1e-4)
    for name, tensor in plain["weights"].items():
        moved = (tensor - plain["start"][name]).norm()
        difference = (tensor - other["weights"][name]).norm()
        assert difference <= 0.01 * moved, name


def updates_with_sent_shapes(config: Config, samples: list[reference.Sample]) -> dict[str, Any]:
    """`jobs.updates` in which stages send each other every shape,
    as by megatron-core's own communicator.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    from megatron_real.policy.passes import PlannedShapes

    planned = PlannedShapes._communicate_shapes
    sent = []

    def send(self: PlannedShapes, *args: Any, **kwargs: Any) -> Any:
        shapes = P2PCommunicator._communicate_shapes(self, *args, **kwargs)
        assert shapes == planned(self, *args, **kwargs)
        sent.append(shapes)
        return shapes

    PlannedShapes._communicate_shapes = send  # type: ignore[method-assign]
    return {**jobs.updates(config, samples), "shapes sent": len(sent)}


@pytest.mark.parametrize("layout", ["pp2-vpp2", pytest.param("pp2-dp2", marks=pytest.mark.grid)])
def test_planned_shapes_are_those_that_stages_would_send(
    world: World, tiny_model: ModelMaker, layout: str
) -> None:
    size, options = LAYOUTS[layout]
    config = config_of(tiny_model("qwen2"), **options)
    samples = reference.minibatch(1, vocab=101)

    sent = world.run(updates_with_sent_shapes, size, config=config, samples=samples)[0]
    planned = world.run(jobs.updates, size, config=config, samples=samples)[0]

    assert sent["shapes sent"] > 0
    assert sent["losses"] == planned["losses"]
    assert sent["grad_norms"] == planned["grad_norms"]
    for name, tensor in planned["weights"].items():
        assert torch.equal(sent["weights"][name], tensor), name


def test_a_batch_that_is_not_finite_is_skipped(world: World, tiny_model: ModelMaker) -> None:
    config = config_of(tiny_model("qwen2"))
    samples = reference.minibatch(1, vocab=101)

    (outcome,) = world.run(jobs.poisoned_update, 1, config=config, samples=samples)

    assert outcome == {"skipped": [True, True, False], "in_a_row": [1, 2, 0], "unchanged": True}


def offloaded(config: Config, samples: list[reference.Sample]) -> dict[str, Any]:
    """Updates with a generation's place between them: memory is lent, the policy scores,
    memory comes back.
    """
    policy = jobs.new_policy(config, config.model.path)
    rollouts = jobs.rollouts_of(samples)
    buffers = [buffer for chunk in policy.ddp for buffer in chunk.buffers]

    held = []
    for _ in range(2):
        for batch in policy.prepare(rollouts):
            policy.update(batch)
        policy.make_room()
        held.append(sum(buffer.grad_data.untyped_storage().size() for buffer in buffers))
        policy.mismatch(rollouts)
        policy.take_room_back()
    return {"weights": dict(policy.stream()), "held": held}


@pytest.mark.parametrize("layout", ["dp2-overlap", pytest.param("tp2-sp", marks=pytest.mark.grid)])
def test_lent_memory_changes_nothing(world: World, tiny_model: ModelMaker, layout: str) -> None:
    """To the bit; and the gradient buffers are really gone in between."""
    size, options = LAYOUTS[layout]
    config = config_of(tiny_model("qwen2"), **options)
    config = replace(config, model=replace(config.model, dtype="bf16"))
    samples = reference.minibatch(1, vocab=101)

    kept, lent = (
        world.run(
            offloaded,
            size,
            config=replace(config, rollout=replace(config.rollout, offload_optimizer=lend)),
            samples=samples,
        )[0]
        for lend in (False, True)
    )

    assert min(kept["held"]) > 0 and lent["held"] == [0, 0]
    assert all(
        torch.equal(tensor, lent["weights"][name]) for name, tensor in kept["weights"].items()
    )


# The six R1-Distills scaled down: heads, KV heads and their ratio, head size and biases kept in
# kind.
R1_DISTILL: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen-1.5b": (
        "qwen2",
        {"num_attention_heads": 12, "num_key_value_heads": 2, "hidden_size": 48},
    ),
    "qwen-7b": ("qwen2", {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 112}),
    "qwen-14b": (
        "qwen2",
        {"num_attention_heads": 40, "num_key_value_heads": 8, "hidden_size": 160},
    ),
    "qwen-32b": (
        "qwen2",
        {"num_attention_heads": 40, "num_key_value_heads": 8, "hidden_size": 80, "head_dim": 4},
    ),
    "llama-8b": (
        "llama",
        {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 128},
    ),
    "llama-70b": (
        "llama",
        {"num_attention_heads": 64, "num_key_value_heads": 8, "hidden_size": 128},
    ),
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "layout"),
    cover(list(R1_DISTILL), [(1, {}), (4, {"tp": 2, "sp": True, "pp": 2})]),
)
def test_logprobs_equal_transformers(
    world: World, tiny_model: ModelMaker, shape: str, layout: Any
) -> None:
    family, sizes = R1_DISTILL[shape]
    if family == "llama":
        sizes = {**sizes, "rope_parameters": LLAMA3_ROPE}
    path = tiny_model(
        family, dtype="float32", num_hidden_layers=2, max_position_embeddings=1024, **sizes
    )
    samples = [
        reference.Sample(tuple(range(5)), tuple((7 * i) % 101 for i in range(n)), 1, 0)
        for n in (300, 9)
    ]
    size, parallel = layout
    config = replace(
        config_of(path, **parallel),
        batch=BatchConfig(max_tokens=512, minibatch_prompts=2),
        model=ModelConfig(str(path), "fp32"),
    )

    ranks = world.run(jobs.logprobs, size, config=config, samples=samples)

    logprobs = next(rank for rank in ranks if rank is not None)
    model = reference.load(path, torch.float32)
    with torch.no_grad():
        expected = torch.cat([reference.logprobs(model, s) for s in samples])
    # Both are fp32, and sum in another order.
    assert (logprobs - expected).abs().max() <= 2e-4


@pytest.mark.parametrize(
    ("family", "layout"),
    cover(["qwen2", "llama", "qwen2-tied"], [(1, {}), (8, {"tp": 4, "pp": 2})]),
)
def test_export_gives_back_the_file(
    world: World, tiny_model: ModelMaker, tmp_path: Path, family: str, layout: Any
) -> None:
    path = tiny_model(
        family.split("-")[0], dtype="bfloat16", tie_word_embeddings=family.endswith("tied")
    )
    size, parallel = layout
    config = replace(config_of(path, **parallel), model=ModelConfig(str(path), "bf16"))

    world.run(jobs.export, size, config=config, out=str(tmp_path / "out"))

    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (path / file).read_bytes(), file


def printed_by(script: str, port: int) -> str:
    """Runs a script as torchrun's ranks do, and returns what this rank prints."""
    leave_world()
    os.environ["MASTER_PORT"] = str(port)
    with redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(script, run_name="__main__")
    return printed.getvalue()


def test_the_own_loop_example_learns(world: World) -> None:
    """examples/own_megatron_loop.py on two ranks with the environment of torchrun's."""
    example = Path(__file__).parents[2] / "examples" / "own_megatron_loop.py"

    printed, silent = world.run(printed_by, 2, script=str(example), port=free_port())

    losses = [float(x) for x in re.findall(r"loss (\S+)", printed)]
    assert len(losses) == 20 and losses[-1] < 0.1 * losses[0]
    assert not silent, "one rank prints for all"
    assert len(example.read_text().splitlines()) < 80, "it is to be read at a glance"


class Watched:
    """Weights that count what is read of them; with a `fault`, no piece of them can be read."""

    def __init__(self, weights: Any, fault: str = "") -> None:
        self.weights = weights
        self.fault = fault
        self.pieces = 0

    def megatron_piece(self, *args: Any) -> Any:
        self.pieces += 1
        if self.fault:
            raise WeightsError(self.fault)
        return self.weights.megatron_piece(*args)


def loaded_by_replicas(config: Config, other: str) -> tuple[int, dict[str, float], str]:
    """Returns how many pieces this rank read, the sums of its parameters afterwards,
    and its error where the files are cut.
    """
    from megatron_real.weights.hf import HfWeights
    from megatron_real.weights.stream import global_parameters

    policy = jobs.new_policy(config, config.model.path)
    watched = Watched(HfWeights(other))
    policy.load_parameters(watched)
    sums = {n: float(p.double().sum()) for n, p in global_parameters(policy.chunks).items()}
    try:
        policy.load_parameters(Watched(HfWeights(other), fault="a file is cut"))
    except WeightsError as error:
        return watched.pieces, sums, str(error)
    return watched.pieces, sums, "nothing"


def test_one_replica_reads_the_weights_for_all(world: World, tiny_model: ModelMaker) -> None:
    """Two replicas of two tensor-parallel parts: ranks 0 and 1 read their parts,
    2 and 3 get them from there.
    """
    config = config_of(tiny_model(), tp=2)
    other = tiny_model(seed=1)

    ranks = world.run(loaded_by_replicas, 4, config=config, other=str(other))

    pieces, sums, errors = zip(*ranks, strict=True)
    assert pieces[0] == pieces[1] > 0 and pieces[2:] == (0, 0)
    assert sums[0] == sums[2] and sums[1] == sums[3] and sums[0] != sums[1]
    assert errors == ("a file is cut",) * 4
