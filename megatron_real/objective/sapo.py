"""SAPO: soft adaptive policy optimization (arXiv:2511.20347)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from megatron_real.bounds import Positive
from megatron_real.objective.objective import Reach
from megatron_real.objective.policy_gradient import PolicyGradient

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sapo(PolicyGradient):
    """L = -1/G sum_i 1/|o_i| sum_t f(r) A_i, averaged over groups.

    f(r) = 4 / tau * sigmoid(tau (r - 1)). The soft gate takes the place of the clip: its slope is 1
    at r = 1 and fades on both sides, faster for a larger tau. tau is tau_pos for positive
    advantages and tau_neg for negative ones. The defaults are the paper's.
    """

    name: ClassVar[str] = "sapo"
    reach: ClassVar[Reach] = "token"

    tau_pos: Annotated[float, Positive] = 1.0
    """Temperature of the gate for positive advantages."""
    tau_neg: Annotated[float, Positive] = 1.05
    """Temperature of the gate for negative advantages; above `tau_pos`: they destabilise more."""

    def ratio_loss(self, logprob_K: Tensor, ratio_K: Tensor, advantage_K: Tensor) -> Tensor:
        """Returns [K] the gated loss."""
        positive_K = advantage_K > 0
        tau_K = ratio_K.new_full(ratio_K.shape, self.tau_neg).masked_fill(positive_K, self.tau_pos)
        # A sigmoid's slope at 0 is 1/4, so that 4 / tau gives the gate the slope 1 at ratio 1.
        gate_K = 4.0 / tau_K * (tau_K * (ratio_K - 1)).sigmoid()
        return -gate_K * advantage_K
