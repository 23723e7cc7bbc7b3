"""Micro-batches as the model wants them: packed, shifted, padded and cut for this context-parallel rank.

Shapes: R sequences of the micro-batch, T tokens of this context-parallel rank. Each sequence is padded to a multiple
of 2 * CP, of which rank r holds chunks r and 2 * CP - 1 - r; a last dummy sequence pads T for sequence parallelism.
Padding has no target, so it has no log-prob and no gradient, and nothing before it attends to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_real.policy.logprobs import NO_TARGET
from megatron_real.records import Rollout


@dataclass(frozen=True)
class Alignment:
    """What the layout asks of sequence lengths."""

    cp: int
    """Context-parallel size."""
    cp_rank: int
    """This rank's place in it."""
    tp: int
    """Tensor-parallel size if sequence parallelism is on, else 1."""
    padded: bool
    """Pad each sequence to the longest of the micro-batch."""

    def length(self, rollout: Rollout) -> int:
        """Tokens that a rollout takes: the last response token predicts nothing and is left out."""
        return self.up(rollout.num_tokens - 1)

    def up(self, length: int) -> int:
        """`length` rounded up to what context parallelism can cut."""
        return length if self.cp == 1 else -(-length // (2 * self.cp)) * 2 * self.cp

    @property
    def total_multiple(self) -> int:
        """All tokens of a micro-batch together must be a multiple of this."""
        return math.lcm(1 if self.cp == 1 else 2 * self.cp, self.cp * self.tp)


@dataclass
class MicroBatch:
    """One micro-batch on one rank. The passes of a train step leave their results in it."""

    positions: tuple[int, ...]
    """[R] positions of its sequences in the minibatch's rollouts."""
    tokens_T: Tensor
    """[T] int64 input tokens."""
    target_T: Tensor
    """[T] int64 response token that each position predicts, or NO_TARGET."""
    index_T: Tensor
    """[T] int64 index of that token among the response tokens of all the minibatch's rollouts in order, or -1."""
    engine_logprob_T: Tensor
    """[T] fp32 the rollout engine's log-probs of the targets (nats), 0 elsewhere."""
    cu_seqlens: Tensor
    """[R + 1] int32 bounds of the sequences in this rank's tokens; the dummy sequence is not among them."""
    packed: PackedSeqParams
    """Bounds over all context-parallel ranks together, the dummy sequence included."""
    num_tokens_R: Tensor
    """[R] response tokens of each sequence over all context-parallel ranks."""
    num_used: int
    """Tokens of the sequences in `cu_seqlens`: those before the dummy sequence."""
    old_logprob_T: Tensor | None = None
    """[T] log-probs under the weights that generated the rollouts; None until computed (on the last stage)."""
    score_R: Tensor | None = None
    """[R] detached scores; None until computed (on the last stage)."""
    weight_R: Tensor | None = None
    """[R] dL / dscore; None where the train pass itself gathers the scores."""


def micro_batch(rollouts: Sequence[Rollout], positions: Sequence[int], alignment: Alignment) -> MicroBatch:
    """Builds the micro-batch of `rollouts[i] for i in positions` on this rank's device."""
    members = [rollouts[i] for i in positions]
    lengths = [alignment.length(r) for r in members]
    if alignment.padded and lengths:
        lengths = [max(lengths)] * len(lengths)
    fill = -sum(lengths) % alignment.total_multiple or (alignment.total_multiple if not lengths else 0)
    first_R = list(accumulate((len(r.completion.token_ids) for r in rollouts), initial=0))
    columns = [_columns(r, n, first_R[i]) for r, n, i in zip(members, lengths, positions, strict=True)]
    columns.append(_columns(None, fill, 0))
    tokens, targets, engine, index = (torch.cat([_own_part(c[i], alignment) for c in columns]) for i in range(4))
    bounds = torch.tensor([0, *lengths, *([fill] if fill else [])], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    device = torch.cuda.current_device()
    bounds, longest = bounds.to(device), max([*lengths, fill])
    return MicroBatch(
        positions=tuple(positions),
        tokens_T=tokens.to(device),
        target_T=targets.to(device),
        index_T=index.to(device),
        engine_logprob_T=engine.to(device),
        cu_seqlens=bounds[: len(members) + 1] // alignment.cp,
        packed=PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
        ),
        num_tokens_R=torch.tensor([len(r.completion.token_ids) for r in members], device=device),
        num_used=sum(lengths) // alignment.cp,
    )


def _columns(rollout: Rollout | None, length: int, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input tokens, targets, engine log-probs and indices, from `first`, of one whole sequence, padded to `length`."""
    tokens = torch.zeros(length, dtype=torch.int64)
    targets = torch.full((length,), NO_TARGET)
    engine = torch.zeros(length)
    index = torch.full((length,), -1)
    if rollout is not None:
        prompt, response = rollout.prompt.token_ids, rollout.completion.token_ids
        inputs = (*prompt, *response)[:-1]
        predicting = slice(len(prompt) - 1, len(inputs))
        tokens[: len(inputs)] = torch.tensor(inputs)
        targets[predicting] = torch.tensor(response)
        engine[predicting] = torch.tensor(rollout.completion.logprobs)
        index[predicting] = torch.arange(first, first + len(response))
    return tokens, targets, engine, index


def _own_part(whole: Tensor, alignment: Alignment) -> Tensor:
    if alignment.cp == 1:
        return whole
    chunks = whole.chunk(2 * alignment.cp) if len(whole) else (whole,) * 2 * alignment.cp
    return torch.cat([chunks[alignment.cp_rank], chunks[2 * alignment.cp - 1 - alignment.cp_rank]])
