"""GRPO: group relative policy optimization (DeepSeekMath, arXiv:2402.03300, Eq. 3).

Rewards are of outcomes, as in the paper's section 4.1.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from megatron_real.bounds import Positive
from megatron_real.objective.objective import Reach
from megatron_real.objective.policy_gradient import PolicyGradient, clipped_loss

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Grpo(PolicyGradient):
    """L = -1/G sum_i 1/|o_i| sum_t min(r A_i, clip(r, 1 - eps, 1 + eps) A_i), averaged over groups.

    A_i = (R_i - mean(R)) / std(R) over the labelled rollouts of the group.

    Deviations: the standard deviation is that of a sample (divisor n - 1) and has no epsilon added,
    because a group of equal rewards has advantage 0 by comparison. The paper's KL (k3 to the
    reference) is off unless `kl` asks for it.
    """

    name: ClassVar[str] = "grpo"
    reach: ClassVar[Reach] = "token"

    clip: Annotated[float, Positive] = 0.2
    """Half-width of the trust region of the ratio."""

    def ratio_loss(self, logprob_K: Tensor, ratio_K: Tensor, advantage_K: Tensor) -> Tensor:
        """Returns [K] PPO's clipped loss."""
        return clipped_loss(ratio_K, advantage_K, self.clip, self.clip)
