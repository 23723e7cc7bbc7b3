"""Rollouts that lag behind: pi_old is of the weights that generated them,
and the first minibatch is scored too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_real.config import BatchConfig, Config
from tests.distributed import jobs, reference
from tests.distributed.reference import Sample
from tests.distributed.test_invariance import TOLERANCE, model_paths, worst_error
from tests.distributed.test_policy import LAYOUTS, config_of
from tests.distributed.world import World

ModelMaker = Callable[..., Path]


def old_logprobs(batches: list[Any]) -> list[torch.Tensor]:
    """On the ranks that have them."""
    results = [results for batch in batches for results in batch.results]
    return [r.old_logprob_T for r in results if r.has("old_logprob_T")]


def all_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def lagging(config: Config, samples: list[Sample]) -> dict[str, Any]:
    """Two steps of updates; after each, the old log-probs under the weights before it."""
    from megatron_real.policy.snapshot import Snapshot

    policy, rollouts, found = (
        jobs.new_policy(config, config.model.path),
        jobs.rollouts_of(samples),
        {},
    )
    snapshot = Snapshot(policy)
    for step in (1, 2):
        snapshot.take()
        before = old_logprobs(policy.prepare(rollouts, lagging=True))
        for batch in policy.prepare(rollouts):
            policy.update(batch)
        present = [tensor.clone() for _, tensor in policy.stream()]
        with snapshot.swapped_in():
            batches = policy.prepare(rollouts, lagging=True)
        found[f"lagged {step}"] = all_equal(old_logprobs(batches), before)
        found[f"restored {step}"] = all_equal([tensor for _, tensor in policy.stream()], present)
        found[f"present {step}"] = all_equal(
            old_logprobs(policy.prepare(rollouts, lagging=True)), before
        )
    found["scores"] = policy.gradient(batches[0]).score_R.abs().max().item()
    return found


@pytest.mark.parametrize("layout", ["plain", "pp2-vpp2", "cp2-dp2", "tp2-sp", "dp2-overlap"])
def test_old_log_probs_are_those_of_the_weights_that_generated(
    world: World, tiny_model: ModelMaker, layout: str
) -> None:
    """To the bit, and so are the weights afterwards.

    Control: under the present weights they differ.
    """
    size, options = LAYOUTS[layout]
    config, samples = config_of(tiny_model("qwen2"), **options), reference.minibatch(1, vocab=101)
    ranks = world.run(lagging, size, config=config, samples=samples)
    for found in ranks:
        assert all(found[f"{what} {step}"] for what in ("lagged", "restored") for step in (1, 2))
        assert found["scores"] > 1e-4, "the weights moved since"
    assert not any(ranks[-1][f"present {step}"] for step in (1, 2)), (
        "the last rank has log-probs in every layout"
    )


def lagged_gradient(
    config: Config, old_path: str, samples: list[Sample], lag: bool
) -> dict[str, Any]:
    """The gradient under the weights of the configuration, of rollouts that those
    of `old_path` generated.
    """
    from megatron_real.policy.snapshot import Snapshot
    from megatron_real.weights.hf import HfWeights
    from megatron_real.weights.stream import load_weights

    policy = jobs.new_policy(config, old_path)
    snapshot = Snapshot(policy)
    snapshot.take()
    ranks = {"tp_rank": policy.groups.tp.rank(), "tp": policy.groups.tp.size()}
    load_weights(policy.chunks, HfWeights(config.model.path), policy.architecture, **ranks)
    rollouts = jobs.rollouts_of(samples)
    if lag:
        with snapshot.swapped_in():
            (batch,) = policy.prepare(rollouts, lagging=True)
    else:
        (batch,) = policy.prepare(rollouts)
    return {"loss": policy.gradient(batch).loss, "gradients": jobs.gradients_of(policy)}


@pytest.mark.parametrize("layout", ["plain", "pp2-dp2"])
def test_the_gradient_is_that_of_the_printed_equation(
    world: World, tiny_model: ModelMaker, layout: str
) -> None:
    """Eq. 8 by transformers in float64, with the old log-probs of other weights.

    Control: the shortcut of the first minibatch, which takes them to be the same, is off by far.
    """
    path, old_path = model_paths(tiny_model, "qwen2")
    samples, (size, options) = reference.minibatch(1, vocab=101), LAYOUTS[layout]
    config = config_of(path, **options)
    config = replace(
        config,
        model=replace(config.model, dtype="fp64"),
        batch=BatchConfig(max_tokens=96, minibatch_prompts=6),
    )
    loss, gradients = reference.gradient(path, old_path, samples)
    lagged, shortcut = (
        world.run(
            lagged_gradient, size, config=config, old_path=str(old_path), samples=samples, lag=lag
        )[0]
        for lag in (True, False)
    )
    assert lagged["loss"] == pytest.approx(loss, rel=1e-10)
    assert worst_error(lagged["gradients"], gradients)[0] <= TOLERANCE["fp64"]
    assert worst_error(shortcut["gradients"], gradients)[0] > 0.05
