"""TransformerEngine's own layers and FusedAdam under our train step,
over emulated kernels (tests/emulated_te).

In fp32 its attention is its own in torch's operators, in bf16 it calls the fused kernel of cuDNN,
which is emulated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_real.config import Config
from tests.distributed import checkpoint_jobs, jobs, reference
from tests.distributed.layouts import Dtype, Layout
from tests.distributed.test_invariance import TOLERANCE, config_of, model_paths, worst_error
from tests.distributed.test_policy import LAYOUTS
from tests.distributed.test_policy import config_of as policy_config
from tests.emulated_te.install import available
from tests.emulated_te.world import TeWorld

pytestmark = [
    pytest.mark.one_version,
    pytest.mark.xdist_group("te"),  # its layers are imported in one lane
    pytest.mark.skipif(
        not available(), reason="TransformerEngine's Python is missing: docs/testing.md"
    ),
]
ModelMaker = Callable[..., Path]
SAMPLES = reference.minibatch(1, vocab=101)

PLAIN = Layout(
    tp=1, sp=False, pp=1, vpp=1, cp=1, dp=1, max_tokens=256, packing="packed", order=1,
    placement="auto", model="qwen2", logprobs="linear", recompute="none", first=False,
)  # fmt: skip
ROWS: dict[str, tuple[Layout, Dtype]] = {
    "plain": (PLAIN, "fp32"),
    "bf16": (PLAIN, "bf16"),
    "tp2-sp-padded": (replace(PLAIN, tp=2, sp=True, packing="padded", model="llama"), "bf16"),
    "tp2": (replace(PLAIN, tp=2, max_tokens=64, placement="split", first=True), "fp32"),
    "pp2-dp2": (replace(PLAIN, pp=2, dp=2, max_tokens=64, placement="split"), "bf16"),
    "pp2-vpp2-selective": (replace(PLAIN, pp=2, vpp=2, recompute="selective"), "fp32"),
    "tp2-dp2-full": (replace(PLAIN, tp=2, dp=2, recompute="full", model="qwen2-tied"), "bf16"),
}
DEFAULT = ("plain", "bf16", "tp2-sp-padded", "pp2-dp2")


def with_te(config: Config) -> Config:
    return replace(config, model=replace(config.model, layers="te"))


@pytest.fixture(scope="module")
def te_world() -> Iterator[TeWorld]:
    world = TeWorld()
    yield world
    world.close()


def calls_and_gradient(**arguments: Any) -> tuple[dict[str, int], dict[str, Any]]:
    """Runs the job of the invariance matrix; returns the number of calls of each of
    TransformerEngine's kernels, and the job's result.
    """
    import transformer_engine_torch

    transformer_engine_torch.calls.clear()
    result = jobs.gradient(**arguments)
    return dict(transformer_engine_torch.calls), result


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in DEFAULT else [pytest.mark.grid]) for n in ROWS],
)
def test_the_gradient_is_that_of_the_equation(
    te_world: TeWorld, tiny_model: ModelMaker, name: str
) -> None:
    layout, dtype = ROWS[name]
    path, old_path = model_paths(tiny_model, layout.model)
    samples = reference.minibatch(layout.order, vocab=101)
    # The first minibatch of a step is drawn by the policy's own weights.
    drawn_by = None if layout.first else old_path
    loss, expected = reference.gradient(path, drawn_by, samples)

    results = te_world.run(
        calls_and_gradient,
        layout.size,
        config=with_te(config_of(layout, path, dtype)),
        old_path=drawn_by and str(drawn_by),
        samples=samples,
    )

    calls, result = results[0]
    error, parameter = worst_error(result["gradients"], expected)
    assert error <= TOLERANCE[dtype], f"gradient of {parameter}"
    assert result["loss"] == pytest.approx(loss, rel=TOLERANCE[dtype])
    kernels = {"rmsnorm_fwd", "rmsnorm_bwd", "generic_gemm"}
    if dtype == "bf16":
        kernels |= {"fused_attn_fwd", "fused_attn_bwd"}
    assert kernels <= calls.keys(), "these layers are not TransformerEngine's"


def updates_and_optimizer(**arguments: Any) -> dict[str, Any]:
    """Makes three updates, and counts the calls of TransformerEngine's Adam."""
    import transformer_engine_torch

    transformer_engine_torch.calls.clear()
    result = jobs.updates(**arguments)
    return {**result, "adam_calls": transformer_engine_torch.calls.get("multi_tensor_adam", 0)}


