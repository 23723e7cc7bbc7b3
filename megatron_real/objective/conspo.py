"""ConSPO: contrastive sequence-level policy optimization (arXiv:2605.12969)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from megatron_real.bounds import NonNegative, Positive
from megatron_real.objective.objective import Objective, Reach

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_real.objective.facts import Facts, RolloutTable


@dataclass(frozen=True, kw_only=True)
class Conspo(Objective):
    """L = mean over groups of mean_i log( 1 + sum_j e^((s_j - s_i + margin) / tau) ).

    It is an InfoNCE loss within a group: i runs over a group's right answers, j over its wrong
    ones, and s = 1/|o| sum_t log pi(o_t) is the length-normalised log-likelihood. Groups of one
    class have no term but count in the mean.

    Deviations: only the paper's abstract and public summaries could be had, not its equations. The
    loss is what they describe; tau, the margin's place in the exponent and both defaults are ours,
    and the margin is constant where the paper raises it over training.
    """

    name: ClassVar[str] = "conspo"
    reach: ClassVar[Reach] = "group"
    free_first_minibatch: ClassVar[bool] = False
    """The scores are log-likelihoods: they are known after a forward pass only."""

    tau: Annotated[float, Positive] = 0.5
    """Temperature of the contrast: |d loss / d score| <= 1 / tau."""
    margin: Annotated[float, NonNegative] = 0.0
    """How far (nats a token) a right answer must lie above a wrong one to count as separated."""

    @property
    def weight_bound(self) -> float:
        """1 / tau: a wrong answer's share of each contrast is at most 1."""
        return 1 / self.tau

    def facts(self, table: RolloutTable) -> Facts:
        """Returns labels and groups; groups of one class do not learn."""
        import torch

        from megatron_real.objective.facts import make_facts, mean_over_samples
        from megatron_real.objective.real import training_rollouts
        from megatron_real.records import EXCLUDED

        label_R = torch.where(table.labelled_R, table.label_R, EXCLUDED)
        # A right answer is contrasted with wrong ones: groups of one class have nothing to
        # contrast. REAL judges that in the same way.
        learns_R, num_groups = training_rollouts(label_R, table.group_R)
        return make_facts(
            table,
            learns_R=learns_R,
            token_weight_R=mean_over_samples(table),
            regularises=self.regularises,
            denominator=num_groups,
        )

    def score_loss(self, score_R: Tensor, old_mean_R: Tensor, facts: Facts) -> Tensor:
        """Returns the contrast of these groups."""
        import torch.nn.functional as F

        from megatron_real.objective.grouping import group_table, masked_log_sum_exp
        from megatron_real.records import POSITIVE

        # The score is relative to pi_old; adding its mean gives the log-likelihood of the paper.
        # Values of rollouts that do not learn may be NaN and are replaced, not multiplied by 0.
        likelihood_R = (score_R + old_mean_R).where(facts.learns_R, 0.0)
        index_GM, filled_GM = group_table(facts.group_R, facts.learns_R)
        positive_GM = filled_GM & (facts.label_R[index_GM] == POSITIVE)
        negative_GM = filled_GM & ~positive_GM

        # Cells without a member hold rollout 0's likelihood: sums must be over one of the masks.
        likelihood_GM = likelihood_R[index_GM]
        distractors_G = masked_log_sum_exp(likelihood_GM / self.tau, negative_GM)
        z_GM = distractors_G.unsqueeze(1) + (self.margin - likelihood_GM) / self.tau
        # -logsigmoid(-z) is log(1 + e^z), which does not overflow.
        contrast_GM = -F.logsigmoid(-z_GM) * positive_GM
        # No division by 0: a group that learns has a right answer.
        return (contrast_GM.sum(1) / positive_GM.sum(1)).sum() / facts.denominator
