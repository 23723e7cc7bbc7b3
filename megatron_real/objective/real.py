"""REAL: rewards as labels (arXiv:2602.05630).

The loss of whole groups, and its gradient in closed form.

Within a group, with the logit z_k = -s_k / tau for a positive and z_k = +s_k / tau for a negative
(so that a large z is always a mistake), the three variants and the magnitude of their gradient,
|dL/ds_k| = p_k / tau <= 1 / tau, are

    anchored  log(1 + sum_{O+} e^z) + log(1 + sum_{O-} e^z)   Eq. 8
              p = softmax of z over {0} and its own side      Eq. 9, 10
    vanilla   log(1 + sum_{O+} e^z * sum_{O-} e^z)            Eq. 2
              p = softmax of z over its own side * sigmoid(LSE(O+) + LSE(O-))
    bce       sum_{O+ and O-} log(1 + e^z)                    Eq. 11
              p = sigmoid(z)

Eq. 9 writes p_k of a positive as

    1 / (1 + C+ e^{s_k / tau})      C+ = 1 + sum_{i != k} e^{-s_i / tau}

which is the same number. On-policy (s = 0) no special case is needed: p is 1 / (1 + |O+|) for an
anchored positive, and so on.

Deviations: BCE sums over the group, as Eq. 11 does; the authors' code takes the mean over
sequences. One-class groups have a one-sided loss in Eq. 8; the authors' code skips them, and so
does our default.

Legend: R rollouts, K rollouts that train, G groups, L labels (0, 1, -1), S sides = (group, class),
M members of the largest side. Row 2g of an [S, M] table holds the negatives of group g, row 2g + 1
its positives. A table rather than scatter_add, because on CUDA scatter_add sums in a random order,
and every rank must get the very same weights.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_real.records import EXCLUDED, NEGATIVE, POSITIVE

Variant = Literal["anchored", "vanilla", "bce"]
"""Eq. 8, Eq. 2 or Eq. 11 of the paper."""
OneClassGroups = Literal["skip", "keep"]
"""Whether groups of one class have no loss, or the one-sided loss that the equation prints."""


def real_loss(
    score_R: Tensor,
    label_R: Tensor,
    group_R: Tensor,
    *,
    tau: float = 0.5,
    variant: Variant = "anchored",
    one_class_groups: OneClassGroups = "skip",
    num_groups: int | None = None,
) -> Tensor:
    """Returns the REAL objective of whole groups (Eq. 8; Eq. 2 and 11 as variants).

    Args:
        score_R: [R] mean over the response tokens of log pi - log pi_old, nats; differentiable. NaN
            or inf is harmless where excluded.
        label_R: [R] 1 = verified correct, 0 = verified wrong, -1 = excluded: no loss, no weight, in
            no sum.
        group_R: [R] integers; equal ones form a group. Any values, any order, unequal sizes, but
            whole groups only.
        tau: temperature > 0; |d loss / d score| <= 1 / (tau * num_groups).
        variant: "anchored" (Eq. 8), "vanilla" (Eq. 2) or "bce" (Eq. 11, a sum over the group).
        one_class_groups: "skip" gives groups whose labelled rollouts are of one class no loss,
            "keep" leaves the one-sided loss (of "vanilla", which couples the sides, that is 0 too).
            Both count them in the denominator.
        num_groups: the denominator, which is that of the whole minibatch where this call holds a
            part of it. Default: the groups given that have a labelled rollout.

    Returns:
        Scalar, float32 or, for float64 scores, float64. Exactly 0 if no rollout trains.

    Raises:
        ValueError: a wrong shape, a label outside {1, 0, -1}, a non-integer group, tau or
            num_groups not > 0, or an unknown variant or one_class_groups.
    """
    z_SM, _, _, num_groups = _logits(
        score_R, label_R, group_R, tau, variant, one_class_groups, num_groups
    )
    if variant == "anchored":
        loss_S = _log_sum_exp(_with_anchor(z_SM))
    elif variant == "vanilla":
        # log(1 + A * B) = softplus(log A + log B): the two sides of a group stand in adjacent rows.
        loss_S = _softplus(_log_sum_exp(z_SM).view(-1, 2).sum(1))
    else:
        # Cells beyond a side's members hold -inf, whose softplus is 0.
        loss_S = _softplus(z_SM)

    return loss_S.sum() / num_groups


@torch.no_grad()
def real_weights(
    score_R: Tensor,
    label_R: Tensor,
    group_R: Tensor,
    *,
    tau: float = 0.5,
    variant: Variant = "anchored",
    one_class_groups: OneClassGroups = "skip",
    num_groups: int | None = None,
) -> Tensor:
    """Returns the gradient of `real_loss` in the scores, in closed form (Eq. 9, 10).

    The division by num_groups is included. Backward of sum_k w_k * s_k is that of the loss, in any
    order and over any packing of the rollouts. At score 0 these are the on-policy weights, exact
    without a scoring pass.

    Args:
        score_R, label_R, group_R, tau, variant, one_class_groups, num_groups: as in `real_loss`.

    Returns:
        [R] d real_loss / d score, float32 or, for float64 scores, float64; no autograd. Positives
        <= 0 <= negatives, |w| <= 1 / (tau * num_groups), exactly 0 at rollouts that are excluded or
        of a skipped group.

    Raises:
        ValueError: as `real_loss`.
    """
    z_SM, index_K, filled_SM, num_groups = _logits(
        score_R, label_R, group_R, tau, variant, one_class_groups, num_groups
    )
    if variant == "anchored":
        p_SM = _with_anchor(z_SM).softmax(1)[:, 1:]  # without the anchor's own share
    elif variant == "vanilla":
        mistaken_G = _log_sum_exp(z_SM).view(-1, 2).sum(1).sigmoid()
        p_SM = z_SM.softmax(1) * mistaken_G.repeat_interleave(2).unsqueeze(1)
    else:
        p_SM = z_SM.sigmoid()

    # Cells are read row by row, which is the order of index_K.
    p_K = p_SM[filled_SM]
    weight_R = p_K.new_zeros(score_R.shape)
    # dz / ds is -1 / tau for a positive and 1 / tau for a negative.
    weight_R[index_K] = torch.where(label_R[index_K] == POSITIVE, -p_K, p_K) / tau / num_groups
    return weight_R


def training_rollouts(
    label_R: Tensor,
    group_R: Tensor,
    *,
    variant: Variant = "anchored",
    one_class_groups: OneClassGroups = "skip",
) -> tuple[Tensor, int]:
    """Returns which rollouts have a gradient at all, and the denominator of their minibatch.

    One-class is judged after exclusion. A skipped one-class group counts in the denominator, a
    wholly excluded one does not.

    Args:
        label_R, group_R, variant, one_class_groups: as in `real_loss`.

    Returns:
        trains_R, [R] bool: False where the weight is 0 whatever the scores, so that the rollout may
        be dropped; and the number of groups that have a labelled rollout.

    Raises:
        ValueError: as `real_loss`.
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be one of {', '.join(get_args(Variant))}, got {variant!r}.")
    if one_class_groups not in get_args(OneClassGroups):
        raise ValueError(f"one_class_groups must be skip or keep, got {one_class_groups!r}.")
    if label_R.dim() != 1 or label_R.shape != group_R.shape:
        shapes = f"{list(label_R.shape)} and {list(group_R.shape)}"
        raise ValueError(f"label_R and group_R must both be [R], got {shapes}.")

    if group_R.is_floating_point() or group_R.is_complex():
        raise ValueError(f"group_R must hold integers, got {group_R.dtype}.")
    unknown_R = (label_R != POSITIVE) & (label_R != NEGATIVE) & (label_R != EXCLUDED)
    if unknown_R.any():
        k = int(unknown_R.nonzero()[0])
        got = f"{label_R[k].item()} at index {k}"
        raise ValueError(f"label_R must hold 1 (correct), 0 (wrong) or -1 (excluded), got {got}.")

    unique_G, index_R = torch.unique(group_R, return_inverse=True)
    has_GL = torch.zeros(len(unique_G), 3, dtype=torch.bool, device=label_R.device)
    has_GL[index_R, label_R.long()] = True  # label -1 lands in the last column
    has_class_GC = has_GL[:, :2]
    labelled_G = has_class_GC.any(1)

    # Eq. 2 multiplies the two sides: a group without one of them has loss 0 even with `keep`.
    if one_class_groups == "keep" and variant != "vanilla":
        trains_G = labelled_G
    else:
        trains_G = has_class_GC.all(1)
    trains_R = (label_R != EXCLUDED) & trains_G[index_R]
    return trains_R, int(labelled_G.sum())


