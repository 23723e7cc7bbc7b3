"""LPO: listwise policy optimization (arXiv:2605.06139).

It is an exact projection on the simplex of a group's responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from megatron_real.bounds import Positive
from megatron_real.objective.objective import Objective, Reach

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_real.objective.facts import Facts, RolloutTable


@dataclass(frozen=True, kw_only=True)
class Lpo(Objective):
    """L = mean over groups of D( w || P ), a divergence from a Gibbs target.

    P is the policy's listwise distribution, w the target. Over the K labelled rollouts of a group,
    with the log-ratio l_k = log pi(o_k) - log pi_old(o_k) of whole responses,

        P = softmax(l)      w = softmax(R / temperature)
        D = KL(w || P) (forward) or KL(P || w) (reverse)

    so that d L / d l_k is P_k - w_k (forward) or P_k (d_k - sum_j P_j d_j), d = l - log w
    (reverse): bounded by 1 or zero-sum, and 0 at the target. The temperature is the standard
    deviation of the group's rewards (the target that GRPO implies), their mean, or 1 (Dr. GRPO's).
    A group of equal rewards has no target: weight 0.

    Deviations: the target is that of the policy that generated the rollouts, whose own distribution
    over them is uniform; the paper writes the current iterate's, which is the same at the first
    update after a rollout. The text used was a detailed public summary of the paper, its equations
    and defaults, not its appendix.
    """

    name: ClassVar[str] = "lpo"
    reach: ClassVar[Reach] = "group"

    divergence: Literal["forward", "reverse"] = "forward"
    """`forward` covers all good answers, `reverse` seeks the best."""
    temperature: Literal["std", "mean", "one"] = "std"
    """Of the target: the standard deviation of the group's rewards, their mean, or 1."""
    length_normalised: bool = False
    """Takes the mean log-ratio of a response instead of the sum."""
    min_temperature: Annotated[float, Positive] = 1e-3
    """The temperature is never below this."""

    def facts(self, table: RolloutTable) -> Facts:
        """Returns log w of each rollout as its advantage. Groups of equal rewards do not learn."""
        import torch

        from megatron_real.objective.facts import (
            group_advantages,
            group_index,
            make_facts,
            mean_over_samples,
        )

        advantage_R, num_equal = group_advantages(table, table.reward_R, scale=False)
        # Rewards of a group differ if one of them lies off their mean.
        index_R, count_G = group_index(table)
        largest_G = torch.zeros_like(count_G)
        largest_G = largest_G.scatter_reduce(0, index_R, advantage_R.abs(), "amax")

        learns_R = table.labelled_R & (largest_G > 0)[index_R]
        return make_facts(
            table,
            learns_R=learns_R,
            token_weight_R=mean_over_samples(table),
            regularises=self.regularises,
            advantage_R=self._log_target(table, learns_R),
            denominator=int((count_G > 0).sum()),
            num_equal_groups=num_equal,
        )

    def _log_target(self, table: RolloutTable, learns_R: Tensor) -> Tensor:
        """Returns [R] log softmax of reward / temperature in each group, 0 where nothing learns."""
        import torch

        from megatron_real.objective.grouping import group_table, masked_log_sum_exp

        index_GM, filled_GM = group_table(table.group_R, learns_R)
        log_target_R = torch.zeros(len(table.label_R), dtype=torch.float64)
        if not len(index_GM):
            return log_target_R

        reward_GM = table.reward_R[index_GM].masked_fill(~filled_GM, 0.0)
        count_G1 = filled_GM.sum(1, keepdim=True)
        mean_G1 = reward_GM.sum(1, keepdim=True) / count_G1
        if self.temperature == "std":
            square_GM = ((reward_GM - mean_G1) * filled_GM).square()
            # Rewards of these groups differ, so that each has at least two rollouts and the divisor
            # is not 0.
            temperature_G1 = (square_GM.sum(1, keepdim=True) / (count_G1 - 1)).sqrt()
        elif self.temperature == "mean":
            temperature_G1 = mean_G1
        else:
            temperature_G1 = torch.ones_like(mean_G1)

        # A mean may be 0 or negative, and a deviation tiny: the bound keeps the logits finite.
        logit_GM = reward_GM / temperature_G1.clamp(min=self.min_temperature)
        log_target_GM = logit_GM - masked_log_sum_exp(logit_GM, filled_GM).unsqueeze(1)
        log_target_R[index_GM[filled_GM]] = log_target_GM[filled_GM]
        return log_target_R

    def score_loss(self, score_R: Tensor, old_mean_R: Tensor, facts: Facts) -> Tensor:
        """Returns the divergence of these groups."""
        from megatron_real.objective.grouping import group_table, masked_log_sum_exp

        # where, not multiplication: the score of a rollout that does not learn may be NaN.
        score_R = score_R.where(facts.learns_R, 0.0)
        if self.length_normalised:
            log_ratio_R = score_R
        else:
            # A score is a mean over tokens: times their number it is the log-ratio of
            # the whole response.
            log_ratio_R = score_R * facts.num_tokens_R

        index_GM, filled_GM = group_table(facts.group_R, facts.learns_R)
        log_ratio_GM = log_ratio_R[index_GM]
        log_policy_GM = log_ratio_GM - masked_log_sum_exp(log_ratio_GM, filled_GM).unsqueeze(1)
        gap_GM = (facts.advantage_R[index_GM] - log_policy_GM).masked_fill(~filled_GM, 0.0)

        if self.divergence == "forward":
            # KL(w || P) = sum w (log w - log P). Empty cells have a gap of 0, whatever their
            # weight.
            target_GM = facts.advantage_R[index_GM].exp()
            loss = (target_GM * gap_GM).sum()
        else:
            # KL(P || w) = -sum P (log w - log P): here the weights carry a gradient too.
            policy_GM = log_policy_GM.masked_fill(~filled_GM, 0.0).exp()
            loss = -(policy_GM * gap_GM).sum()
        return loss / facts.denominator
