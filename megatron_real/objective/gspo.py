"""GSPO: group sequence policy optimization (arXiv:2507.18071, Eq. 5 to 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from megatron_real.bounds import Positive
from megatron_real.objective.objective import Reach
from megatron_real.objective.policy_gradient import PolicyGradient, clipped_loss

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_real.objective.facts import Facts


@dataclass(frozen=True, kw_only=True)
class Gspo(PolicyGradient):
    """L = -1/G sum_i min(s_i A_i, clip(s_i, 1 - eps_low, 1 + eps_high) A_i), averaged over groups.

    s_i = (pi(o_i) / pi_old(o_i))^(1 / |o_i|), the exponential of our score: a whole rollout is
    clipped or none of it. The bounds are those of the paper's experiments (section 5.1).
    """

    name: ClassVar[str] = "gspo"
    reach: ClassVar[Reach] = "sequence"

    clip_low: Annotated[float, Positive] = 3e-4
    """How far below 1 the sequence's ratio may fall."""
    clip_high: Annotated[float, Positive] = 4e-4
    """How far above 1 the sequence's ratio may rise."""

    def score_loss(self, score_R: Tensor, old_mean_R: Tensor, facts: Facts) -> Tensor:
        """Returns the clipped loss of these rollouts.

        Their share of the mean is in the facts' token weights.
        """
        # The score of a rollout that does not learn may be NaN: replaced, not multiplied by 0.
        ratio_R = score_R.where(facts.learns_R, 0.0).exp()
        loss_R = clipped_loss(ratio_R, facts.advantage_R, self.clip_low, self.clip_high)
        # A token's weight times the number of tokens is the rollout's share: the mean is over
        # rollouts.
        return (facts.token_weight_R * facts.num_tokens_R * loss_R).sum()
