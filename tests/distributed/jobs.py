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
    from megatron_real.weights.hf import HfWeights
    from megatron_real.weights.stream import load_hf

    policy = new_policy(config, config.model.path)
    (cut,) = minibatches(rollouts_of(samples), groups_per_minibatch=1000, one_class_groups="skip")
    batch = policy.pack(cut, needs_scores=old_path is not None)
    if old_path is not None:
        ranks = {"tp_rank": policy.groups.tp.rank(), "tp": policy.groups.tp.size()}
        load_hf(policy.chunks, HfWeights(old_path), policy.architecture, **ranks)
        policy.step.old_logprobs(batch)
        load_hf(policy.chunks, HfWeights(config.model.path), policy.architecture, **ranks)
    forwards = [0]
    for chunk in policy.chunks:
        chunk.register_forward_pre_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    result = policy.gradient(batch)
    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    gradients = {name: tensor.double().numpy() for name, tensor in policy.stream()}
    return {
        "loss": result.loss,
        "gradients": gradients if dist.get_rank() == 0 else None,
        "forwards": forwards[0] / len(policy.chunks) / len(batch.micro_batches),
        "placement": batch.plan.placement,
        "micro_batches": len(batch.micro_batches),
    }
