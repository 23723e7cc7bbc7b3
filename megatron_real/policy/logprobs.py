"""Log-probs of given tokens under a vocabulary sharded over tensor-parallel ranks.

Shapes: T tokens on this rank (all of its context-parallel shard), K of them with a target, V vocabulary columns of this
rank's shard, C columns or rows of one chunk, H hidden size.

Two functions, one result: `vocab_parallel_logprobs` starts from logits, `linear_logprobs` from hidden states and the
output weight, so that logits never exist beyond one chunk. Both compute in fp32 (fp64 for fp64 inputs), communicate
once per call whatever the chunking, skip tokens without a target, and return log-probs that are complete on every
tensor-parallel rank: sums over tokens need no reduction over TP.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NO_TARGET = -1
"""Target of a token whose log-prob is not wanted: its log-prob is 0 and it gets no gradient and costs no work."""


def vocab_parallel_logprobs(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int = 1024,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(logits / temperature)[target], differentiable with respect to the logits.

    Args:
        logits_TV: [T, V] float, this rank's columns of the logits; column v of rank r is token r * V + v. Kept for
            backward, never written to.
        target_T: [T] int64 token ids of the whole vocabulary, or NO_TARGET.
        tp_group: ranks that share the vocabulary; None when it is not sharded.
        temperature: sampling temperature, > 0.
        vocab_size: tokens of the real vocabulary; columns from there on are padding and have probability 0. None: all.
        chunk_size: tokens that are held in fp32 at a time.
        return_entropy: also return the entropy of the distribution (nats, no gradient).

    Returns:
        [T] fp32 (fp64 for fp64 logits) log-probs in nats, equal on every rank of `tp_group`; with `return_entropy` a
        pair of log-probs and entropies. Tokens without a target have 0.

    Raises:
        ValueError: shapes, temperature, chunk size or targets are out of range.
    """
    _check(logits_TV, target_T, logits_TV.shape[1], tp_group, temperature, vocab_size, chunk_size)
    logprob_T, entropy_T = _LogprobsFromLogits.apply(
        logits_TV, target_T, _Shard.of(logits_TV.shape[1], tp_group, vocab_size), temperature, chunk_size, return_entropy
    )
    return (logprob_T, entropy_T) if return_entropy else logprob_T


def linear_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int = 8192,
    sequence_parallel: bool = False,
) -> Tensor:
    """log softmax(hidden @ weight.T / temperature)[target] without ever holding the logits.

    Chunks run over vocabulary columns: each chunk's weight gradient is one matrix product over all tokens, written
    once in its final precision, and only the hidden gradient is accumulated over chunks, in fp32. Backward computes
    the logits of each chunk anew.

    This function reduces the hidden gradient over `tp_group` itself (an all-reduce, or a reduce-scatter under sequence
    parallelism): its input must be the plain replicated, or sequence-sharded, output of the last layer, with no
    further gather or copy region in between.

    Args:
        hidden_TH: [T, H] float, the same on every rank of `tp_group`; under `sequence_parallel` [T / TP, H], this
            rank's tokens.
        weight_VH: [V, H] float, this rank's rows of the output weight.
        target_T: [T] int64 token ids of the whole vocabulary, or NO_TARGET. Always of all T tokens.
        tp_group, temperature, vocab_size: as in `vocab_parallel_logprobs`.
        chunk_size: vocabulary columns that are held at a time: T * chunk_size logits.
        sequence_parallel: the hidden states are sharded over `tp_group` along tokens.

    Returns:
        [T] fp32 (fp64 for fp64 inputs) log-probs in nats, equal on every rank of `tp_group`.

    Raises:
        ValueError: shapes, temperature, chunk size or targets are out of range.
    """
    world = dist.get_world_size(tp_group) if sequence_parallel and tp_group is not None else 1
    if hidden_TH.shape[0] * world != target_T.shape[0]:
        raise ValueError(
            f"hidden has {hidden_TH.shape[0]} tokens on each of {world} ranks, but there are {target_T.shape[0]} targets"
        )
    _check(weight_VH, target_T, weight_VH.shape[0], tp_group, temperature, vocab_size, chunk_size, tokens=False)
    shard = _Shard.of(weight_VH.shape[0], tp_group, vocab_size)
    logprob_T: Tensor = _LogprobsFromHidden.apply(
        hidden_TH, weight_VH, target_T, shard, temperature, chunk_size, sequence_parallel and world > 1
    )
    return logprob_T


