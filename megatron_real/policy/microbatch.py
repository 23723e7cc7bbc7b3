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


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on one rank. What is known on the host is laid out here once, not in every pass."""

    positions: tuple[int, ...]
    """[R] positions of its sequences in the minibatch's rollouts."""
    position_R: Tensor
    """[R] int64 the same, on the device."""
    tokens_T: Tensor
    """[T] int64 input tokens."""
    target_T: Tensor
    """[T] int64 trained token that each position predicts, or NO_TARGET."""
    index_T: Tensor
    """[T] int64 index of that token among the response tokens of all the minibatch's rollouts in order, or -1."""
    engine_logprob_T: Tensor
    """[T] fp32 the rollout engine's log-probs of the targets (nats), 0 elsewhere."""
    cu_seqlens: Tensor
    """[R + 1] int32 bounds of the sequences in this rank's tokens; the dummy sequence is not among them."""
    packed: PackedSeqParams
    """Bounds over all context-parallel ranks together, the dummy sequence included: on the device for
    TransformerEngine's kernels, on the host for the local layers, which would read them back in every layer."""
    num_tokens_R: Tensor
    """[R] trained tokens of each sequence over all context-parallel ranks."""
    num_used: int
    """Tokens of the sequences in `cu_seqlens`: those before the dummy sequence."""
    kept_K: Tensor
    """[K] int64 the positions in [0, T) that have a target."""
    rollout_K: Tensor
    """[K] int64 the rollout of each of them, as a position in the minibatch."""
    reference_logprob_T: Tensor | None
    """[T] log-probs of the targets under the reference (nats), 0 elsewhere; None where no rollout has them."""


def micro_batch(
    rollouts: Sequence[Rollout],
    positions: Sequence[int],
    alignment: Alignment,
    *,
    bounds_on_host: bool = True,
) -> MicroBatch:
    """Builds the micro-batch of `rollouts[i] for i in positions` on this rank's device, without waiting for it.

    Args:
        rollouts: [R] all of the minibatch; those in `positions` are whole, all of them with reference log-probs, or none.
        positions: those in this micro-batch; none of them for one that only keeps the schedule in step.
        alignment: what the layout asks of lengths.
        bounds_on_host: the layers read the sequences' bounds on the host (MicroBatch.packed).
    """
    members = [rollouts[i] for i in positions]
    lengths = [alignment.length(r) for r in members]
    if alignment.padded and lengths:
        lengths = [max(lengths)] * len(lengths)
    # Attention kernels exist that refuse a sequence of a single token: an empty micro-batch has two.
    smallest = math.lcm(alignment.total_multiple, 2)
    fill = -sum(lengths) % alignment.total_multiple if lengths else smallest

    first_R = list(accumulate((r.completion.num_tokens for r in rollouts), initial=0))
    sequences = [
        _Columns.of(rollout, length, position, first_R[position])
        for rollout, length, position in zip(members, lengths, positions, strict=True)
    ]
    sequences.append(_Columns.of(None, fill, -1, 0))
    own = _Columns(
        *(
            torch.cat([_own_part(column, alignment) for column in parts])
            for parts in zip(*(vars(sequence).values() for sequence in sequences), strict=True)
        )
    )
    kept_K = (own.target >= 0).nonzero().squeeze(1)

    spans = [*lengths, fill] if fill else lengths
    bounds = torch.tensor([0, *spans], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed_bounds = bounds if bounds_on_host else to_device(bounds)
    longest = max(spans)
    has_reference = any(r.reference_logprobs is not None for r in members)
    return MicroBatch(
        positions=tuple(positions),
        position_R=to_device(torch.tensor(positions, dtype=torch.int64)),
        tokens_T=to_device(own.token),
        target_T=to_device(own.target),
        index_T=to_device(own.index),
        engine_logprob_T=to_device(own.engine_logprob),
        cu_seqlens=to_device(bounds[: len(members) + 1] // alignment.cp),
        packed=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=packed_bounds,
            cu_seqlens_kv=packed_bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        num_tokens_R=to_device(torch.tensor([r.completion.num_trained for r in members])),
        num_used=sum(lengths) // alignment.cp,
        kept_K=to_device(kept_K),
        rollout_K=to_device(own.rollout[kept_K]),
        reference_logprob_T=to_device(own.reference_logprob) if has_reference else None,
    )


def to_device(host: Tensor) -> Tensor:
    """Returns a host tensor on this rank's device, which it has before anything that is launched later reads it.

    From pinned memory the copy waits in the device's queue; from other memory the host would wait for the queue.
    """
    if not torch.cuda.is_available():
        return host
    return host.pin_memory().to(torch.cuda.current_device(), non_blocking=True)


@dataclass(frozen=True)
class _Columns:
    """One sequence token by token, before context parallelism cuts it. Each is [length]."""

    token: Tensor
    """int64 input tokens."""
    target: Tensor
    """int64 trained token that the position predicts, or NO_TARGET."""
    index: Tensor
    """int64 index of that token among the response tokens of the minibatch, or -1."""
    rollout: Tensor
    """int64 position of the rollout in the minibatch, or -1."""
    engine_logprob: Tensor
    """fp32 the rollout engine's log-prob of the target, nats; 0 without one."""
    reference_logprob: Tensor
    """fp64 the reference's log-prob of the target, nats; 0 without one."""

    @classmethod
    def of(cls, rollout: Rollout | None, length: int, position: int, first: int) -> _Columns:
        """Lays out `rollout`, padded to `length`; its first response token has the index `first`."""
        columns = cls(
            token=torch.zeros(length, dtype=torch.int64),
            target=torch.full((length,), NO_TARGET),
            index=torch.full((length,), -1),
            rollout=torch.full((length,), position),
            engine_logprob=torch.zeros(length),
            reference_logprob=torch.zeros(length, dtype=torch.float64),
        )
        if rollout is None:
            return columns

        prompt, completion = rollout.prompt.token_ids, rollout.completion
        response = torch.tensor(completion.token_ids, dtype=torch.int64)
        whole = torch.cat([torch.tensor(prompt, dtype=torch.int64), response])
        columns.token[: len(whole) - 1] = whole[:-1]
        # The last prompt token predicts the first response token. Tokens that are not trained are inputs alone.
        answer = torch.tensor(completion.trained).nonzero().squeeze(1)
        predicting = answer + len(prompt) - 1
        columns.target[predicting] = response[answer]
        columns.index[predicting] = first + answer
        columns.engine_logprob[predicting] = torch.tensor(completion.logprobs)[answer]
        if rollout.reference_logprobs is not None:
            reference = torch.tensor(rollout.reference_logprobs, dtype=torch.float64)
            columns.reference_logprob[predicting] = reference[answer]
        return columns


def _own_part(whole: Tensor, alignment: Alignment) -> Tensor:
    if alignment.cp == 1:
        return whole
    chunks = whole.chunk(2 * alignment.cp) if len(whole) else (whole,) * 2 * alignment.cp
    return torch.cat([chunks[alignment.cp_rank], chunks[2 * alignment.cp - 1 - alignment.cp_rank]])
