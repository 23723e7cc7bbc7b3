"""Dr. GRPO: GRPO without its length and difficulty biases (arXiv:2503.20783, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from megatron_real.bounds import Positive
from megatron_real.objective.objective import Reach
from megatron_real.objective.policy_gradient import PolicyGradient, clipped_loss

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_real.objective.facts import RolloutTable


@dataclass(frozen=True, kw_only=True)
class DrGrpo(PolicyGradient):
    """L = -1/G sum_i 1/L_max sum_t min(r A_i, clip(r, 1 - eps, 1 + eps) A_i), averaged over groups.

    A_i = R_i - mean(R): no division by the standard deviation, and none by the rollout's own length
    but by a constant, which the authors' code sets to the generation budget.
    """

    name: ClassVar[str] = "dr_grpo"
    reach: ClassVar[Reach] = "token"
    scales_advantages: ClassVar[bool] = False

    clip: Annotated[float, Positive] = 0.2
    """Half-width of the trust region of the ratio."""
    max_tokens: Annotated[float, Positive] = 8192.0
    """Constant in place of a rollout's length; write ${rollout.max_response_tokens} to follow that
    setting."""

    def token_weights(self, table: RolloutTable) -> Tensor:
        """Returns [R] 1 / (groups * rollouts of the group * max_tokens)."""
        from megatron_real.objective.facts import mean_over_samples

        # That mean divides by a rollout's own length, which is put back and replaced by the
        # constant.
        return mean_over_samples(table) * table.num_tokens_R / self.max_tokens

    def ratio_loss(self, logprob_K: Tensor, ratio_K: Tensor, advantage_K: Tensor) -> Tensor:
        """Returns [K] PPO's clipped loss."""
        return clipped_loss(ratio_K, advantage_K, self.clip, self.clip)
