"""Rollouts of earlier weights: pi_old is of the weights that generated them,
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
from tests.amount import thinned
from tests.distributed import jobs, reference
from tests.distributed.reference import Sample
from tests.distributed.test_invariance import TOLERANCE, model_paths, worst_error
from tests.distributed.test_policy import LAYOUTS, config_of
from tests.distributed.world import World

ModelMaker = Callable[..., Path]


def old_logprobs(batches: list[Any]) -> list[torch.Tensor]:
    """Returns the old log-probs of the micro-batches, on the ranks that have them."""
    results = [results for batch in batches for results in batch.results]
    return [r.old_logprob_T for r in results if r.has("old_logprob_T")]


def all_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def lagging(config: Config, samples: list[Sample]) -> dict[str, Any]:
    """Makes two steps of updates, and after each the old log-probs under the weights before it."""
    from megatron_real.policy.snapshot import Snapshot

    policy = jobs.new_policy(config, config.model.path)
    rollouts = jobs.rollouts_of(samples)
    results: dict[str, Any] = {}
    snapshot = Snapshot(policy)
    for step in (1, 2):
        snapshot.take()
        before = old_logprobs(policy.prepare(rollouts, lagging=True))
        for batch in policy.prepare(rollouts):
            policy.update(batch)

        present = [tensor.clone() for _, tensor in policy.stream()]
        with snapshot.swapped_in():
            batches = policy.prepare(rollouts, lagging=True)
        results[f"lagged {step}"] = all_equal(old_logprobs(batches), before)
        results[f"restored {step}"] = all_equal([tensor for _, tensor in policy.stream()], present)

        batches_of_present = policy.prepare(rollouts, lagging=True)
        results[f"present {step}"] = all_equal(old_logprobs(batches_of_present), before)
    results["scores"] = policy.gradient(batches[0]).score_R.abs().max().item()
    return results


@pytest.mark.parametrize(
    "layout", thinned(["pp2-vpp2", "dp2-overlap", "plain", "cp2-dp2", "tp2-sp"], kept=2)
)
def test_old_log_probs_are_those_of_the_weights_that_generated(
    world: World, tiny_model: ModelMaker, layout: str
) -> None:
    """To the bit, and so are the weights afterwards.

    Control: under the present weights they differ.
    """
    size, options = LAYOUTS[layout]
    config = config_of(tiny_model("qwen2"), **options)
    samples = reference.minibatch(1, vocab=101)

    ranks = world.run(lagging, size, config=config, samples=samples)

    for results in ranks:
        assert all(results[f"{what} {step}"] for what in ("lagged", "restored") for step in (1, 2))
        # Under the weights that generated, scores are rounding alone.
        assert results["scores"] > 1e-4, "the weights moved since"
    # The last rank has log-probs in every layout.
    assert not any(ranks[-1][f"present {step}"] for step in (1, 2))


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

    Control, in one layout: the shortcut of the first minibatch, which takes them to be the same,
    is off by far.
    """
    path, old_path = model_paths(tiny_model, "qwen2")
    samples = reference.minibatch(1, vocab=101)
    size, options = LAYOUTS[layout]
    config = config_of(path, **options)
    config = replace(
        config,
        model=replace(config.model, dtype="fp64"),
        batch=BatchConfig(max_tokens=96, minibatch_prompts=6),
    )
    loss, gradients = reference.gradient(path, old_path, samples)

    job: dict[str, Any] = {"config": config, "old_path": str(old_path), "samples": samples}
    lagged = world.run(lagged_gradient, size, **job, lag=True)[0]

    assert lagged["loss"] == pytest.approx(loss, rel=1e-10)
    assert worst_error(lagged["gradients"], gradients)[0] <= TOLERANCE["fp64"]

    if layout == "plain":
        shortcut = world.run(lagged_gradient, size, **job, lag=False)[0]
        assert worst_error(shortcut["gradients"], gradients)[0] > 0.05
