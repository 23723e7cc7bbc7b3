"""What the workers of the conversion tests run: megatron-core's own loader and writer against our converters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_real.config import Config


def _policy(config: Config) -> Any:
    from megatron_real.policy.layout import set_up
    from megatron_real.policy.policy import Policy
    from megatron_real.weights.architecture import Architecture

    return Policy(config, Architecture.read(config.model.path), set_up(config.parallel), num_updates=100)


def _sharded(policy: Any) -> dict[str, Any]:
    """The model's sharded state dict as Megatron-LM makes it: `model`, or `model0`, ... with virtual stages."""
    if len(policy.chunks) == 1:
        return {"model": policy.chunks[0].sharded_state_dict()}
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(policy.chunks)}


def _load_by_megatron(policy: Any, checkpoint: str) -> None:
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load(_sharded(policy), checkpoint)
    for i, chunk in enumerate(policy.chunks):
        chunk.load_state_dict(loaded["model" if len(policy.chunks) == 1 else f"model{i}"])


def logprobs_by_megatron(config: Config, checkpoint: str, tokens: list[int]) -> list[float] | None:
    """megatron-core's dist_checkpointing loads `checkpoint`; log-probs of tokens[1:] (nats), on the last stage."""
    policy = _policy(config)
    _load_by_megatron(policy, checkpoint)
    by_megatron = {name: p.detach().clone() for name, p in _parameters(policy)}
    _load_by_us(policy, checkpoint)
    for name, parameter in _parameters(policy):
        assert torch.equal(parameter, by_megatron[name]), f"our loader fills {name} otherwise"
    return policy_logprobs(policy, tokens)


def _load_by_us(policy: Any, checkpoint: str) -> None:
    from megatron_real.weights.conversion import open_megatron
    from megatron_real.weights.stream import load_weights

    with torch.no_grad():
        for _, parameter in _parameters(policy):
            parameter.fill_(float("nan"))
    weights = open_megatron(Path(checkpoint), policy.architecture)
    ranks = {"tp_rank": policy.groups.tp.rank(), "tp": policy.groups.tp.size()}
    load_weights(policy.chunks, weights, policy.architecture, **ranks)


def _parameters(policy: Any) -> list[tuple[str, torch.nn.Parameter]]:
    from megatron_real.weights.stream import global_parameters

    return list(global_parameters(policy.chunks).items())


def policy_logprobs(policy: Any, tokens: list[int]) -> list[float] | None:
    """Log-probs (nats) of tokens[1:] under the policy, through the pipeline schedule."""
    from megatron_real.batching import minibatches
    from megatron_real.records import Completion, Prompt, Rollout, Verdict

    completion = Completion(tuple(tokens[1:]), (0.0,) * (len(tokens) - 1), "", True)
    rollouts = [
        Rollout(Prompt("0", "", tuple(tokens[:1]), ("",)), 0, i, completion, Verdict("ok", label, float(label)))
        for i, label in enumerate((1, 0))
    ]
    (cut,) = minibatches(rollouts, groups_per_minibatch=1, one_class_groups="skip")
    batch = policy.pack(cut, needs_scores=True)
    policy.step.old_logprobs(batch)
    for micro in batch.micro_batches:
        for k, position in enumerate(micro.positions):
            if position == 0 and policy.groups.is_last_stage:
                own = slice(int(micro.cu_seqlens[k]), int(micro.cu_seqlens[k + 1]))
                return list(micro.old_logprob_T[own][micro.target_T[own] >= 0].tolist())
    return None


def save_by_megatron(config: Config, out: str, *, steps: int) -> dict[str, Any] | None:
    """Trains for `steps` optimizer steps on random gradients, saves model and optimizer by megatron-core, and returns
    the gathered HF tensors of the first rank."""
    from megatron.core import dist_checkpointing

    from megatron_real.weights.hf import HfWeights

    policy = _policy(config)
    policy.load(HfWeights(config.model.path))
    for step in range(steps):
        torch.manual_seed(step)  # the same on all ranks: replicas must not drift apart
        for chunk in policy.ddp:
            chunk.zero_grad_buffer()
            for parameter in chunk.parameters():
                parameter.main_grad.copy_(torch.randn(parameter.shape) * 0.01)
        done, _, _ = policy.optimizer.step()
        assert done
    state = _sharded(policy)
    state["optimizer"] = policy.optimizer.sharded_state_dict(
        state, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
    )
    if dist.get_rank() == 0:
        Path(out).mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(state, out)
    gathered = {name: tensor.clone() for name, tensor in policy.stream()}
    return gathered if dist.get_rank() == 0 else None