class _Shard:
    """This rank's part of the vocabulary: columns [first, first + valid) are real tokens, the rest is padding."""

    def __init__(self, first: int, valid: int, group: dist.ProcessGroup | None) -> None:
        self.first, self.valid, self.group = first, valid, group

    @classmethod
    def of(cls, columns: int, group: dist.ProcessGroup | None, vocab_size: int | None) -> _Shard:
        rank = dist.get_rank(group) if group is not None else 0
        world = dist.get_world_size(group) if group is not None else 1
        first = rank * columns
        valid = min(max((vocab_size or world * columns) - first, 0), columns)
        return cls(first, valid, group if world > 1 else None)

    def combine(self, parts_SK: Tensor) -> tuple[Tensor, ...]:
        """Makes the statistics of all shards out of each shard's log-sum-exp, target logit (0 where another rank owns
        the target) and optionally mean logit: one all-gather."""
        if self.group is None:
            return tuple(parts_SK)
        parts_RSK = parts_SK.new_empty(dist.get_world_size(self.group), *parts_SK.shape)
        dist.all_gather_into_tensor(parts_RSK.view(-1, parts_SK.shape[1]), parts_SK.contiguous(), group=self.group)
        lse_K = parts_RSK[:, 0].logsumexp(0)
        means = [(torch.exp(parts_RSK[:, 0] - lse_K) * part_RK).sum(0) for part_RK in parts_RSK.unbind(1)[2:]]
        return lse_K, parts_RSK[:, 1].sum(0), *means

    def pick(self, logits_KC: Tensor, target_K: Tensor, start: int) -> Tensor:
        """[K] the target's logit where it lies in the columns [start, start + C) of this shard, else 0."""
        column_K = target_K - (self.first + start)
        inside_K = (column_K >= 0) & (column_K < logits_KC.shape[1])
        picked_K = logits_KC.gather(1, column_K.clamp(0, logits_KC.shape[1] - 1).unsqueeze(1)).squeeze(1)
        return torch.where(inside_K, picked_K, 0.0)

    def subtract_softmax_(self, logits_KC: Tensor, lse_K: Tensor, target_K: Tensor, start: int, scale_K: Tensor) -> Tensor:
        """Overwrites logits by d(sum_k g_k logprob_k) / d(unscaled logits) = g_k / temperature * (onehot - softmax)."""
        grad_KC = logits_KC.sub_(lse_K.unsqueeze(1)).exp_().mul_(-scale_K.unsqueeze(1))
        column_K = target_K - (self.first + start)
        inside_K = (column_K >= 0) & (column_K < grad_KC.shape[1])
        column_K = column_K.clamp(0, grad_KC.shape[1] - 1).unsqueeze(1)
        return grad_KC.scatter_add_(1, column_K, torch.where(inside_K, scale_K, 0.0).unsqueeze(1))


class _LogprobsFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, target_T: Tensor, shard: _Shard, temperature: float, chunk: int, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        kept_K = (target_T >= 0).nonzero().squeeze(1)
        parts_SK = logits_TV.new_zeros(3 if entropy else 2, kept_K.numel(), dtype=_accumulator(logits_TV))
        for rows in _chunks(kept_K.numel(), chunk):
            logits_CV = _scaled(logits_TV[kept_K[rows], : shard.valid], temperature)
            parts_SK[0, rows] = lse_C = _logsumexp(logits_CV)
            if shard.valid:
                parts_SK[1, rows] = shard.pick(logits_CV, target_T[kept_K[rows]], 0)
                if entropy:
                    parts_SK[2, rows] = (torch.exp(logits_CV - lse_C.unsqueeze(1)) * logits_CV).sum(1)
        lse_K, logit_K, *mean_K = shard.combine(parts_SK)
        ctx.save_for_backward(logits_TV, target_T, kept_K, lse_K)
        ctx.shard, ctx.temperature, ctx.chunk = shard, temperature, chunk
        entropy_K = lse_K - mean_K[0] if entropy else lse_K.new_zeros(0)
        entropy_T = _spread(entropy_K, kept_K, target_T.numel()) if entropy else entropy_K
        ctx.mark_non_differentiable(entropy_T)
        return _spread(logit_K - lse_K, kept_K, target_T.numel()), entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, target_T, kept_K, lse_K = ctx.saved_tensors
        grad_TV = torch.zeros_like(logits_TV)
        for rows in _chunks(kept_K.numel(), ctx.chunk):
            kept_C = kept_K[rows]
            logits_CV = _scaled(logits_TV[kept_C, : ctx.shard.valid], ctx.temperature)
            if ctx.shard.valid:
                scale_C = grad_T[kept_C].to(lse_K.dtype) / ctx.temperature
                grad_CV = ctx.shard.subtract_softmax_(logits_CV, lse_K[rows], target_T[kept_C], 0, scale_C)
                grad_TV[kept_C, : ctx.shard.valid] = grad_CV.to(grad_TV.dtype)
        return grad_TV, None, None, None, None, None


