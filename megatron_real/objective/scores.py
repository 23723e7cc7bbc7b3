"""The score of a response: how far, per token, the policy has moved towards it since sampling."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_scores(
    logprob: Tensor,
    old_logprob: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    num_tokens_R: Tensor | None = None,
) -> Tensor:
    """Returns s_k = (1 / n_k) sum_t [log pi(o_t) - log pi_old(o_t)] over n_k response tokens.

    Legend: R sequences, S padded length, T packed tokens. Log-probs come either padded, [R, S] with
    a mask, or packed, [T] with cu_seqlens. Both log-probs are of the sampling distribution: logits
    divided by the sampling temperature.

    Args:
        logprob: [R, S] or [T] log pi of each token, nats; carries the gradient.
        old_logprob: same shape, log pi_old; a constant.
        mask: same shape, nonzero at response tokens. Whatever lies elsewhere, NaN and inf included,
            touches neither the scores nor the gradient. Optional when packed: then every token is a
            response token.
        cu_seqlens: [R + 1] integers 0 = c_0 <= c_1 <= ... <= c_R = T; sequence k is tokens c_k to
            c_{k+1}. Their values are checked on the CPU only: reading them from a GPU would stall
            the pipeline.
        num_tokens_R: [R] n_k, where a sequence's tokens are spread over context-parallel ranks. The
            result is then this rank's part of the scores, and the sum over the ranks is the
            caller's. Default: the tokens given.

    Returns:
        [R] scores, float32 or, for float64 log-probs, float64. 0 for a sequence without a response
        token.

    Raises:
        ValueError: shapes that do not fit, neither mask nor cu_seqlens, or offsets that are not as
            above.
    """
    _check(logprob, old_logprob, mask, cu_seqlens, num_tokens_R)
    dtype = torch.promote_types(logprob.dtype, torch.float32)
    delta = logprob.to(dtype) - old_logprob.detach().to(dtype)

    if mask is None:
        is_response = torch.ones_like(delta, dtype=torch.bool)
    else:
        is_response = mask.bool()
    # where, not multiplication: what lies outside the mask may be NaN.
    delta = torch.where(is_response, delta, 0.0)
    counted = is_response.to(dtype)

    if cu_seqlens is None:
        sum_R = delta.sum(1)
        count_R = counted.sum(1)
    else:
        # Not index_add: on CUDA that one adds in a random order.
        offsets = cu_seqlens.long()
        sum_R = torch.segment_reduce(delta, "sum", offsets=offsets, initial=0.0, unsafe=True)
        # unsafe: torch's own check of the offsets would wait for the device.
        count_R = torch.segment_reduce(counted, "sum", offsets=offsets, initial=0.0, unsafe=True)
    if num_tokens_R is not None:
        count_R = num_tokens_R
    # clamp: a sequence without a response token has the sum 0 and so the score 0.
    return sum_R / count_R.clamp(min=1)


def _check(
    logprob: Tensor,
    old_logprob: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_tokens_R: Tensor | None,
) -> None:
    """Raises ValueError unless the arguments of `sequence_scores` fit together."""
    shape = list(logprob.shape)
    if cu_seqlens is None and (mask is None or logprob.dim() != 2):
        given = "no mask" if mask is None else "a mask"
        raise ValueError(
            f"logprob must be [R, S] with a mask or [T] with cu_seqlens, got {shape} with {given}."
        )
    if cu_seqlens is not None and (
        logprob.dim() != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0
    ):
        raise ValueError(
            f"logprob [T] goes with cu_seqlens [R + 1], got {shape} and {list(cu_seqlens.shape)}."
        )

    if old_logprob.shape != logprob.shape:
        raise ValueError(
            f"old_logprob must have the shape of logprob, {shape}, got {list(old_logprob.shape)}."
        )
    if mask is not None and mask.shape != logprob.shape:
        raise ValueError(f"mask must have the shape of logprob, {shape}, got {list(mask.shape)}.")

    num_sequences = len(logprob)
    if cu_seqlens is not None:
        num_sequences = len(cu_seqlens) - 1
    if num_tokens_R is not None and list(num_tokens_R.shape) != [num_sequences]:
        raise ValueError(f"num_tokens_R must be [{num_sequences}], got {list(num_tokens_R.shape)}.")

    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        offsets = cu_seqlens.tolist()
        if offsets != sorted(offsets) or offsets[0] != 0 or offsets[-1] != len(logprob):
            raise ValueError(
                f"cu_seqlens must rise from 0 to the {len(logprob)} tokens given, got {offsets}."
            )
