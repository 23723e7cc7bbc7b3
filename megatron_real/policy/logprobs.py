"""Log-probs of given tokens under a vocabulary sharded over tensor-parallel ranks.

Shapes: T tokens on this rank (all of its context-parallel shard), K of them with a target, V
vocabulary columns of this rank's shard, C columns or rows of one chunk, H hidden size, S statistics
of a token's distribution.

Two functions, one result: `vocab_parallel_logprobs` starts from logits, `linear_logprobs` from
hidden states and the output weight, so that logits never exist beyond one chunk. Both compute in
fp32 (fp64 for fp64 inputs), communicate once per call whatever the chunking, skip tokens without a
target, and return log-probs that are complete on every tensor-parallel rank: sums over tokens need
no reduction over TP. Both can return the entropy of each token's distribution beside its log-prob,
with its exact gradient.

Speed is memory traffic: each chunk works in two buffers that are allocated once, the logits in
their own dtype and one in the accumulation dtype, and every operation on them fuses what it can
(widening, temperature and shift are one). On a GPU with Triton, `linear_logprobs` without entropies
needs one buffer and passes over it once forward and once backward (logit_kernels.py). Torch's
operators here are the reference, and what runs everywhere else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_real.buffers import LOGITS_CHUNK_BYTES
from megatron_real.policy.products import add_product, product_into

NO_TARGET = -1
"""Target of a token whose log-prob is not wanted: its log-prob is 0, it gets no gradient and costs
no work."""


@overload
def vocab_parallel_logprobs(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    return_entropy: Literal[False] = False,
    kept_K: Tensor | None = None,
) -> Tensor: ...


@overload
def vocab_parallel_logprobs(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    return_entropy: Literal[True],
    kept_K: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def vocab_parallel_logprobs(
    logits_TV: Tensor,
    target_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    return_entropy: bool = False,
    kept_K: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns log softmax(logits / temperature)[target], differentiable in the logits.

    Args:
        logits_TV: [T, V] float, this rank's columns of the logits; column v of rank r is token
            r * V + v. Kept for backward, never written to.
        target_T: [T] int64 token ids of the whole vocabulary, or NO_TARGET.
        tp_group: ranks that share the vocabulary; None when it is not sharded.
        temperature: sampling temperature, > 0.
        vocab_size: tokens of the real vocabulary; columns from there on are padding and have
            probability 0. None: all.
        chunk_size: tokens that are held in fp32 at a time; None: 16 MiB of them on a CPU, 256 MiB
            on a GPU.
        return_entropy: also return the entropy of the distribution (nats), differentiable too.
        kept_K: [K] int64 the positions with a target, where they are known already: to look for
            them, the host waits for the device.

    Returns:
        [T] fp32 (fp64 for fp64 logits) log-probs in nats, equal on every rank of `tp_group`; with
        `return_entropy` a pair of log-probs and entropies. Tokens without a target have 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a temperature, chunk size or target out of
            range.
    """
    if logits_TV.dim() != 2 or target_T.dim() != 1 or len(logits_TV) != len(target_T):
        raise ValueError(
            f"logits_TV must be [T, V] and target_T [T], got {list(logits_TV.shape)} and "
            f"{list(target_T.shape)}"
        )
    _check(logits_TV, target_T, logits_TV.shape[1], tp_group, temperature, vocab_size, chunk_size)
    if kept_K is None:
        kept_K = _positions_with_target(target_T)
    logprob_T, entropy_T = _LogprobsFromLogits.apply(
        logits_TV,
        target_T,
        kept_K,
        _Shard.of(logits_TV.shape[1], tp_group, vocab_size),
        temperature,
        chunk_size,
        return_entropy,
    )
    if return_entropy:
        return logprob_T, entropy_T
    return logprob_T


@overload
def linear_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    return_entropy: Literal[False] = False,
    kept_K: Tensor | None = None,
    fp32_logits: bool = False,
) -> Tensor: ...