class _LogprobsFromHidden(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        target_T: Tensor,
        shard: _Shard,
        temperature: float,
        chunk: int,
        sequence_parallel: bool,
    ) -> Tensor:
        kept_K = (target_T >= 0).nonzero().squeeze(1)
        target_K = target_T[kept_K]
        hidden_KH = _gathered(hidden_TH, shard.group, sequence_parallel)[kept_K]
        parts_SK = hidden_TH.new_zeros(2, kept_K.numel(), dtype=_accumulator(hidden_TH))
        parts_SK[0] = -torch.inf
        for columns in _chunks(shard.valid, chunk):
            logits_KC = _scaled(hidden_KH @ weight_VH[columns].t(), temperature)
            parts_SK[1] += shard.pick(logits_KC, target_K, columns.start)
            parts_SK[0] = torch.logaddexp(parts_SK[0], _logsumexp(logits_KC))
        lse_K, logit_K = shard.combine(parts_SK)
        ctx.save_for_backward(hidden_TH, weight_VH, target_K, kept_K, lse_K)
        ctx.shard, ctx.temperature, ctx.chunk, ctx.sequence_parallel = shard, temperature, chunk, sequence_parallel
        return _spread(logit_K - lse_K, kept_K, target_T.numel())

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, target_K, kept_K, lse_K = ctx.saved_tensors
        shard: _Shard = ctx.shard
        hidden_all_TH = _gathered(hidden_TH, shard.group, ctx.sequence_parallel)
        hidden_KH = hidden_all_TH[kept_K]
        scale_K = grad_T[kept_K].to(lse_K.dtype) / ctx.temperature
        grad_weight_VH = torch.zeros_like(weight_VH) if shard.valid < len(weight_VH) else torch.empty_like(weight_VH)
        grad_hidden_KH = torch.zeros_like(hidden_KH, dtype=lse_K.dtype)
        for columns in _chunks(shard.valid, ctx.chunk):
            logits_KC = _scaled(hidden_KH @ weight_VH[columns].t(), ctx.temperature)
            grad_KC = shard.subtract_softmax_(logits_KC, lse_K, target_K, columns.start, scale_K).to(weight_VH.dtype)
            grad_hidden_KH += grad_KC @ weight_VH[columns]
            torch.mm(grad_KC.t(), hidden_KH, out=grad_weight_VH[columns])
        grad_hidden_TH = grad_hidden_KH.new_zeros(hidden_all_TH.shape).index_copy_(0, kept_K, grad_hidden_KH)
        grad_hidden_TH = _reduced(grad_hidden_TH, shard.group, ctx.sequence_parallel).to(hidden_TH.dtype)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None


def _gathered(hidden_TH: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """All tokens' hidden states: those of the other ranks too when tokens are sharded."""
    if not sequence_parallel:
        return hidden_TH
    all_TH = hidden_TH.new_empty(hidden_TH.shape[0] * dist.get_world_size(group), hidden_TH.shape[1])
    dist.all_gather_into_tensor(all_TH, hidden_TH.contiguous(), group=group)
    return all_TH


def _reduced(grad_TH: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> Tensor:
    """Sum of the ranks' partial gradients (each saw its own vocabulary columns), in the layout of the hidden states."""
    if group is None:
        return grad_TH
    if not sequence_parallel:
        dist.all_reduce(grad_TH, group=group)
        return grad_TH
    own_TH = grad_TH.new_empty(grad_TH.shape[0] // dist.get_world_size(group), grad_TH.shape[1])
    dist.reduce_scatter_tensor(own_TH, grad_TH, group=group)
    return own_TH


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Logits in the accumulation dtype, divided by the temperature; may reuse the (temporary) input's memory."""
    logits = logits.to(_accumulator(logits))
    return logits if temperature == 1.0 else logits.div_(temperature)


def _logsumexp(logits_KC: Tensor) -> Tensor:
    """[K] log-sum-exp over columns; -inf where this rank has none (its shard is all padding)."""
    return logits_KC.logsumexp(1) if logits_KC.shape[1] else logits_KC.new_full((logits_KC.shape[0],), -torch.inf)


def _spread(values_K: Tensor, kept_K: Tensor, num_tokens: int) -> Tensor:
    """[T] the values at their tokens, 0 elsewhere."""
    return values_K.new_zeros(num_tokens).index_copy_(0, kept_K, values_K)


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _check(
    matrix: Tensor,
    target_T: Tensor,
    columns: int,
    tp_group: dist.ProcessGroup | None,
    temperature: float,
    vocab_size: int | None,
    chunk_size: int,
    tokens: bool = True,
) -> None:
    if matrix.dim() != 2 or target_T.dim() != 1 or (tokens and matrix.shape[0] != target_T.shape[0]):
        raise ValueError(f"expected [T, V] and [T], got {tuple(matrix.shape)} and {tuple(target_T.shape)}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")
    total = columns * (dist.get_world_size(tp_group) if tp_group is not None else 1)
    if vocab_size is not None and not 0 < vocab_size <= total:
        raise ValueError(f"vocab_size is {vocab_size}; the shards hold {total} columns together")
    # Without a device synchronisation only a CPU tensor can be looked at.
    if target_T.device.type == "cpu" and target_T.numel() and int(target_T.max()) >= (vocab_size or total):
        raise ValueError(f"target {int(target_T.max())} is outside the vocabulary of {vocab_size or total}")
