"""DAPO: decoupled clip and dynamic sampling (arXiv:2503.14476, Eq. 8 to 13)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from megatron_real.bounds import Positive, ZeroIsOff
from megatron_real.objective.objective import Reach
from megatron_real.objective.policy_gradient import PolicyGradient, clipped_loss

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_real.objective.facts import RolloutTable


@dataclass(frozen=True, kw_only=True)
class Dapo(PolicyGradient):
    """L = -1 / sum_i |o_i| * sum_i sum_t min(r A_i, clip(r, 1 - eps_low, 1 + eps_high) A_i).

    Dynamic sampling (groups of equal rewards are replaced) is `rollout.refill_rounds`, which every
    objective can use. The soft overlong punishment (Eq. 13) is off by default and is added to the
    reward before advantages are formed.

    Deviation: the mean over tokens is that of the minibatch, as in the authors' code; Eq. 8 as
    printed averages over the tokens of a group first (`token_mean: group`).
    """

    name: ClassVar[str] = "dapo"
    reach: ClassVar[Reach] = "token"

    clip_low: Annotated[float, Positive] = 0.2
    """How far below 1 the ratio may fall."""
    clip_high: Annotated[float, Positive] = 0.28
    """How far above 1 the ratio may rise."""
    token_mean: Literal["minibatch", "group"] = "minibatch"
    """Over which tokens the mean is taken."""
    overlong_buffer: Annotated[int, ZeroIsOff] = 0
    """Tokens before `max_tokens` over which the punishment grows from 0 to 1."""
    max_tokens: Annotated[int, Positive] = 8192
    """Length in tokens at which the punishment is whole; write ${rollout.max_response_tokens} to
    follow that setting."""

    def __post_init__(self) -> None:
        if self.overlong_buffer > self.max_tokens:
            raise ValueError(
                f"objective.overlong_buffer = {self.overlong_buffer} is longer than "
                f"objective.max_tokens = {self.max_tokens}; shorten the buffer"
            )

    def rewards(self, table: RolloutTable) -> Tensor:
        """Returns [R] rewards plus the soft overlong punishment, in [-1, 0]."""
        if not self.overlong_buffer:
            return table.reward_R

        # Eq. 13: nothing up to the buffer, then a straight line to -1 at the limit. The clamp keeps
        # it there for responses that are longer still.
        first_punished = self.max_tokens - self.overlong_buffer
        excess_R = (table.num_tokens_R - first_punished).clamp(0, self.overlong_buffer)
        return table.reward_R - excess_R.double() / self.overlong_buffer

    def token_weights(self, table: RolloutTable) -> Tensor:
        """Returns [R] the weight of a token in the mean over tokens that `token_mean` names."""
        from megatron_real.objective.facts import mean_over_tokens, mean_over_tokens_of_groups

        if self.token_mean == "group":
            return mean_over_tokens_of_groups(table)
        return mean_over_tokens(table)

    def ratio_loss(self, logprob_K: Tensor, ratio_K: Tensor, advantage_K: Tensor) -> Tensor:
        """Returns [K] PPO's clipped loss with its two bounds apart."""
        return clipped_loss(ratio_K, advantage_K, self.clip_low, self.clip_high)
