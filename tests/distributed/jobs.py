"""What the workers of the distributed tests run: functions of plain arguments, called on every rank."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_real.batching import minibatches
from megatron_real.config import Config
from megatron_real.records import Completion, Prompt, Rollout, Verdict
from tests.distributed.reference import Sample


def rollouts_of(samples: list[Sample]) -> list[Rollout]:
    return [
        Rollout(
            prompt=Prompt(uid=str(s.group), text="", token_ids=s.prompt, answers=("",)),
            group=s.group,
            sample=i,
            completion=Completion(s.response, (0.0,) * len(s.response), "", True),
            verdict=Verdict("ok", s.label, float(s.label)),
        )
        for i, s in enumerate(samples)
    ]


def new_policy(config: Config, path: str, num_updates: int = 100) -> Any:
    from megatron_real.policy.layout import set_up
    from megatron_real.policy.policy import Policy
    from megatron_real.weights.architecture import Architecture
    from megatron_real.weights.hf import HfWeights

    policy = Policy(config, Architecture.read(path), set_up(config.parallel), num_updates=num_updates)
    policy.load(HfWeights(path))
    return policy


def gradient(config: Config, old_path: str | None, samples: list[Sample]) -> dict[str, Any]:
    """Loss, gradient of every parameter under its HF name, and counted model forwards, of one minibatch."""
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
    """The minibatch as one batch; with `old_path`, its old log-probs are those of the weights there."""
    from megatron_real.weights.hf import HfWeights
    from megatron_real.weights.stream import load_weights

    (cut,) = minibatches(rollouts_of(samples), groups_per_minibatch=1000, one_class_groups="skip")
    batch = policy.pack(cut, needs_scores=old_path is not None)
    if old_path is not None:
        ranks = {"tp_rank": policy.groups.tp.rank(), "tp": policy.groups.tp.size()}
        load_weights(policy.chunks, HfWeights(old_path), policy.architecture, **ranks)
        policy.step.old_logprobs(batch)
        load_weights(policy.chunks, HfWeights(policy.config.model.path), policy.architecture, **ranks)
    return batch


def gradients_of(policy: Any) -> dict[str, Any] | None:
    """The gradient buffers under HF names, on the first rank: the sync's mapping is linear, so it fits gradients."""
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data = parameter.main_grad
    gradients = {name: tensor.double().numpy() for name, tensor in policy.stream()}
    return gradients if dist.get_rank() == 0 else None


def naive_gradient(config: Config, old_path: str, samples: list[Sample]) -> dict[str, Any]:
    """Each micro-batch's loss over its own rollouts alone, averaged over micro-batches."""
    from megatron_real.objective import real_loss

    policy = new_policy(config, config.model.path)
    batch = prepared(policy, old_path, samples)
    step, count = policy.step, len(batch.micro_batches)
    assert count > 1, "the control needs groups that are cut"

    def naive(micro: Any, logprob_T: torch.Tensor) -> torch.Tensor:
        own = list(micro.positions)
        score_R = step._partial_scores(micro, logprob_T)
        return real_loss(score_R, batch.label_R[own], batch.group_R[own], one_class_groups="keep") / count

    step._run(batch.micro_batches, naive, forward_only=False)
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
    for micro in poisoned.micro_batches:
        micro.old_logprob_T[micro.target_T >= 0] = torch.nan
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
    (cut,) = minibatches(rollouts_of(samples), groups_per_minibatch=1000, one_class_groups="keep")
    batch = policy.pack(cut, needs_scores=True)
    policy.step.old_logprobs(batch)
    if not policy.groups.is_last_stage:
        return None
    found: dict[int, torch.Tensor] = {}
    for micro in batch.micro_batches:
        for k, position in enumerate(micro.positions):
            own = slice(int(micro.cu_seqlens[k]), int(micro.cu_seqlens[k + 1]))
            found[position] = micro.old_logprob_T[own][micro.target_T[own] >= 0]
    return torch.cat([found[i] for i in sorted(found)])


def export(config: Config, out: str) -> None:
    from megatron_real.weights.stream import write_hf

    policy = new_policy(config, config.model.path)
    if dist.get_rank() == 0:
        write_hf(out, policy.stream(), source=config.model.path, dtype=config.model.dtype)
    else:
        for _ in policy.stream():
            pass