def _logits(
    score_R: Tensor,
    label_R: Tensor,
    group_R: Tensor,
    tau: float,
    variant: Variant,
    one_class_groups: OneClassGroups,
    num_groups: int | None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Checks the arguments and lays the rollouts that train out by side.

    Returns:
        z_SM, [S, M] logits, -inf in the cells beyond a side's members; index_K, [K] the rollouts in
        the order of the table's cells; filled_SM, [S, M] bool, the cells that hold one; and the
        denominator.
    """
    if score_R.dim() != 1 or score_R.shape != label_R.shape:
        shapes = f"{list(score_R.shape)} and {list(label_R.shape)}"
        raise ValueError(f"score_R and label_R must both be [R], got {shapes}.")
    if not (math.isfinite(tau) and tau > 0):
        raise ValueError(f"tau must be finite and > 0, got {tau}.")
    if num_groups is not None and not num_groups > 0:
        raise ValueError(f"num_groups must be > 0, got {num_groups}.")

    trains_R, num_labelled_groups = training_rollouts(
        label_R, group_R, variant=variant, one_class_groups=one_class_groups
    )

    # Rollouts that do not train are left out by index: nothing they hold can reach a sum or a
    # gradient.
    index_K = trains_R.nonzero().squeeze(1)

    # Numbered anew: groups of which nothing trains get no rows.
    unique_G, group_K = torch.unique(group_R[index_K], return_inverse=True)
    # Stable: rollouts of one side keep their order, so the sums of all ranks are equal to the bit.
    side_K, order_K = torch.sort(2 * group_K + label_R[index_K].long(), stable=True)
    index_K = index_K[order_K]

    # minlength: where the last group has no positives, they have a row all the same.
    count_S = torch.bincount(side_K, minlength=2 * len(unique_G))
    # At least one column: torch refuses the maximum over none.
    widest = max(count_S.tolist(), default=1)
    filled_SM = torch.arange(widest, device=count_S.device) < count_S.unsqueeze(1)

    score_K = score_R.to(torch.promote_types(score_R.dtype, torch.float32))[index_K]
    z_K = torch.where(label_R[index_K] == POSITIVE, -score_K, score_K) / tau
    z_SM = z_K.new_full(filled_SM.shape, -math.inf).masked_scatter(filled_SM, z_K)

    if num_groups is None:
        num_groups = max(num_labelled_groups, 1)
    return z_SM, index_K, filled_SM, num_groups


def _with_anchor(z_SM: Tensor) -> Tensor:
    """Returns [S, 1 + M] the logits with the anchor logit 0 before each side's own.

    e^0 is the 1 in log(1 + sum e^z), so an empty side has loss 0.
    """
    # pad's default value is the anchor's logit.
    return F.pad(z_SM, (1, 0))


def _log_sum_exp(z_SM: Tensor) -> Tensor:
    """Returns [S] log sum_M e^z; no row may be all -inf.

    Not torch.logsumexp: its backward, e^(z - result), inherits the rounding of the result: 1e-3 in
    float32 at 1e4.
    """
    # Detached: the maximum cancels in the value, and so it has no gradient to give.
    max_S1 = z_SM.detach().amax(1, keepdim=True)
    return max_S1.squeeze(1) + torch.exp(z_SM - max_S1).sum(1).log()


def _softplus(z: Tensor) -> Tensor:
    """Returns log(1 + e^z), elementwise.

    Not F.softplus: above its threshold of 20 it drops e^-z, which float64 can tell.
    """
    return -F.logsigmoid(-z)
