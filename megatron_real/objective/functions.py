"""The objectives for a caller that holds a whole minibatch at once.

Such a caller is a training loop of one's own, a notebook or a test.

    objective = make_objective("gspo")
    w_T = token_weights(objective, logprob_T, old_logprob_T, rollout_T, label_R, group_R)
    (w_T * logprob_T).sum().backward()      # the gradient of objective_loss(...), in any packing

Legend: T response tokens of the minibatch in any order, R rollouts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_real.objective.facts import Facts, RolloutTable
from megatron_real.objective.kl import kl_estimate
from megatron_real.objective.objective import Objective


def objective_loss(
    objective: Objective,
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    rollout_T: Tensor,
    label_R: Tensor,
    group_R: Tensor,
    *,
    reward_R: Tensor | None = None,
    reference_T: Tensor | None = None,
) -> Tensor:
    """Returns the loss of a minibatch, KL penalty included, differentiable in `logprob_T`.

    The entropy bonus is no function of the sampled tokens' log-probs: it is not part of this loss.

    Args:
        objective: from `make_objective`.
        logprob_T: [T] float, log pi of each response token, nats.
        old_logprob_T: [T] log pi_old of the same tokens; a constant. NaN is harmless in excluded
            rollouts.
        rollout_T: [T] integers in [0, R), the rollout of each token; tokens in any order.
        label_R: [R] 1 = verified correct, 0 = verified wrong, -1 = excluded.
        group_R: [R] integers; equal ones form a group. Whole groups.
        reward_R: [R] rewards, for objectives that use them; default: the labels.
        reference_T: [T] log-probs under the reference; needed where `objective.kl.to` is
            "reference".

    Returns:
        Scalar, float32 or, for float64 log-probs, float64. Exactly 0 if no rollout trains.

    Raises:
        ValueError: shapes that do not fit, a rollout out of range, a label outside {1, 0, -1}, or
            no reference_T.
    """
    dtype = torch.promote_types(logprob_T.dtype, torch.float32)
    # float64 on the CPU first, then cast: denominators are the same whatever device and dtype come.
    facts = _facts(objective, logprob_T, old_logprob_T, rollout_T, label_R, group_R, reward_R)
    facts = facts.to(device=logprob_T.device, dtype=dtype)

    # Tokens that do not train are left out by index: nothing they hold can reach a sum or a
    # gradient.
    rollout_T = rollout_T.to(logprob_T.device, torch.int64)
    trained_K = facts.trains_R[rollout_T].nonzero().squeeze(1)
    logprob_K = logprob_T[trained_K].to(dtype)
    old_logprob_K = old_logprob_T[trained_K].detach().to(dtype)
    rollout_K = rollout_T[trained_K]

    reference_K = None
    if objective.needs_reference:
        if reference_T is None or reference_T.shape != logprob_T.shape:
            raise ValueError("kl.to is 'reference': give reference_T, [T], the shape of logprob_T.")
        reference_K = reference_T[trained_K].detach().to(dtype)

    loss = kl_penalty(objective, logprob_K, old_logprob_K, reference_K, rollout_K, facts)
    if objective.has_scores:
        # The old mean is for objectives whose score is a likelihood: score + old mean = mean of log
        # pi.
        score_R = _mean_over_tokens(logprob_K - old_logprob_K, rollout_K, facts)
        old_mean_R = _mean_over_tokens(old_logprob_K, rollout_K, facts)
        return loss + objective.score_loss(score_R, old_mean_R, facts)
    return loss + objective.token_loss(logprob_K, old_logprob_K, rollout_K, facts).sum()


def token_weights(
    objective: Objective,
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    rollout_T: Tensor,
    label_R: Tensor,
    group_R: Tensor,
    *,
    reward_R: Tensor | None = None,
    reference_T: Tensor | None = None,
) -> Tensor:
    """Returns [T] the gradient of `objective_loss` in the log-prob of each token.

    The backward pass of (w_T * logprob_T).sum(), w_T held constant, is that of the loss, over any
    packing of the tokens. CISPO holds its importance weights constant too: its gradient is that of
    the paper, not of its loss's value.

    Args:
        objective, logprob_T, old_logprob_T, rollout_T, label_R, group_R, reward_R, reference_T: as
            in `objective_loss`.

    Returns:
        [T] in the dtype of the loss; 0 at tokens of rollouts that do not train; no autograd.

    Raises:
        ValueError: as `objective_loss`.
    """
    dtype = torch.promote_types(logprob_T.dtype, torch.float32)
    # The caller may be under no_grad: the weights are wanted between its own passes.
    with torch.enable_grad():
        leaf_T = logprob_T.detach().to(dtype).requires_grad_()
        loss = objective_loss(
            objective,
            leaf_T,
            old_logprob_T,
            rollout_T,
            label_R,
            group_R,
            reward_R=reward_R,
            reference_T=reference_T,
        )
        if not loss.requires_grad:  # nothing trains
            return torch.zeros_like(leaf_T)
        # allow_unused: a loss of which no term is left depends on no log-prob.
        (weight_T,) = torch.autograd.grad(loss, leaf_T, allow_unused=True)

    if weight_T is None:
        return torch.zeros_like(leaf_T)
    return weight_T.detach()


def kl_penalty(
    objective: Objective,
    logprob_K: Tensor,
    old_logprob_K: Tensor,
    reference_K: Tensor | None,
    rollout_K: Tensor,
    facts: Facts,
) -> Tensor:
    """Returns the scalar KL part of the loss over these tokens.

    It is a sum: the denominators are in the facts' token weights.

    Args:
        logprob_K: [K] log pi, nats; differentiable.
        old_logprob_K: [K] log pi_old, a constant.
        reference_K: [K] log pi of the reference, where `objective.kl.to` asks for it.
        rollout_K: [K] int64 rollout of each token.
        facts: of the minibatch.
    """
    kl = objective.kl
    if kl.to == "none" or kl.coefficient == 0:
        return logprob_K.new_zeros(())

    other_K = old_logprob_K
    if kl.to == "reference":
        assert reference_K is not None, "an objective that needs a reference is given one"
        other_K = reference_K
    estimate_K = kl_estimate(logprob_K, other_K, kl.estimator)
    # The objective's own mean over tokens: a penalty is averaged as its terms are.
    return kl.coefficient * (facts.token_weight_R[rollout_K] * estimate_K).sum()


def _facts(
    objective: Objective,
    logprob_T: Tensor,
    old_logprob_T: Tensor,
    rollout_T: Tensor,
    label_R: Tensor,
    group_R: Tensor,
    reward_R: Tensor | None,
) -> Facts:
    """Returns the objective's facts of tensors, after checking that these fit together."""
    shapes = [list(t.shape) for t in (logprob_T, old_logprob_T, rollout_T)]
    if rollout_T.dim() != 1 or shapes != [list(rollout_T.shape)] * 3:
        raise ValueError(
            "logprob_T, old_logprob_T and rollout_T must all be [T], got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}."
        )
    if label_R.dim() != 1:
        raise ValueError(f"label_R must be [R], got {list(label_R.shape)}.")

    num_rollouts = len(label_R)

    rollout_T = rollout_T.cpu()
    if rollout_T.is_floating_point():
        raise ValueError(f"rollout_T must hold integers, got {rollout_T.dtype}.")
    if len(rollout_T) and not 0 <= int(rollout_T.min()) <= int(rollout_T.max()) < num_rollouts:
        raise ValueError(
            f"rollout_T must lie in [0, {num_rollouts}), got {int(rollout_T.min())} to "
            f"{int(rollout_T.max())}."
        )

    label_R = label_R.cpu()
    if reward_R is None:
        reward_R = label_R

    table = RolloutTable(
        label_R=label_R.long(),
        group_R=group_R.cpu(),
        reward_R=reward_R.cpu().double(),
        # 0 for a rollout without a token, which the table then counts as excluded.
        num_tokens_R=torch.bincount(rollout_T.long(), minlength=num_rollouts),
    )
    return objective.facts(table)


def _mean_over_tokens(value_K: Tensor, rollout_K: Tensor, facts: Facts) -> Tensor:
    """Returns [R] the mean over each rollout's tokens, 0 for a rollout without any."""
    # segment_reduce wants the tokens of a rollout side by side; stable, so that a sum has one
    # order.
    order_K = torch.argsort(rollout_K, stable=True)
    length_R = torch.bincount(rollout_K, minlength=len(facts.label_R))

    # Not index_add: on CUDA that one adds in a random order. unsafe: torch's own check of the
    # lengths would wait for the device.
    sum_R = torch.segment_reduce(
        value_K[order_K], "sum", lengths=length_R, initial=0.0, unsafe=True
    )
    return sum_R / length_R.clamp(min=1)