@overload
def linear_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    return_entropy: Literal[True],
    kept_K: Tensor | None = None,
    fp32_logits: bool = False,
) -> tuple[Tensor, Tensor]: ...


def linear_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    target_T: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_size: int | None = None,
    sequence_parallel: bool = False,
    return_entropy: bool = False,
    kept_K: Tensor | None = None,
    fp32_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns log softmax(hidden @ weight.T / temperature)[target] without holding the logits.

    Chunks run over vocabulary columns: each chunk's weight gradient is one matrix product over all
    tokens, written once in its final precision, and only the hidden gradient is accumulated over
    chunks, in fp32. Backward computes the logits of each chunk anew.

    This function reduces the hidden gradient over `tp_group` itself (an all-reduce, or a
    reduce-scatter under sequence parallelism): its input must be the plain replicated, or
    sequence-sharded, output of the last layer, with no further gather or copy region in between.

    Args:
        hidden_TH: [T, H] float, the same on every rank of `tp_group`; under `sequence_parallel`
            [T / TP, H], this rank's tokens.
        weight_VH: [V, H] float, this rank's rows of the output weight.
        target_T: [T] int64 token ids of the whole vocabulary, or NO_TARGET. Always of all T tokens.
        tp_group, temperature, vocab_size: as in `vocab_parallel_logprobs`.
        chunk_size: vocabulary columns that are held at a time, T * chunk_size logits; None: as many
            as make 16 MiB in fp32 on a CPU, 256 MiB on a GPU.
        sequence_parallel: the hidden states are sharded over `tp_group` along tokens.
        return_entropy: also return the entropy of the distribution (nats), differentiable too; its
            backward takes two more buffers of a chunk.
        kept_K: as in `vocab_parallel_logprobs`.
        fp32_logits: keep the logits of bf16 operands as the product accumulates them instead of
            rounding them to bf16. Their gradient is rounded to bf16 either way, before its two
            products.

    Returns:
        [T] fp32 (fp64 for fp64 inputs) log-probs in nats, equal on every rank of `tp_group`; with
        `return_entropy` a pair of log-probs and entropies. Tokens without a target have 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a temperature, chunk size or target out of
            range.
    """
    if hidden_TH.dim() != 2 or weight_VH.dim() != 2 or target_T.dim() != 1:
        raise ValueError(
            "hidden_TH must be [T, H], weight_VH [V, H] and target_T [T], got "
            f"{list(hidden_TH.shape)}, {list(weight_VH.shape)} and {list(target_T.shape)}"
        )
    if hidden_TH.shape[1] != weight_VH.shape[1] or hidden_TH.dtype != weight_VH.dtype:
        raise ValueError(
            "hidden_TH and weight_VH must have one H and one dtype, got "
            f"{list(hidden_TH.shape)} {hidden_TH.dtype} and {list(weight_VH.shape)} "
            f"{weight_VH.dtype}"
        )
    world = 1
    if sequence_parallel and tp_group is not None:
        world = dist.get_world_size(tp_group)
    if hidden_TH.shape[0] * world != target_T.shape[0]:
        raise ValueError(
            f"hidden has {len(hidden_TH)} tokens on each of {world} ranks, "
            f"but there are {len(target_T)} targets"
        )
    _check(weight_VH, target_T, weight_VH.shape[0], tp_group, temperature, vocab_size, chunk_size)

    if kept_K is None:
        kept_K = _positions_with_target(target_T)
    logprob_T, entropy_T = _LogprobsFromHidden.apply(
        hidden_TH,
        weight_VH,
        target_T,
        kept_K,
        _Shard.of(weight_VH.shape[0], tp_group, vocab_size),
        temperature,
        chunk_size,
        sequence_parallel and world > 1,
        return_entropy,
        fp32_logits,
    )
    if return_entropy:
        return logprob_T, entropy_T
    return logprob_T


@dataclass(frozen=True)
class _Statistics:
    """What of a token's distribution over the whole vocabulary its gradient needs."""

    lse_K: Tensor
    """[K] log-sum-exp of logits / temperature."""
    entropy_K: Tensor
    """[K] entropy, nats; empty where it was not asked for."""

    def at(self, rows: slice) -> _Statistics:
        """Returns the statistics of some of the tokens."""
        return _Statistics(self.lse_K[rows], self.entropy_K[rows])


