"""What the policy-gradient objectives share: group-relative advantages, and a mean over tokens.

They differ in how a token's ratio r = pi / pi_old enters its term, in whether advantages are
scaled, and in the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_real.objective.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_real.objective.facts import Facts, RolloutTable


@dataclass(frozen=True, kw_only=True)
class PolicyGradient(Objective):
    """Base of the objectives that weigh a rollout by its reward relative to its group's."""

    scales_advantages: ClassVar[bool] = True
    """Whether advantages are divided by the standard deviation of their group's rewards."""

    def facts(self, table: RolloutTable) -> Facts:
        """Returns advantages and token weights. A rollout of advantage 0 does not learn."""
        from megatron_real.objective.facts import group_advantages, make_facts

        reward_R = self.rewards(table)
        advantage_R, num_equal = group_advantages(table, reward_R, scale=self.scales_advantages)
        return make_facts(
            table,
            # Its term and gradient are 0 whatever the ratio: it need not be computed.
            learns_R=advantage_R != 0,
            token_weight_R=self.token_weights(table),
            regularises=self.regularises,
            advantage_R=advantage_R,
            num_equal_groups=num_equal,
        )

    def rewards(self, table: RolloutTable) -> Tensor:
        """Returns [R] float64 the rewards that advantages are made of."""
        return table.reward_R

    def token_weights(self, table: RolloutTable) -> Tensor:
        """Returns [R] float64 weight of one token of each rollout: GRPO's mean over samples."""
        from megatron_real.objective.facts import mean_over_samples

        return mean_over_samples(table)

    def token_loss(
        self, logprob_K: Tensor, old_logprob_K: Tensor, rollout_K: Tensor, facts: Facts
    ) -> Tensor:
        """Returns [K] each token's term times its weight in the mean."""
        advantage_K = facts.advantage_R[rollout_K]
        term_K = self.ratio_loss(logprob_K, (logprob_K - old_logprob_K).exp(), advantage_K)
        return facts.token_weight_R[rollout_K] * term_K

    def ratio_loss(self, logprob_K: Tensor, ratio_K: Tensor, advantage_K: Tensor) -> Tensor:
        """Returns [K] the loss of each token, before any mean.

        Args:
            logprob_K: [K] log pi, nats.
            ratio_K: [K] pi / pi_old of the same tokens.
            advantage_K: [K] advantage of each token's rollout.
        """
        raise NotImplementedError


def clipped_loss(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Returns PPO's clipped loss with its two bounds apart, elementwise.

    That is -min(r A, clip(r, 1 - low, 1 + high) A), with the ratio r and the advantage A. It has no
    gradient once r has left [1 - low, 1 + high] on the side that A pulls to.
    """
    # The minimum keeps the worse of both: a token that moved against its advantage is never
    # clipped.
    return -(ratio * advantage).minimum(ratio.clamp(1 - low, 1 + high) * advantage)
