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
    logprobs = [0.0 if one else math.nan for one in trained]
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
    forwards = [0]
    for chunk in policy.chunks:
        chunk.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    result = policy.gradient(batch)
    return {
        "loss": result.loss,
        "gradients": gradients_of(policy),
        "forwards": forwards[0] / len(policy.chunks) / len(batch.micro_batches),
        "placement": batch.plan.placement,
    }


def prepared(policy: Any, old_path: str | None, samples: list[Sample]) -> Any:
    """The minibatch as one batch; with `old_path`, its old log-probs are those of
    the weights there.
    """
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
    """The gradient buffers under HF names, on the first rank: the sync's mapping is linear,
    so it fits gradients.
    """
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad
    gradients = {name: tensor.double().numpy() for name, tensor in policy.stream()}
    return gradients if dist.get_rank() == 0 else None


def naive_gradient(config: Config, old_path: str, samples: list[Sample]) -> dict[str, Any]:
    """Each micro-batch's loss over its own rollouts alone, averaged over micro-batches."""
    from megatron_real.objective import real_loss, sequence_scores

    policy = new_policy(config, config.model.path)
    batch = prepared(policy, old_path, samples)
    count = len(batch.micro_batches)
    assert count > 1, "the control needs groups that are cut"

    def naive(index: int, outputs: Any) -> torch.Tensor:
        micro, old_T = batch.micro_batches[index], batch.results[index].old_logprob_T
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
    """The gradient with Megatron's data-parallel averaging left on."""
    from megatron_real.policy import model

    ours = model.transformer_config

    def averaging(*args: Any, **kwargs: Any) -> Any:
        made = ours(*args, **kwargs)
        made.calculate_per_token_loss = False
        return made

    model.transformer_config = averaging
    try:
        policy = new_policy(config, config.model.path)
    finally:
        model.transformer_config = ours
    policy.chunks[0].config.calculate_per_token_loss = True  # the schedule sums; only DDP averages
    policy.gradient(prepared(policy, None, samples))
    return {"gradients": gradients_of(policy)}


def updates(config: Config, samples: list[Sample]) -> dict[str, Any]:
    """Three updates on one step's rollouts: the first on-policy, the others with a scoring pass."""
    policy = new_policy(config, config.model.path)
    start = {name: tensor.clone() for name, tensor in policy.stream()}
    done = [policy.update(batch) for batch in policy.prepare(rollouts_of(samples))]
    assert len(done) == 3, "five groups, two a minibatch"
    return {
        "losses": [u.gradient.loss for u in done],
        "grad_norms": [u.grad_norm for u in done],
        "start": start,
        "weights": {name: tensor.clone() for name, tensor in policy.stream()},
    }


def poisoned_update(config: Config, samples: list[Sample]) -> dict[str, Any]:
    """Two updates with a NaN among the old log-probs, then a sound one."""
    policy = new_policy(config, config.model.path)
    batches = policy.prepare(rollouts_of(samples))
    poisoned, sound = batches[1], batches[2]
    for micro, results in zip(poisoned.micro_batches, poisoned.results, strict=True):
        results.old_logprob_T[micro.kept_K] = torch.nan
    start = {name: tensor.clone() for name, tensor in policy.stream()}
    done = [policy.update(poisoned) for _ in range(2)]
    unchanged = all(torch.equal(tensor, start[name]) for name, tensor in policy.stream())
    done.append(policy.update(sound))
    return {
        "skipped": [u.skipped for u in done],
        "in_a_row": [u.skipped_in_a_row for u in done],
        "unchanged": unchanged,
    }


def logprobs(config: Config, samples: list[Sample]) -> torch.Tensor | None:
    """Log-probs of all response tokens in sample order, on the ranks that have them."""
    policy = new_policy(config, config.model.path)
    batch = policy.whole(rollouts_of(samples))
    policy.step.old_logprobs(batch)
    if not policy.groups.is_last_stage:
        return None
    found: dict[int, torch.Tensor] = {}
    for micro, results in zip(batch.micro_batches, batch.results, strict=True):
        for k, position in enumerate(micro.positions):
            own = slice(int(micro.cu_seqlens[k]), int(micro.cu_seqlens[k + 1]))
            found[position] = results.old_logprob_T[own][micro.target_T[own] >= 0]
    return torch.cat([found[i] for i in sorted(found)])


def export(config: Config, out: str) -> None:
    from megatron_real.weights.stream import write_hf

    policy = new_policy(config, config.model.path)
    if dist.get_rank() == 0:
        write_hf(out, policy.stream(), source=config.model.path, dtype=config.model.dtype)
    else:
        for _ in policy.stream():
            pass