class _Shard:
    """This rank's part of the vocabulary.

    Columns [first, first + valid) are real tokens, the rest is padding.
    """

    def __init__(self, first: int, valid: int, group: dist.ProcessGroup | None) -> None:
        self.first = first
        self.valid = valid
        self.group = group

    @classmethod
    def of(cls, columns: int, group: dist.ProcessGroup | None, vocab_size: int | None) -> _Shard:
        """Returns the shard of `columns` columns that this rank of `group` holds."""
        rank = 0
        world = 1
        if group is not None:
            rank = dist.get_rank(group)
            world = dist.get_world_size(group)

        # Every shard has the same number of columns; padding is at the end of the last ones.
        first = rank * columns
        # A shard may lie wholly in the padding, and then has no real token.
        valid = min(max((vocab_size or world * columns) - first, 0), columns)
        # Without a group where one rank has all: nothing is communicated then.
        return cls(first, valid, group if world > 1 else None)

    def combine(self, parts_SK: Tensor) -> tuple[Tensor, ...]:
        """Makes the statistics of the whole vocabulary out of each shard's, by one all-gather.

        Args:
            parts_SK: [2 or 3, K] of this shard: log-sum-exp, target logit (0 where another rank
                owns the target), and optionally the mean logit.

        Returns:
            The same statistics over the whole vocabulary, [K] each.
        """
        if self.group is None:
            return tuple(parts_SK)

        world = dist.get_world_size(self.group)
        parts_RSK = parts_SK.new_empty(world, *parts_SK.shape)
        dist.all_gather_into_tensor(
            parts_RSK.flatten(0, 1), parts_SK.contiguous(), group=self.group
        )

        lse_RK = parts_RSK[:, 0]
        # A shard that is all padding sent -inf, and adds nothing.
        lse_K = lse_RK.logsumexp(0)
        logit_K = parts_RSK[:, 1].sum(0)
        if len(parts_SK) == 2:
            return lse_K, logit_K

        # Each shard's mean counts by the shard's probability.
        mean_K = (torch.exp(lse_RK - lse_K) * parts_RSK[:, 2]).sum(0)
        return lse_K, logit_K, mean_K

    def pick(self, logits_KC: Tensor, target_K: Tensor, start: int) -> Tensor:
        """Returns [K] the target's logit, or 0 where it is not in these columns of the shard.

        Args:
            logits_KC: the columns [start, start + C) of the shard.
            target_K: tokens of the whole vocabulary.
            start: the first of the columns.
        """
        column_K, inside_K = self._locate(target_K, start, logits_KC.shape[1])
        return torch.where(inside_K, logits_KC.gather(1, column_K.unsqueeze(1)).squeeze(1), 0.0)

    def softmax_minus_onehot(
        self,
        logits_KC: Tensor,
        lse_K: Tensor,
        target_K: Tensor,
        start: int,
        temperature: float,
        out_KC: Tensor,
    ) -> Tensor:
        """Writes the gradient of -logprob with respect to logits / temperature to `out_KC`.

        `out_KC` may be the logits.
        """
        column_K, inside_K = self._locate(target_K, start, logits_KC.shape[1])
        torch.add(-lse_K.unsqueeze(1), logits_KC, alpha=1 / temperature, out=out_KC).exp_()
        # Where the target is not in these columns, 0 is taken from the column that it
        # was clamped to.
        return out_KC.scatter_add_(
            1, column_K.unsqueeze(1), -inside_K.to(out_KC.dtype).unsqueeze(1)
        )

    def with_entropy_gradient(
        self,
        logits_KC: Tensor,
        statistics: _Statistics,
        target_K: Tensor,
        start: int,
        temperature: float,
        grad_logprob_K: Tensor,
        grad_entropy_K: Tensor,
    ) -> Tensor:
        """Returns [K, C] the gradient of grad_logprob * logprob + grad_entropy * entropy in logits.

        With z = logits / temperature and log p = z - lse, d logprob / dz = onehot - p and
        d entropy / dz = -p (log p + entropy).
        """
        logp_KC = torch.add(-statistics.lse_K.unsqueeze(1), logits_KC, alpha=1 / temperature)
        p_KC = logp_KC.exp()

        # In place from here: -p * (grad_entropy * (log p + entropy) + grad_logprob), then onehot.
        factor_KC = logp_KC.add_(statistics.entropy_K.unsqueeze(1))
        factor_KC.mul_(-grad_entropy_K.unsqueeze(1)).sub_(grad_logprob_K.unsqueeze(1))
        grad_KC = factor_KC.mul_(p_KC)

        column_K, inside_K = self._locate(target_K, start, logits_KC.shape[1])
        onehot_K = inside_K.to(grad_KC.dtype) * grad_logprob_K
        grad_KC.scatter_add_(1, column_K.unsqueeze(1), onehot_K.unsqueeze(1))
        return grad_KC.div_(temperature)

    def _locate(self, target_K: Tensor, start: int, num_columns: int) -> tuple[Tensor, Tensor]:
        """Returns where the targets lie in the columns [start, start + num_columns) of the shard.

        Returns:
            [K] the target's column counted from `start` and clamped into the range, so that it can
            always index; and [K] bool, whether the target is really there.
        """
        column_K = target_K - (self.first + start)
        inside_K = (column_K >= 0) & (column_K < num_columns)
        return column_K.clamp(0, num_columns - 1), inside_K


