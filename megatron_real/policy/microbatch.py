"""Micro-batches as the model wants them: packed, shifted, padded, and cut for this CP rank.

Shapes: R sequences of the micro-batch, T tokens of this context-parallel rank, K of them with a
target. Each sequence is padded to a multiple of 2 * CP and cut into 2 * CP pieces, of which rank r
holds r and 2 * CP - 1 - r; a last dummy sequence pads T for sequence parallelism. Padding has no
target, so it has no log-prob and no gradient, and nothing before it attends to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_real.parallel.cpu import device
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
        """Returns the tokens that a rollout takes.

        The last response token predicts nothing and is left out.
        """
        return self.up(rollout.num_tokens - 1)

    def up(self, length: int) -> int:
        """Returns `length` rounded up to what context parallelism can cut."""
        if self.cp == 1:
            return length
        num_pieces = 2 * self.cp
        # -(-a // b) is a / b rounded up.
        return -(-length // num_pieces) * num_pieces

    @property
    def total_multiple(self) -> int:
        """All tokens of a micro-batch together must be a multiple of this."""
        # Every context-parallel rank's share is cut again by sequence parallelism.
        return math.lcm(self.up(1), self.cp * self.tp)


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on one rank.

    What is known on the host is laid out here once, not in every pass.
    """

    positions: tuple[int, ...]
    """[R] positions of its sequences in the minibatch's rollouts."""
    position_R: Tensor
    """[R] int64 the same, on the device."""
    tokens_T: Tensor
    """[T] int64 input tokens."""
    target_T: Tensor
    """[T] int64 trained token that each position predicts, or NO_TARGET."""
    index_T: Tensor
    """[T] int64 index of that token among the response tokens of all the minibatch's rollouts in
    order, or -1."""
    engine_logprob_T: Tensor
    """[T] fp32 the rollout engine's log-probs of the targets (nats), 0 elsewhere."""
    cu_seqlens: Tensor
    """[R + 1] int32 bounds of the sequences in this rank's tokens; the dummy sequence is not among
    them."""
    packed: PackedSeqParams
    """Bounds over all context-parallel ranks together, the dummy sequence included. They are on the
    device for TransformerEngine's kernels, and on the host for the local layers, which would read
    them back in every layer."""
    num_tokens_R: Tensor
    """[R] trained tokens of each sequence over all context-parallel ranks."""
    num_used: int
    """Tokens of the sequences in `cu_seqlens`: those before the dummy sequence."""
    kept_K: Tensor
    """[K] int64 the positions in [0, T) that have a target."""
    rollout_K: Tensor
    """[K] int64 the rollout of each of them, as a position in the minibatch."""
    reference_logprob_T: Tensor | None
    """[T] log-probs of the targets under the reference (nats), 0 elsewhere; None where no rollout
    has them."""


def micro_batch(
    rollouts: Sequence[Rollout],
    positions: Sequence[int],
    alignment: Alignment,
    *,
    bounds_on_host: bool = True,
) -> MicroBatch:
    """Builds the micro-batch of `rollouts[i] for i in positions` on this rank's device.

    The host does not wait for the device.

    Args:
        rollouts: all of the minibatch; those in `positions` are whole, all of them with reference
            log-probs, or none.
        positions: [R] those in this micro-batch; none of them for one that only keeps the schedule
            in step.
        alignment: what the layout asks of lengths.
        bounds_on_host: the layers read the sequences' bounds on the host (MicroBatch.packed).
    """
    members = [rollouts[i] for i in positions]
    lengths = [alignment.length(rollout) for rollout in members]
    if alignment.padded and lengths:
        lengths = [max(lengths)] * len(lengths)

    # The dummy sequence. An empty micro-batch consists of it alone, and there are attention kernels
    # that refuse a sequence of a single token: it then has at least two.
    if lengths:
        # What is missing to the next multiple: Python's % of a negative number is never negative.
        fill = -sum(lengths) % alignment.total_multiple
    else:
        fill = math.lcm(alignment.total_multiple, 2)

    # Index of each rollout's first response token among those of the whole minibatch.
    first_R = list(accumulate((r.completion.num_tokens for r in rollouts), initial=0))
    sequences = [
        _Columns.of(rollout, length, position, first_R[position])
        for rollout, length, position in zip(members, lengths, positions, strict=True)
    ]
    # The dummy comes last: `num_used` cuts it off again.
    sequences.append(_Columns.of(None, fill, -1, 0))
    own = _Columns.of_rank(sequences, alignment)
    kept_K = (own.target >= 0).nonzero().squeeze(1)

    spans = lengths
    if fill:
        spans = [*lengths, fill]
    bounds = torch.tensor([0, *spans], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    packed_bounds = bounds if bounds_on_host else to_device(bounds)

    reference_logprob_T = None
    if any(rollout.reference_logprobs is not None for rollout in members):
        reference_logprob_T = to_device(own.reference_logprob)

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
            max_seqlen_q=max(spans),
            max_seqlen_kv=max(spans),
        ),
        num_tokens_R=to_device(torch.tensor([r.completion.num_trained for r in members])),
        num_used=sum(lengths) // alignment.cp,
        kept_K=to_device(kept_K),
        rollout_K=to_device(own.rollout[kept_K]),
        reference_logprob_T=reference_logprob_T,
    )


def to_device(host: Tensor) -> Tensor:
    """Returns a host tensor on this rank's device, without waiting for the copy.

    Whatever is launched later reads the copied values.
    """
    if not torch.cuda.is_available():
        return host
    # From pinned memory the copy waits in the device's queue; from other memory the host would wait
    # for the queue.
    return host.pin_memory().to(device(), non_blocking=True)


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
        """Lays out one sequence.

        Args:
            rollout: None for a sequence of padding alone.
            length: tokens, padding included.
            position: the rollout's in the minibatch.
            first: index of its first response token among those of the minibatch.
        """
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

        prompt = rollout.prompt.token_ids
        completion = rollout.completion
        response = torch.tensor(completion.token_ids, dtype=torch.int64)
        whole = torch.cat([torch.tensor(prompt, dtype=torch.int64), response])
        # The last token is nobody's input: it would predict what is not there.
        columns.token[: len(whole) - 1] = whole[:-1]

        # The last prompt token predicts the first response token. Tokens that are not trained are
        # inputs alone.
        answer = torch.tensor(completion.trained).nonzero().squeeze(1)
        predicting = answer + len(prompt) - 1
        columns.target[predicting] = response[answer]
        columns.index[predicting] = first + answer
        columns.engine_logprob[predicting] = torch.tensor(completion.logprobs)[answer]

        if rollout.reference_logprobs is not None:
            reference = torch.tensor(rollout.reference_logprobs, dtype=torch.float64)
            columns.reference_logprob[predicting] = reference[answer]
        return columns

    @classmethod
    def of_rank(cls, sequences: Sequence[_Columns], alignment: Alignment) -> _Columns:
        """Returns the sequences one after the other, of each this context-parallel rank's part."""
        rank = alignment.cp_rank
        num_pieces = 2 * alignment.cp

        def own_part(column: Tensor) -> Tensor:
            if alignment.cp == 1:
                return column
            # chunk() makes fewer pieces of fewer tokens: of an empty sequence, a single one.
            pieces = column.chunk(num_pieces) if len(column) else [column] * num_pieces
            return torch.cat([pieces[rank], pieces[num_pieces - 1 - rank]])

        joined = {
            field.name: torch.cat([own_part(getattr(s, field.name)) for s in sequences])
            for field in dataclasses.fields(cls)
        }
        return cls(**joined)
