"""Checkpoints across layouts, against the very tensors that were saved: equal bit for bit,
or the test fails.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_real.policy.optimizer_state import boxes
from tests.amount import core, cover, thinned
from tests.distributed import checkpoint_jobs as jobs
from tests.distributed import reference
from tests.distributed.test_policy import config_of
from tests.distributed.world import World

ModelMaker = Callable[..., Path]
SAMPLES = reference.minibatch(1, vocab=101)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "dp2": (2, {}),
    "tp2-sp": (2, {"tp": 2, "sp": True}),
    "pp2-dp2": (4, {"pp": 2}),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}),
    "cp2-dp2": (4, {"cp": 2}),
    "tp2-pp2-dp2": (8, {"tp": 2, "pp": 2}),
    "dp2-not-distributed": (2, {"distributed": False}),
    "dp2-overlap": (2, {"megatron": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
}
PAIRS = [
    ("tp2-pp2-dp2", "dp2"), ("tp2-sp", "pp2-vpp2"), ("plain", "tp2-pp2-dp2"), ("dp2", "tp2-sp"),
    ("pp2-vpp2", "cp2-dp2"), ("cp2-dp2", "dp2-not-distributed"), ("dp2-not-distributed", "pp2-dp2"),
    ("dp2-overlap", "plain"), ("pp2-dp2", "dp2-overlap"),
]  # fmt: skip
# By default each layout occurs, and the largest one both saves and reads. In the grid each layout
# does both, with either kind of head.
CORE = [
    (("tp2-pp2-dp2", "dp2"), True), (("tp2-sp", "pp2-vpp2"), False),
    (("plain", "tp2-pp2-dp2"), False), (("cp2-dp2", "dp2-not-distributed"), True),
    (("pp2-dp2", "dp2-overlap"), False),
]  # fmt: skip
ROWS = [
    pytest.param(
        pair,
        tied,
        marks=() if (pair, tied) in CORE else pytest.mark.grid,
        id=f"{pair[0]}-to-{pair[1]}-{tied}",
    )
    for pair, tied in product(PAIRS, [False, True])
]
SAME = ["tp2-sp", "dp2-overlap", "cp2-dp2", "dp2-not-distributed", "plain", "tp2-pp2-dp2"]


def run(world: World, path: Path, layout: str, job: Any, **arguments: Any) -> list[Any]:
    size, options = LAYOUTS[layout]
    return world.run(job, size, config=config_of(path, **options), samples=SAMPLES, **arguments)


@pytest.mark.parametrize(("pair", "tied"), thinned(ROWS, kept=2))
def test_another_layout_reads_the_same_state(
    world: World, tiny_model: ModelMaker, tmp_path: Path, pair: tuple[str, str], tied: bool
) -> None:
    """Training went on between the copy and the write, so this is saving while stepping too."""
    before, after = pair
    path = tiny_model("qwen2", tie_word_embeddings=tied)
    folder = str(tmp_path / "saved")
    saved = run(world, path, before, jobs.trained_and_saved, folder=folder)
    read = run(world, path, after, jobs.resumed, folder=folder, schedule=saved[0]["schedule"])

    for name, tensor in saved[0]["weights"].items():
        assert torch.equal(tensor, read[0]["weights"][name]), name

    saved_state = jobs.assembled(saved)
    read_state = jobs.assembled(read)
    assert saved_state.keys() >= {"optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight"}
    for key, saved_tensor in saved_state.items():
        read_tensor = read_state[key]
        # The vocabulary's padding depends on the layout: only what both have is compared.
        sizes = zip(saved_tensor.shape, read_tensor.shape, strict=True)
        common = tuple(slice(0, min(pair)) for pair in sizes)
        assert torch.equal(saved_tensor[common], read_tensor[common]), key
        assert not saved_tensor.isnan().any(), f"nobody saved a part of {key}"

    # Three more updates: layouts differ by rounding, a lost optimizer state by the whole movement.
    for name, tensor in saved[0]["later"].items():
        moved = (tensor - saved[0]["weights"][name]).norm()
        assert (tensor - read[0]["later"][name]).norm() <= 0.01 * moved, f"{name} goes on otherwise"


@pytest.mark.parametrize(
    "layout",
    thinned(core(SAME, SAME[:4]), kept=2),
)
def test_the_same_layout_goes_on_bit_for_bit(
    world: World, tiny_model: ModelMaker, tmp_path: Path, layout: str
) -> None:
    path = tiny_model("qwen2")
    folder = str(tmp_path / "saved")
    saved = run(world, path, layout, jobs.trained_and_saved, folder=folder)
    read = run(world, path, layout, jobs.resumed, folder=folder, schedule=saved[0]["schedule"])

    for name, tensor in saved[0]["later"].items():
        assert torch.equal(tensor, read[0]["later"][name]), name

    # Tensor-parallel ranks that hold the same norms read them each.
    numbers = [rank["numbers read"] for rank in read]
    if not LAYOUTS[layout][1].get("tp"):
        assert sum(numbers) == jobs.numbers_of(folder), "each number is read by one rank"
    assert max(numbers) < 1.5 * sum(numbers) / len(numbers), "and the ranks share them evenly"


def test_without_the_copy_the_file_holds_later_weights(
    world: World, tiny_model: ModelMaker, tmp_path: Path
) -> None:
    """Negative control of the two tests above: the live state is saved in place of its copy."""
    path = tiny_model("qwen2")
    folder = str(tmp_path / "saved")
    saved = run(world, path, "plain", jobs.trained_and_saved, folder=folder, live=True)
    read = run(world, path, "plain", jobs.resumed, folder=folder, schedule=saved[0]["schedule"])

    name = "model.embed_tokens.weight"
    assert not torch.equal(saved[0]["weights"][name], read[0]["weights"][name])
    assert torch.equal(saved[0]["later"][name], read[0]["weights"][name])


@pytest.mark.parametrize(
    ("before", "after"),
    thinned(
        cover(["plain", "cp2-dp2", "tp2-pp2-dp2"], ["plain", "tp2-sp", "pp2-dp2", "cp2-dp2"]),
        kept=2,
    ),
)
def test_a_step_is_ended_on_another_layout(
    world: World, tiny_model: ModelMaker, before: str, after: str
) -> None:
    """The scores of the remaining updates are against the old log-probs that were kept.

    Same layout: bit for bit.
    """
    path = tiny_model("qwen2")
    stopped = run(world, path, before, jobs.stopped_within_a_step, done=1)[0]
    resumed = run(world, path, after, jobs.taken_up, begun=stopped["begun"], done=1)[0]

    for resumed_scores, scores in zip(resumed["scores"], stopped["scores"], strict=True):
        if before == after:
            assert torch.equal(resumed_scores, scores)
        assert torch.allclose(resumed_scores, scores, rtol=0, atol=2e-5)
    largest = max(float(scores.abs().max()) for scores in stopped["scores"])
    assert largest > 1e-3, "the update moved the weights"
    assert resumed["stats"] == stopped["stats"], "the token figures are those that were saved"


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (2, 3, 4), (5, 1)])
def test_boxes_cover_every_run_of_elements(shape: tuple[int, ...]) -> None:
    index = torch.arange(torch.Size(shape).numel()).view(shape)
    for low in range(index.numel() + 1):
        for high in range(low, index.numel() + 1):
            elements = [
                index[jobs.slices(offset, size)].flatten()
                for offset, size in boxes(shape, low, high)
            ]
            assert [i for box in elements for i in box.tolist()] == list(range(low, high))
            assert all(len(box) for box in elements), "no box is empty"