def test_three_updates_are_those_of_local_layers(
    te_world: TeWorld, world: Any, tiny_model: ModelMaker
) -> None:
    config = policy_config(tiny_model("qwen2"))

    te = te_world.run(updates_and_optimizer, 2, config=with_te(config), samples=SAMPLES)[0]
    local = world.run(jobs.updates, 2, config=config, samples=SAMPLES)[0]

    assert te["adam_calls"] >= 3, "FusedAdam did not run"
    assert te["losses"] == pytest.approx(local["losses"], rel=1e-4)
    assert te["grad_norms"] == pytest.approx(local["grad_norms"], rel=1e-4)
    for name, tensor in local["weights"].items():
        moved = (tensor - local["start"][name]).norm()
        assert (te["weights"][name] - tensor).norm() <= 2e-2 * moved, name


@pytest.mark.parametrize("layout", ["tp2-sp", pytest.param("pp2-dp2", marks=pytest.mark.grid)])
def test_saved_and_resumed_in_another_layout(
    te_world: TeWorld, tiny_model: ModelMaker, tmp_path: Path, layout: str
) -> None:
    """The state comes back bit for bit; three more updates in the layout that
    saved go on bit for bit too.
    """
    path = tiny_model("qwen2")
    folder = str(tmp_path / "saved")
    num_ranks, options = LAYOUTS[layout]
    config = with_te(policy_config(path, **options))

    saved = te_world.run(
        checkpoint_jobs.trained_and_saved, num_ranks, config=config, samples=SAMPLES, folder=folder
    )
    schedule = saved[0]["schedule"]
    same = te_world.run(
        checkpoint_jobs.resumed, num_ranks,
        config=config, samples=SAMPLES, folder=folder, schedule=schedule,
    )  # fmt: skip
    other = te_world.run(
        checkpoint_jobs.resumed, 1,
        config=with_te(policy_config(path)), samples=SAMPLES, folder=folder, schedule=schedule,
    )  # fmt: skip

    for name, tensor in saved[0]["weights"].items():
        assert torch.equal(tensor, same[0]["weights"][name]), name
        assert torch.equal(tensor, other[0]["weights"][name]), name
        assert torch.equal(saved[0]["later"][name], same[0]["later"][name]), name


@pytest.mark.parametrize("to_te", [True, pytest.param(False, marks=pytest.mark.grid)])
def test_a_checkpoint_of_other_layers_is_resumed(
    te_world: TeWorld, world: Any, tiny_model: ModelMaker, tmp_path: Path, to_te: bool
) -> None:
    """Local layers have no `_extra_state`, TransformerEngine's have one each:
    neither is in the way of the other.
    """
    folder = str(tmp_path / "saved")
    local_config = policy_config(tiny_model("qwen2"))
    before = (world, local_config)
    after = (te_world, with_te(local_config))
    if not to_te:
        before, after = after, before

    world_before, config = before
    saved = world_before.run(
        checkpoint_jobs.trained_and_saved, 1, config=config, samples=SAMPLES, folder=folder
    )
    world_after, config = after
    read = world_after.run(
        checkpoint_jobs.resumed, 1,
        config=config, samples=SAMPLES, folder=folder, schedule=saved[0]["schedule"],
    )  # fmt: skip

    for name, tensor in saved[0]["weights"].items():
        assert torch.equal(tensor, read[0]["weights"][name]), name