class _LogprobsFromLogits(torch.autograd.Function):
    """The log-probs of logits that exist: chunks run over tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        target_T: Tensor,
        kept_K: Tensor,
        shard: _Shard,
        temperature: float,
        chunk: int | None,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        parts_SK = _no_statistics(logits_TV, kept_K, entropy)
        chunk = chunk or _chunk_size(shard.valid, parts_SK)

        wide_CV = parts_SK.new_empty(min(chunk, kept_K.numel()), shard.valid)
        # Size 0 gives no chunk: a shard that is all padding has no logit to reduce over.
        for part, rows in _row_chunks(kept_K, target_T.numel(), chunk if shard.valid else 0):
            logits_CV = logits_TV[rows, : shard.valid]
            lse_C = _logsumexp(logits_CV, temperature, wide_CV[: len(logits_CV)])
            parts_SK[0, part] = lse_C
            parts_SK[1, part] = shard.pick(logits_CV, target_T[rows], 0) / temperature
            if entropy:
                logprob_CV = torch.add(-lse_C.unsqueeze(1), logits_CV, alpha=1 / temperature)
                parts_SK[2, part] = lse_C + (logprob_CV.exp() * logprob_CV).sum(1)

        lse_K, logprob_T, entropy_K, entropy_T = _outputs(shard, parts_SK, kept_K, target_T)
        # The softmax is not kept: from the log-sum-exp, backward computes it again, chunk by chunk.
        ctx.save_for_backward(logits_TV, target_T, kept_K, lse_K, entropy_K)
        ctx.shard = shard
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.entropy = entropy
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, grad_entropy_T: Tensor) -> tuple[Tensor | None, ...]:
        logits_TV, target_T, kept_K, lse_K, entropy_K = ctx.saved_tensors
        shard: _Shard = ctx.shard
        temperature: float = ctx.temperature
        statistics = _Statistics(lse_K, entropy_K)

        # Zeros only where something is left out: columns of padding or tokens without a target.
        if kept_K.numel() == target_T.numel() and shard.valid == logits_TV.shape[1]:
            grad_TV = torch.empty_like(logits_TV)
        else:
            grad_TV = torch.zeros_like(logits_TV)

        wide_CV = lse_K.new_empty(min(ctx.chunk, kept_K.numel()), shard.valid)
        for part, rows in _row_chunks(kept_K, target_T.numel(), ctx.chunk if shard.valid else 0):
            logits_CV = logits_TV[rows, : shard.valid]
            grad_logprob_C = grad_T[rows].to(lse_K.dtype)
            if ctx.entropy:
                grad_CV = shard.with_entropy_gradient(
                    logits_CV,
                    statistics.at(part),
                    target_T[rows],
                    0,
                    temperature,
                    grad_logprob_C,
                    grad_entropy_T[rows].to(lse_K.dtype),
                )
                grad_TV[rows, : shard.valid] = grad_CV.to(grad_TV.dtype)
                continue

            grad_CV = shard.softmax_minus_onehot(
                logits_CV, lse_K[part], target_T[rows], 0, temperature, wide_CV[: len(logits_CV)]
            )
            scale_C1 = -(grad_logprob_C / temperature).unsqueeze(1)
            if isinstance(rows, slice):
                # Rows in a row: the product is rounded and written at once.
                torch.mul(grad_CV, scale_C1, out=grad_TV[rows, : shard.valid])
            else:
                grad_TV[rows, : shard.valid] = grad_CV.mul_(scale_C1).to(grad_TV.dtype)
        # One for each argument of `forward`: the logits alone have a gradient.
        return grad_TV, None, None, None, None, None, None


class _LogprobsFromHidden(torch.autograd.Function):
    """The log-probs of hidden states: chunks run over vocabulary columns."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        target_T: Tensor,
        kept_K: Tensor,
        shard: _Shard,
        temperature: float,
        chunk: int | None,
        sequence_parallel: bool,
        entropy: bool,
        fp32_logits: bool,
    ) -> tuple[Tensor, Tensor]:
        target_K = target_T[kept_K]
        hidden_KH = _rows(_gathered(hidden_TH, shard.group, sequence_parallel), kept_K)
        parts_SK = _no_statistics(hidden_TH, kept_K, entropy)

        chunk = chunk or _chunk_size(kept_K.numel(), parts_SK)
        logits_dtype = _accumulator(hidden_TH) if fp32_logits else hidden_TH.dtype
        # The kernels know no entropy.
        kernels = None if entropy else kernels_for(hidden_TH, logits_dtype)

        for columns, logits_KC, wide_KC in _logit_chunks(
            hidden_KH, weight_VH, shard.valid, chunk, logits_dtype, kernels is None
        ):
            if kernels is not None:
                lse_K, picked_K = parts_SK.unbind()
                first = shard.first + columns.start
                kernels.fold_chunk(logits_KC, target_K, lse_K, picked_K, first, temperature)
                continue

            # The log-sum-exp comes last: it overwrites the logits where they are the wide buffer.
            # A target lies in one chunk only: all others add 0.
            parts_SK[1] += shard.pick(logits_KC, target_K, columns.start) / temperature
            if entropy:
                _fold_mean(parts_SK, logits_KC, temperature)
            parts_SK[0] = torch.logaddexp(parts_SK[0], _logsumexp(logits_KC, temperature, wide_KC))

        lse_K, logprob_T, entropy_K, entropy_T = _outputs(shard, parts_SK, kept_K, target_T)
        # Hidden states as they came, not gathered: the other ranks' tokens are gathered again.
        ctx.save_for_backward(hidden_TH, weight_VH, target_K, kept_K, lse_K, entropy_K)
        ctx.shard = shard
        ctx.temperature = temperature
        ctx.chunk = chunk
        ctx.sequence_parallel = sequence_parallel
        ctx.entropy = entropy
        ctx.logits_dtype = logits_dtype
        # Backward takes the same path, whatever the environment says by then.
        ctx.kernels = kernels
        return logprob_T, entropy_T

    @staticmethod
    def backward(ctx: Any, grad_T: Tensor, grad_entropy_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, target_K, kept_K, lse_K, entropy_K = ctx.saved_tensors
        shard: _Shard = ctx.shard
        temperature: float = ctx.temperature
        kernels = ctx.kernels
        hidden_all_TH = _gathered(hidden_TH, shard.group, ctx.sequence_parallel)
        hidden_KH = _rows(hidden_all_TH, kept_K)

        # A token's factor multiplies its row of the logits' gradient. H is far narrower than V: it
        # goes there instead. An entropy's gradient is no such product: it is whole in the logits'
        # gradient, and the factor 1.
        factor_K1 = (grad_T[kept_K].to(lse_K.dtype) / -temperature).unsqueeze(1)
        if ctx.entropy:
            factor_K1 = torch.ones_like(factor_K1)
        scaled_hidden_KH = (hidden_KH * factor_K1).to(hidden_KH.dtype)

        grad_hidden_KH = torch.zeros_like(hidden_KH, dtype=lse_K.dtype)
        if shard.valid < len(weight_VH):
            # Rows of padding are never written below.
            grad_weight_VH = torch.zeros_like(weight_VH)
        else:
            grad_weight_VH = torch.empty_like(weight_VH)

        for columns, logits_KC, wide_KC in _logit_chunks(
            hidden_KH, weight_VH, shard.valid, ctx.chunk, ctx.logits_dtype, kernels is None
        ):
            # The gradient has the operands' dtype: it takes the logits' place unless these are kept
            # in fp32.
            grad_KC = logits_KC
            if logits_KC.dtype != hidden_KH.dtype:
                grad_KC = torch.empty_like(logits_KC, dtype=hidden_KH.dtype)

            if kernels is not None:
                first = shard.first + columns.start
                kernels.write_gradient(logits_KC, target_K, lse_K, grad_KC, first, temperature)
            elif ctx.entropy:
                wide_KC = shard.with_entropy_gradient(
                    logits_KC,
                    _Statistics(lse_K, entropy_K),
                    target_K,
                    columns.start,
                    temperature,
                    grad_T[kept_K].to(lse_K.dtype),
                    grad_entropy_T[kept_K].to(lse_K.dtype),
                )
                grad_KC.copy_(wide_KC)
            else:
                shard.softmax_minus_onehot(
                    logits_KC, lse_K, target_K, columns.start, temperature, wide_KC
                )
                grad_KC.copy_(wide_KC)

            add_product(grad_hidden_KH, grad_KC, weight_VH[columns])
            # Written, not added: no other chunk has these columns.
            torch.mm(grad_KC.t(), scaled_hidden_KH, out=grad_weight_VH[columns])

        # Each rank saw its own vocabulary columns: the ranks' gradients are summed, and each keeps
        # the tokens that it has.
        grad_hidden_TH = _spread(grad_hidden_KH.mul_(factor_K1), kept_K, len(hidden_all_TH))
        if shard.group is not None and ctx.sequence_parallel:
            own_TH = grad_hidden_TH.new_empty(hidden_TH.shape)
            dist.reduce_scatter_tensor(own_TH, grad_hidden_TH, group=shard.group)
            grad_hidden_TH = own_TH
        elif shard.group is not None:
            dist.all_reduce(grad_hidden_TH, group=shard.group)
        grad_hidden_TH = grad_hidden_TH.to(hidden_TH.dtype)
        return grad_hidden_TH, grad_weight_VH, None, None, None, None, None, None, None, None


def _no_statistics(like: Tensor, kept_K: Tensor, entropy: bool) -> Tensor:
    """Returns [2 or 3, K] the statistics of no column: a log-sum-exp of -inf, everything else 0.

    They stay so on a rank whose shard is all padding.
    """
    parts_SK = like.new_zeros(3 if entropy else 2, kept_K.numel(), dtype=_accumulator(like))
    parts_SK[0] = -torch.inf
    return parts_SK


def _outputs(
    shard: _Shard, parts_SK: Tensor, kept_K: Tensor, target_T: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns what both forward passes end with, from the shard's statistics.

    Returns:
        [K] log-sum-exp, [T] log-probs, [K] and [T] entropies; these are empty where `parts_SK`
        holds no mean logit.
    """
    num_tokens = target_T.numel()
    lse_K, logit_K, *mean_K = shard.combine(parts_SK)
    logprob_T = _spread(logit_K - lse_K, kept_K, num_tokens)
    if not mean_K:
        empty = lse_K.new_zeros(0)
        return lse_K, logprob_T, empty, empty
    entropy_K = lse_K - mean_K[0]
    return lse_K, logprob_T, entropy_K, _spread(entropy_K, kept_K, num_tokens)


def _logit_chunks(
    hidden_KH: Tensor,
    weight_VH: Tensor,
    num_columns: int,
    chunk: int,
    logits_dtype: torch.dtype,
    wide: bool,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields the logits chunk by chunk of vocabulary columns.

    Yields:
        Columns of the shard, their logits [K, C], and a buffer of the same shape in the
        accumulation dtype. The next chunk overwrites both; where the logits have that dtype, or
        without `wide`, they are one.
    """
    num_tokens = len(hidden_KH)
    logits_buffer = hidden_KH.new_empty(num_tokens * min(chunk, num_columns), dtype=logits_dtype)
    wide_buffer = logits_buffer
    if wide and logits_dtype != _accumulator(hidden_KH):
        wide_buffer = torch.empty_like(logits_buffer, dtype=_accumulator(hidden_KH))

    for columns in _chunks(num_columns, chunk):
        weight_CH = weight_VH[columns]
        # A view of the buffer's beginning, so that the last, narrower chunk is contiguous too.
        size = num_tokens * len(weight_CH)
        logits_KC = logits_buffer[:size].view(num_tokens, len(weight_CH))
        wide_KC = wide_buffer[:size].view(num_tokens, len(weight_CH))
        product_into(hidden_KH, weight_CH.t(), logits_KC)
        yield columns, logits_KC, wide_KC


def kernels_for(hidden_TH: Tensor, logits_dtype: torch.dtype) -> ModuleType | None:
    """Returns the module of Triton kernels where they run on these logits.

    Where it returns None, torch's operators compute the same. The kernels run on a GPU, and on a
    CPU under Triton's interpreter, for whoever asked for it by TRITON_INTERPRET.
    """
    if _only_torch:
        return None
    if hidden_TH.device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return None
    kernels = _kernels()
    if kernels is None or logits_dtype not in kernels.DTYPES:
        return None
    return kernels


@contextmanager
def without_kernels() -> Iterator[None]:
    """Makes `linear_logprobs` use torch's operators on every device.

    The kernels are compared with them and timed against them.
    """
    global _only_torch
    before = _only_torch
    _only_torch = True
    try:
        yield
    finally:
        _only_torch = before


_only_torch = False


@cache
def _kernels() -> ModuleType | None:
    try:
        from megatron_real.policy import logit_kernels
    except ImportError:
        # No Triton, or one of another age: torch's operators do the same.
        return None
    return logit_kernels


def _gathered(
    hidden_TH: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool
) -> Tensor:
    """Returns all tokens' hidden states: the other ranks' too where tokens are sharded."""
    if not sequence_parallel:
        return hidden_TH
    all_TH = hidden_TH.new_empty(
        hidden_TH.shape[0] * dist.get_world_size(group), hidden_TH.shape[1]
    )
    dist.all_gather_into_tensor(all_TH, hidden_TH.contiguous(), group=group)
    return all_TH


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _logsumexp(logits_KC: Tensor, temperature: float, buffer_KC: Tensor) -> Tensor:
    """Returns [K] the log-sum-exp of logits / temperature over at least one column.

    The buffer is overwritten; it may be the logits themselves.
    """
    # The maximum first, so that no exponential overflows.
    top_K = logits_KC.amax(1).to(buffer_KC.dtype) / temperature
    torch.add(-top_K.unsqueeze(1), logits_KC, alpha=1 / temperature, out=buffer_KC)
    return buffer_KC.exp_().sum(1).log_().add_(top_K)


def _fold_mean(parts_SK: Tensor, logits_KC: Tensor, temperature: float) -> None:
    """Brings parts_SK[2] up to one more chunk of columns.

    It is the mean of logits / temperature under their softmax; parts_SK[0] is the log-sum-exp of
    the columns before the chunk.
    """
    z_KC = logits_KC.to(parts_SK.dtype) / temperature
    chunk_lse_K = z_KC.logsumexp(1)
    chunk_mean_K = (torch.exp(z_KC - chunk_lse_K.unsqueeze(1)) * z_KC).sum(1)

    # Both means count by their share of the probability so far.
    lse_K = torch.logaddexp(parts_SK[0], chunk_lse_K)
    share_before_K = torch.exp(parts_SK[0] - lse_K)
    parts_SK[2] = parts_SK[2] * share_before_K + chunk_mean_K * torch.exp(chunk_lse_K - lse_K)


def _positions_with_target(target_T: Tensor) -> Tensor:
    # On a GPU the host waits for this: callers that know the positions pass them.
    return (target_T >= 0).nonzero().squeeze(1)


def _rows(x_TH: Tensor, kept_K: Tensor) -> Tensor:
    """Returns x_TH[kept_K], without a copy where all are kept."""
    if kept_K.numel() == len(x_TH):
        return x_TH
    return x_TH[kept_K]


def _spread(values_K: Tensor, kept_K: Tensor, num_tokens: int) -> Tensor:
    """Returns [T, ...] the values at their tokens, 0 elsewhere; without a copy if all are kept."""
    if kept_K.numel() == num_tokens:
        return values_K
    return values_K.new_zeros(num_tokens, *values_K.shape[1:]).index_copy_(0, kept_K, values_K)


def _chunk_size(other_size: int, like: Tensor) -> int:
    """Returns the rows (or columns) of a default chunk, at least 1.

    Each has `other_size` elements in the dtype and on the device of `like`.
    """
    num_bytes = LOGITS_CHUNK_BYTES["cuda" if like.device.type == "cuda" else "cpu"]
    return max(1, num_bytes // (max(other_size, 1) * like.element_size()))


def _chunks(total: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _row_chunks(
    kept_K: Tensor, num_tokens: int, size: int
) -> Iterator[tuple[slice, slice | Tensor]]:
    """Yields chunks of the kept tokens; none for size 0.

    Yields:
        Where they lie among the K, and among the T: a slice, and so no copy, where all are kept.
    """
    if not size:
        return
    all_kept = kept_K.numel() == num_tokens
    for part in _chunks(kept_K.numel(), size):
        yield part, part if all_kept else kept_K[part]


def _check(
    matrix: Tensor,
    target_T: Tensor,
    columns: int,
    tp_group: dist.ProcessGroup | None,
    temperature: float,
    vocab_size: int | None,
    chunk_size: int | None,
) -> None:
    """Refuses arguments that do not fit together; their dimensions fit already.

    Args:
        matrix: logits or output weight.
        columns: of the vocabulary on this rank.
        The others are the callers'.

    Raises:
        ValueError: always with what is wrong and what is expected.
    """
    if not matrix.is_floating_point():
        raise ValueError(f"logits, or the output weight, must be floats, got {matrix.dtype}")
    if target_T.dtype != torch.int64:
        raise ValueError(f"target_T must hold int64 token ids, got {target_T.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1")

    total = columns
    if tp_group is not None:
        total *= dist.get_world_size(tp_group)
    if vocab_size is not None and not 0 < vocab_size <= total:
        raise ValueError(f"vocab_size is {vocab_size}; the shards hold {total} columns together")

    # Only a CPU tensor can be looked at without waiting for the device.
    if target_T.device.type == "cpu" and target_T.numel():
        highest = int(target_T.max())
        if highest >= (vocab_size or total):
            raise ValueError(f"target {highest} is outside the vocabulary of {vocab_size or total}")
