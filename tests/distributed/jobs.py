"""What the workers of the distributed tests run: functions of plain arguments,
called on every rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_real.batching import minibatches
from megatron_real.config import Config
from megatron_real.records import Completion, Label, Prompt, Rollout, Status, Verdict
from tests.distributed.reference import Sample


def rollouts_of(samples: list[Sample]) -> list[Rollout]:
    return [
        Rollout(
            prompt=Prompt(uid=str(s.group), text="", token_ids=s.prompt, answers=("",)),
            group=s.group,
            sample=i,
            completion=completion_of(s),
            verdict=Verdict(Status.OK, Label(s.label), float(s.label)),
        )
        for i, s in enumerate(samples)
    ]


def completion_of(sample: Sample) -> Completion:
    """The engine's log-probs are 0, and NaN where no token is trained: nothing may read those."""
    trained = sample.trained or (True,) * len(sample.response)
    logprobs = [0.0 if is_trained else math.nan for is_trained in trained]
    return Completion(sample.response, logprobs, "", True, trained)


def new_policy(config: Config, path: str, num_updates: int = 100) -> Any:
    from megatron_real.parallel.groups import set_up
    from megatron_real.policy.policy import Policy, PolicySettings
    from megatron_real.weights.architecture import Architecture
    from megatron_real.weights.hf import HfWeights

    return Policy(
        PolicySettings.of(config),
        Architecture.read(path),
        HfWeights(path),
        set_up(config.parallel),
        num_updates=num_updates,
    )


def gradient(config: Config, old_path: str | None, samples: list[Sample]) -> dict[str, Any]:
    """Loss, gradient of every parameter under its HF name, and counted model forwards,
    of one minibatch.
    """
    policy = new_policy(config, config.model.path)
    batch = prepared(policy, old_path, samples)
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    for chunk in policy.chunks:
        chunk.register_forward_pre_hook(count)
    result = policy.gradient(batch)
    return {
        "loss": result.loss,
        "gradients": gradients_of(policy),
        "forwards": forwards / len(policy.chunks) / len(batch.micro_batches),
        "placement": batch.plan.placement,
    }


def prepared(policy: Any, old_path: str | None, samples: list[Sample]) -> Any:
    """Packs the minibatch as one batch; with `old_path` its old log-probs are of those weights."""
    from megatron_real.weights.hf import HfWeights

    settings = policy.settings
    (cut,) = minibatches(rollouts_of(samples), settings.objective, groups_per_minibatch=1000)
    batch = policy.packer.pack(cut, off_policy=old_path is not None)

    if old_path is not None:
        policy.load_parameters(HfWeights(old_path))
        policy.step.old_logprobs(batch)
        policy.load_parameters(HfWeights(settings.model.path))
    return batch


def gradients_of(policy: Any) -> dict[str, Any] | None:
    """Returns the gradient buffers under HF names on the first rank: the sync's mapping is linear,
    so it fits gradients.
    """
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad
    gradients = {name: tensor.double().numpy() for name, tensor in policy.stream()}
    return gradients if dist.get_rank() == 0 else None


def naive_gradient(config: Config, old_path: str, samples: list[Sample]) -> dict[str, Any]:
    """Averages, over micro-batches, each one's loss over its own rollouts alone."""
    from megatron_real.objective import real_loss, sequence_scores

    policy = new_policy(config, config.model.path)
    batch = prepared(policy, old_path, samples)
    count = len(batch.micro_batches)
    assert count > 1, "the control needs groups that are cut"

    def naive(index: int, outputs: Any) -> torch.Tensor:
        micro = batch.micro_batches[index]
        old_T = batch.results[index].old_logprob_T
        used = slice(0, micro.num_used)
        score_R = sequence_scores(
            outputs.logprob_T[used],
            old_T[used],
            mask=micro.target_T[used] >= 0,
            cu_seqlens=micro.cu_seqlens,
        )
        label_R = batch.facts.label_R[micro.position_R]
        group_R = batch.facts.group_R[micro.position_R]
        return real_loss(score_R, label_R, group_R, one_class_groups="keep") / count

    policy.zero_gradients()
    policy.passes.forward_backward(batch.micro_batches, naive)
    return {"gradients": gradients_of(policy)}


def averaged_gradient(config: Config, samples: list[Sample]) -> dict[str, Any]:
    """Returns the gradient with Megatron's data-parallel averaging left on."""
    from megatron_real.policy import model

    summing = model.transformer_config

    def averaging(*args: Any, **kwargs: Any) -> Any:
        transformer_config = summing(*args, **kwargs)
        transformer_config.calculate_per_token_loss = False
        return transformer_config

    model.transformer_config = averaging
    try:
        policy = new_policy(config, config.model.path)
    finally:
        model.transformer_config = summing

    # Only DDP is to average: the schedule reads the flag again, and sums.
    policy.chunks[0].config.calculate_per_token_loss = True
    policy.gradient(prepared(policy, None, samples))
    return {"gradients": gradients_of(policy)}


def updates(config: Config, samples: list[Sample]) -> dict[str, Any]:
    """Makes three updates on one step's rollouts: the first on-policy, the others after scoring."""
    policy = new_policy(config, config.model.path)
    start = {name: tensor.clone() for name, tensor in policy.stream()}
    results = [policy.update(batch) for batch in policy.prepare(rollouts_of(samples))]
    assert len(results) == 3, "five groups, two a minibatch"
    return {
        "losses": [u.gradient.loss for u in results],
        "grad_norms": [u.grad_norm for u in results],
        "start": start,
        "weights": {name: tensor.clone() for name, tensor in policy.stream()},
    }


def poisoned_update(config: Config, samples: list[Sample]) -> dict[str, Any]:
    """Makes two updates with a NaN among the old log-probs, then a sound one."""
    policy = new_policy(config, config.model.path)
    batches = policy.prepare(rollouts_of(samples))
    poisoned = batches[1]
    sound = batches[2]
    for micro, results in zip(poisoned.micro_batches, poisoned.results, strict=True):
        results.old_logprob_T[micro.kept_K] = torch.nan

    start = {name: tensor.clone() for name, tensor in policy.stream()}
    updates = [policy.update(poisoned) for _ in range(2)]
    unchanged = all(torch.equal(tensor, start[name]) for name, tensor in policy.stream())
    updates.append(policy.update(sound))
    return {
        "skipped": [u.skipped for u in updates],
        "in_a_row": [u.skipped_in_a_row for u in updates],
        "unchanged": unchanged,
    }


def logprobs(config: Config, samples: list[Sample]) -> torch.Tensor | None:
    """Returns the log-probs of all response tokens in sample order, on the ranks that have them."""
    policy = new_policy(config, config.model.path)
    batch = policy.whole(rollouts_of(samples))
    policy.step.old_logprobs(batch)
    if not policy.groups.is_last_stage:
        return None

    by_position: dict[int, torch.Tensor] = {}
    for micro, results in zip(batch.micro_batches, batch.results, strict=True):
        for k, position in enumerate(micro.positions):
            own = slice(int(micro.cu_seqlens[k]), int(micro.cu_seqlens[k + 1]))
            by_position[position] = results.old_logprob_T[own][micro.target_T[own] >= 0]
    return torch.cat([by_position[i] for i in sorted(by_position)])


def export(config: Config, out: str) -> None:
    from megatron_real.weights.stream import write_hf

    policy = new_policy(config, config.model.path)
    if dist.get_rank() == 0:
        write_hf(out, policy.stream(), source=config.model.path, dtype=config.model.dtype)
    else:
        for _ in policy.stream():
            pass
