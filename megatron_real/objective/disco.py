"""DisCO: discriminative constrained optimization (arXiv:2505.12366, Eq. 8 to 11).

The authors' code of REAL descends from that of DisCO.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from megatron_real.bounds import NonNegative, Positive
from megatron_real.objective.objective import Objective, Reach

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_real.objective.facts import Facts, RolloutTable


@dataclass(frozen=True, kw_only=True)
class Disco(Objective):
    """L = -mean over groups of [ mean_i s_i - tau log( mean_j e^(s_j / tau) ) ] + penalty.

    The penalty is beta / 2 * max(0, KL - delta)^2. i runs over a group's right answers, j over its
    wrong ones, and s = 1/|o| sum_t log pi(o_t): the log-likelihood score, which the paper
    recommends, with the constants that it gives for it. KL is the mean of log pi_old - log pi over
    all response tokens of the labelled rollouts of the minibatch: it couples the whole minibatch,
    so this objective needs a scoring pass. Groups of one class have no term but count in the mean.

    Deviations: the likelihood-ratio score is not offered. The penalty is written with 1/2, so that
    its gradient is beta * max(0, KL - delta) times that of KL, as in the authors' code.
    """

    name: ClassVar[str] = "disco"
    reach: ClassVar[Reach] = "minibatch"
    free_first_minibatch: ClassVar[bool] = False
    """The scores are log-likelihoods: they are known after a forward pass only."""

    tau: Annotated[float, Positive] = 10.0
    """Temperature of the soft maximum over wrong answers."""
    beta: Annotated[float, NonNegative] = 1000.0
    """Strength of the penalty."""
    delta: Annotated[float, NonNegative] = 1e-4
    """Divergence from the old policy (nats a token) that costs nothing."""

    def facts(self, table: RolloutTable) -> Facts:
        """Returns labels and groups.

        Every labelled rollout trains, as the penalty is on all of them.
        """
        import torch

        from megatron_real.objective.facts import make_facts, mean_over_tokens
        from megatron_real.objective.real import training_rollouts
        from megatron_real.records import EXCLUDED

        label_R = torch.where(table.labelled_R, table.label_R, EXCLUDED)
        learns_R, num_groups = training_rollouts(label_R, table.group_R)
        # The penalty alone gives rollouts of one-class groups a gradient, so all of them are
        # computed (`regularises`) though they do not learn.
        return make_facts(
            table,
            learns_R=learns_R,
            token_weight_R=mean_over_tokens(table),
            regularises=True,
            denominator=num_groups,
        )

    def score_loss(self, score_R: Tensor, old_mean_R: Tensor, facts: Facts) -> Tensor:
        """Returns the discriminative loss and the penalty."""
        from megatron_real.objective.grouping import group_table, masked_log_sum_exp
        from megatron_real.records import POSITIVE

        # Not by their labels: the facts hide those of rollouts that do not learn, and the penalty
        # is on all.
        labelled_R = facts.token_weight_R > 0
        # where, not multiplication: an excluded score may be NaN.
        score_R = score_R.where(labelled_R, 0.0)
        likelihood_R = score_R + old_mean_R.where(labelled_R, 0.0)

        index_GM, filled_GM = group_table(facts.group_R, facts.learns_R)
        positive_GM = filled_GM & (facts.label_R[index_GM] == POSITIVE)
        negative_GM = filled_GM & ~positive_GM
        likelihood_GM = likelihood_R[index_GM]
        # Neither count is 0: a group that learns has both classes.
        mean_positive_G = (likelihood_GM * positive_GM).sum(1) / positive_GM.sum(1)
        # The mean of e^x is its sum divided by the count: log mean = log sum - log count.
        soft_max_G = masked_log_sum_exp(likelihood_GM / self.tau, negative_GM)
        soft_mean_G = self.tau * (soft_max_G - negative_GM.sum(1).to(soft_max_G.dtype).log())
        gap = (mean_positive_G - soft_mean_G).sum() / facts.denominator

        # A score is the mean of log pi - log pi_old over its rollout. Times the length it is the
        # sum, and with the token weight the rollout's share of the mean over all tokens; KL has the
        # other sign.
        divergence = -(facts.token_weight_R * facts.num_tokens_R * score_R).sum()
        # Zero, gradient included, as long as the policy stays within delta of the old one.
        penalty = self.beta / 2 * (divergence - self.delta).clamp(min=0).square()
        return penalty - gap
