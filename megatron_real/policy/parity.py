"""Is it really the same model? Our logits beside transformers', in fp32 on fixed tokens.

A round trip of weights proves nothing about the computation: a wrong rope or bias round-trips
perfectly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from megatron_real.config import ModelConfig, ParallelConfig
from megatron_real.parallel.cpu import device
from megatron_real.parallel.groups import join_world, set_up
from megatron_real.policy.logprobs import NO_TARGET
from megatron_real.policy.model import LogprobHead, build_model
from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.mapping import Weights
from megatron_real.weights.stream import load_weights


@dataclass(frozen=True)
class LogitParity:
    """Our logits against transformers'."""

    tokens: int
    """Positions compared."""
    max_abs_difference: float
    """Over all positions and the vocabulary."""
    largest_logit: float
    """Largest absolute logit of transformers', which scales the rounding errors."""
    equal_argmax: int
    """Positions with the same most likely token."""

    @property
    def same_model(self) -> bool:
        """Whether the logits are equal but for rounding.

        Rounding is below 2e-5 of the logits' size; a wrong rope is off by 0.006 at the least.
        """
        return self.max_abs_difference <= 2e-5 * max(1.0, self.largest_logit)


@contextmanager
def captured_logits(head: LogprobHead) -> Iterator[list[Tensor]]:
    """Collects the logits of each forward of `head` into the list that it yields.

    They are [T, V], gathered over TP and without the padding of the vocabulary.
    """
    collected: list[Tensor] = []

    def capture(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        # Tied embeddings hand their weight to each call; otherwise the head has its own.
        weight = kwargs.get("weight")
        if weight is None:
            weight = module.weight
        # The base class's forward: the head's own would return log-probs.
        logits, _ = ColumnParallelLinear.forward(
            module, args[0], weight, runtime_gather_output=True
        )
        collected.append(logits.detach().squeeze(1)[:, : module.vocab_size])

    handle = head.register_forward_hook(capture, with_kwargs=True)
    try:
        yield collected
    finally:
        handle.remove()


def compare_logits(
    hf: Path,
    weights: Weights,
    architecture: Architecture,
    *,
    num_tokens: int = 512,
    seed: int = 0,
) -> LogitParity:
    """Runs both models in this process, on random tokens, and compares their logits.

    Args:
        hf: directory that transformers loads, by its own config.json.
        weights: what our model loads, perhaps a Megatron checkpoint.
        architecture: what our model is, by the config.json of `weights`.
        num_tokens: length of the one sequence.
        seed: of the tokens.

    Raises:
        WeightsError: the vocabularies differ, or transformers cannot load `hf`.
    """
    theirs = Architecture.read(hf)
    if theirs.vocab_size != architecture.vocab_size:
        raise WeightsError(
            f"logits over {architecture.vocab_size} and {theirs.vocab_size} tokens "
            "cannot be compared"
        )

    length = min(num_tokens, architecture.max_positions, theirs.max_positions)
    # A generator of its own: the same tokens each time, whatever was drawn before.
    token_T = torch.randint(
        architecture.vocab_size, (length,), generator=torch.Generator().manual_seed(seed)
    )

    # One after the other: each model is gone from memory before the next one is loaded.
    theirs_TV = _transformers_logits(hf, token_T)
    ours_TV = _our_logits(architecture, weights, token_T)
    return LogitParity(
        tokens=length,
        max_abs_difference=float((ours_TV - theirs_TV).abs().max()),
        largest_logit=float(theirs_TV.abs().max()),
        equal_argmax=int((ours_TV.argmax(-1) == theirs_TV.argmax(-1)).sum()),
    )


def _our_logits(architecture: Architecture, weights: Weights, token_T: Tensor) -> Tensor:
    # A world of this process alone: megatron-core's modules ask for process groups even then.
    join_world(timeout_minutes=10)
    groups = set_up(ParallelConfig())
    (model,) = build_model(
        architecture,
        model=ModelConfig(dtype="fp32", layers="local"),
        parallel=ParallelConfig(),
        megatron={},
        temperature=1.0,
        groups=groups.megatron,
    )
    load_weights([model], weights, architecture, tp_rank=0, tp=1)

    token_T = token_T.to(device())
    bounds = torch.tensor([0, len(token_T)], dtype=torch.int32, device=device())
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=len(token_T),
        max_seqlen_kv=len(token_T),
    )

    # No log-prob is wanted, so the head itself computes nothing: the hook takes the logits.
    no_target_T = torch.full_like(token_T, NO_TARGET)
    kept_K = token_T.new_empty(0)
    with torch.inference_mode(), captured_logits(model.output_layer) as collected:
        model(token_T, no_target_T, kept_K, packed)
    return collected[0].cpu()


def _transformers_logits(hf: Path, token_T: Tensor) -> Tensor:
    # Imported here: transformers takes seconds to load.
    from megatron_real.weights.by_transformers import load_model

    model = load_model(hf, torch.float32)
    with torch.inference_mode():
        logits: Tensor = model(token_T[None]).logits[0]
    return logits
