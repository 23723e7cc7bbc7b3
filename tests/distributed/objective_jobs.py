"""What the workers of the objectives' matrix run: one model, every objective over it in turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from megatron_real.batching import minibatches
from megatron_real.config import Config
from megatron_real.objective import KlConfig, Objective, make_objective
from megatron_real.objective.facts import RolloutTable
from tests.distributed import jobs
from tests.distributed.reference import Sample


def objective_of(name: str, settings: Mapping[str, Any], kl: Mapping[str, Any] | None) -> Objective:
    if kl:
        return make_objective(name, **settings, kl=KlConfig(**kl))
    return make_objective(name, **settings)


def gradients(
    config: Config,
    old_path: str | None,
    reference_path: str,
    samples: list[Sample],
    cases: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any] | None]],
) -> dict[str, dict[str, Any]]:
    """Returns for each case the loss, the gradient of every parameter under its HF name,
    and the clipped shares.
    """
    from megatron_real.policy.reference import Reference
    from megatron_real.policy.train_step import TrainStep
    from megatron_real.weights.hf import HfWeights

    policy = jobs.new_policy(config, config.model.path)
    rollouts = Reference(policy, HfWeights(reference_path)).annotated(jobs.rollouts_of(samples))

    steps = {}
    batches = {}
    for case, description in cases.items():
        objective = objective_of(*description)
        steps[case] = TrainStep(policy.passes, policy.groups, objective, mismatch_bound=0.1)
        (cut,) = minibatches(rollouts, objective, groups_per_minibatch=1000)
        packer = dataclasses.replace(policy.packer, objective=objective)
        batches[case] = packer.pack(cut, off_policy=old_path is not None)

    # The old weights are loaded once for all cases, and the policy's once after them.
    if old_path is not None:
        policy.load_parameters(HfWeights(old_path))
        for case, step in steps.items():
            step.old_logprobs(batches[case])
        policy.load_parameters(HfWeights(config.model.path))

    results = {}
    for case, step in steps.items():
        policy.zero_gradients()
        gradient = step.gradient(batches[case])
        results[case] = {
            "loss": gradient.loss,
            "gradients": gradients_of(policy),
            "clipped": (gradient.clipped_low_share, gradient.clipped_high_share),
            "low_ratio": gradient.low_ratio_tokens,
        }
    return results


def gradients_of(policy: Any) -> dict[str, Any] | None:
    """Returns the gradient buffers under HF names, on the first rank; keeps the parameters."""
    parameters = [p for chunk in policy.chunks for p in chunk.parameters()]
    own = [p.data for p in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad

    # Every rank takes part in the stream; the first one alone keeps what comes.
    named = {name: tensor.double().clone().numpy() for name, tensor in policy.stream()}
    for parameter, data in zip(parameters, own, strict=True):
        parameter.data = data
    return named if dist.get_rank() == 0 else None


def mismatches(config: Config, samples: list[Sample]) -> dict[str, list[float]]:
    """The mean |log-prob here - in the engine| of each rollout,
    measured by a step of each objective.
    """
    from megatron_real.objective.registry import OBJECTIVES
    from megatron_real.policy.train_step import TrainStep

    policy = jobs.new_policy(config, config.model.path)
    rollouts = jobs.rollouts_of(samples)
    means = {}
    for name in OBJECTIVES:
        step = TrainStep(policy.passes, policy.groups, make_objective(name), mismatch_bound=0.1)
        means[name] = step.mismatch(policy.whole(rollouts)).tolist()
    return means


def averaged_per_micro_batch(
    config: Config, old_path: str, samples: list[Sample]
) -> dict[str, Any] | None:
    """DAPO's token mean taken in each micro-batch by itself and averaged over micro-batches:
    the classic mistake.
    """
    from megatron_real.policy.train_step import TrainStep
    from megatron_real.weights.hf import HfWeights

    policy = jobs.new_policy(config, config.model.path)
    objective = make_objective("dapo")
    rollouts = jobs.rollouts_of(samples)
    (cut,) = minibatches(rollouts, objective, groups_per_minibatch=1000)
    packer = dataclasses.replace(policy.packer, objective=objective)
    batch = packer.pack(cut, off_policy=True)
    assert len(batch.micro_batches) > 1, "the control needs several micro-batches"

    step = TrainStep(policy.passes, policy.groups, objective, mismatch_bound=0.1)
    policy.load_parameters(HfWeights(old_path))
    step.old_logprobs(batch)
    policy.load_parameters(HfWeights(config.model.path))

    whole = objective.facts(RolloutTable.of(rollouts))

    def averaged(index: int, outputs: Any) -> Any:
        micro = batch.micro_batches[index]
        # Advantages are right; the denominator is that of the micro-batch's own tokens.
        own_tokens = whole.token_weight_R.new_full(
            whole.token_weight_R.shape, 1.0 / micro.kept_K.numel()
        )
        facts = dataclasses.replace(whole, token_weight_R=own_tokens / len(batch.micro_batches))
        old_T = batch.results[index].old_logprob_T
        terms_K = objective.token_loss(
            outputs.logprob_T[micro.kept_K], old_T[micro.kept_K], micro.rollout_K, facts
        )
        return terms_K.sum()

    policy.zero_gradients()
    policy.passes.forward_backward(batch.micro_batches, averaged)
    return gradients_of(policy)
