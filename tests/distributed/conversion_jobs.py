"""What the workers of the conversion tests run: megatron-core's own loader and
writer against our converters.
"""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_real.config import Config, ModelConfig
from megatron_real.records import Completion, Label, Prompt, Rollout, Status, Verdict
from tests.distributed.jobs import new_policy


def _sharded(policy: Any) -> dict[str, Any]:
    """Returns the model's sharded state dict as Megatron-LM makes it."""
    names = _names_of_chunks(policy)
    return {
        name: chunk.sharded_state_dict() for name, chunk in zip(names, policy.chunks, strict=True)
    }


def _names_of_chunks(policy: Any) -> list[str]:
    """Returns Megatron-LM's names of the chunks: `model`, or `model0`, ... with virtual stages."""
    if len(policy.chunks) == 1:
        return ["model"]
    return [f"model{i}" for i in range(len(policy.chunks))]


def _load_by_megatron(policy: Any, checkpoint: str) -> None:
    """Loads by dist_checkpointing, or by Megatron-LM's way with the older format:
    torch.load and a strict load_state_dict.
    """
    from megatron.core import dist_checkpointing

    if (Path(checkpoint) / ".metadata").exists():
        loaded = dist_checkpointing.load(_sharded(policy), checkpoint)
    else:
        groups = policy.groups
        folder = f"mp_rank_{groups.tp.rank():02d}"
        if groups.pp.size() > 1:
            folder += f"_{groups.pp.rank():03d}"
        loaded = torch.load(Path(checkpoint) / folder / "model_optim_rng.pt", weights_only=False)
    for name, chunk in zip(_names_of_chunks(policy), policy.chunks, strict=True):
        chunk.load_state_dict(loaded[name], strict=True)


def logits_of_checkpoint(config: Config, checkpoint: str, tokens: list[int]) -> Any:
    """Returns the logits [T, V] of tokens[:-1] on one rank, None on others.

    First megatron-core's loader and ours must fill the parameters with the same values.
    """
    from megatron_real.conversion.convert import open_megatron
    from megatron_real.weights.stream import global_parameters

    policy = new_policy(config, config.model.path)
    parameters = list(global_parameters(policy.chunks).items())
    _load_by_megatron(policy, checkpoint)
    by_megatron = {name: parameter.detach().clone() for name, parameter in parameters}
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.fill_(float("nan"))
    policy.load_parameters(open_megatron(Path(checkpoint), policy.architecture))
    for name, parameter in parameters:
        assert torch.equal(parameter, by_megatron[name]), f"our loader fills {name} otherwise"
    return _logits(policy, tokens)


def _logits(policy: Any, tokens: list[int]) -> Any:
    """Computes the logits through the pipeline schedule, as in training."""
    from megatron_real.policy.parity import captured_logits

    completion = Completion(tuple(tokens[1:]), (0.0,) * (len(tokens) - 1), "", True)
    prompt = Prompt("0", "", tuple(tokens[:1]), ("",))
    # A group needs one rollout of each label.
    rollouts = [
        Rollout(prompt, 0, i, completion, Verdict(Status.OK, Label(i), float(i))) for i in range(2)
    ]
    batch = policy.whole(rollouts)
    if not policy.groups.is_last_stage:
        policy.step.old_logprobs(batch)
        return None
    with captured_logits(policy.chunks[-1].output_layer) as captured:
        policy.step.old_logprobs(batch)
    if policy.groups.tp.rank() != 0:
        return None
    return captured[0][: len(tokens) - 1].numpy()


def save_by_megatron(config: Config, out: str, *, steps: int) -> dict[str, Any] | None:
    """Trains for `steps` optimizer steps on random gradients, saves model and optimizer by
    megatron-core, and returns the gathered HF tensors of the first rank.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    # megatron-core starts a new interpreter on every rank to hold this queue, which costs more than
    # all else here. This process alone puts results in and takes them out.
    filesystem_async._results_queue = queue.Queue()

    policy = new_policy(config, config.model.path)
    for step in range(steps):
        torch.manual_seed(step)  # the same on all ranks: replicas must not drift apart
        for chunk in policy.ddp:
            chunk.zero_grad_buffer()
            for parameter in chunk.parameters():
                parameter.main_grad.copy_(torch.randn(parameter.shape) * 0.01)
        done, _, _ = policy.optimizer.step()
        assert done

    policy.gather_parameters()  # the next forward pass would, under overlap_param_gather
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


def load_by_megatron_lm(path: str, checkpoint: str, ckpt_format: str) -> dict[str, Any]:
    """Loads by Megatron-LM's own load_checkpoint, as its pretrain scripts call it,
    and returns the HF tensors that the model then holds.

    Of its arguments only the sizes that it demands are given; the rest come from the checkpoint,
    by --use-checkpoint-args.
    """
    import sys
    import typing

    if not hasattr(typing, "override"):  # its files ask for Python 3.12, for this decorator alone
        typing.override = lambda function: function  # type: ignore[attr-defined]
    from megatron.training import checkpointing, global_vars
    from megatron.training.arguments import parse_args

    config = Config(model=ModelConfig(path=path, dtype="fp32", layers="local"))
    policy = new_policy(config, config.model.path)
    sizes = policy.architecture
    given = {
        "--num-layers": sizes.num_layers,
        "--hidden-size": sizes.hidden_size,
        "--seq-length": 64,
        "--num-attention-heads": sizes.num_heads,
        "--max-position-embeddings": sizes.max_positions,
        "--micro-batch-size": 1,
        "--load": checkpoint,
        "--ckpt-format": ckpt_format,
    }
    flags = ["--finetune", "--no-load-optim", "--no-load-rng", "--use-checkpoint-args"]
    words = [str(word) for option in given.items() for word in option]
    with mock.patch.object(sys, "argv", ["pretrain_gpt.py", *words, *flags]):
        args = parse_args()
    args.rank = 0
    args.world_size = 1
    args.padded_vocab_size = sizes.padded_vocab(1)
    args.tensor_model_parallel_size = 1
    args.pipeline_model_parallel_size = 1
    args.virtual_pipeline_model_parallel_size = None
    global_vars.set_args(args)
    try:
        checkpointing.load_args_from_checkpoint(args)
        assert (args.num_query_groups, args.ffn_hidden_size) == (sizes.num_kv_heads, sizes.ffn_size)
        assert args.add_qkv_bias and args.swiglu and args.untie_embeddings_and_output_weights
        checkpointing.load_checkpoint(policy.chunks, None, None, strict=True)
    finally:
        global_vars.unset_global_variables()
    return {name: tensor.clone() for name, tensor in policy.stream()}
