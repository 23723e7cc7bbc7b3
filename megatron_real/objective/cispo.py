"""CISPO: clipped importance-sampling weights (MiniMax-M1, arXiv:2506.13585, Eq. 4 and 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from megatron_real.bounds import Positive
from megatron_real.objective.objective import Reach
from megatron_real.objective.policy_gradient import PolicyGradient

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_real.objective.facts import RolloutTable


@dataclass(frozen=True, kw_only=True)
class Cispo(PolicyGradient):
    """L = -1 / sum_i |o_i| * sum_i sum_t w A_i log pi, with w = clip(r, 1 - eps_low, 1 + eps_high).

    The clipped ratio w is a weight and carries no gradient, so no token ever loses its gradient.
    The paper bounds the ratio from above only (`upper`); `two_sided` is Eq. 5 with both bounds.

    Deviation: the paper gives no number for the upper bound. The default is the one of ScaleRL
    (arXiv:2510.13786).
    """

    name: ClassVar[str] = "cispo"
    reach: ClassVar[Reach] = "token"

    bounds: Literal["upper", "two_sided"] = "upper"
    """Which bounds the weight has."""
    clip_high: Annotated[float, Positive] = 4.0
    """How far above 1 the weight may rise."""
    clip_low: Annotated[float, Positive] = 0.2
    """How far below 1 the weight may fall; of `two_sided` alone."""

    def token_weights(self, table: RolloutTable) -> Tensor:
        """Returns [R] one over the response tokens of the minibatch."""
        from megatron_real.objective.facts import mean_over_tokens

        return mean_over_tokens(table)

    def ratio_loss(self, logprob_K: Tensor, ratio_K: Tensor, advantage_K: Tensor) -> Tensor:
        """Returns [K] the weighted log-probs; the weight is a constant."""
        low = 0.0
        if self.bounds == "two_sided":
            low = 1 - self.clip_low
        # Detached: the gradient goes through log pi alone, so a clipped token still pulls with its
        # bound.
        weight_K = ratio_K.detach().clamp(low, 1 + self.clip_high)
        return -weight_K * advantage_K * logprob_K
