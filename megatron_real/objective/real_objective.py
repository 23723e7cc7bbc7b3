"""REAL as an objective of the trainer: settings around the closed forms of real.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from megatron_real.bounds import Positive
from megatron_real.objective.objective import Objective, Reach

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_real.objective.facts import Facts, RolloutTable


@dataclass(frozen=True, kw_only=True)
class Real(Objective):
    """REAL, rewards as labels (arXiv:2602.05630), with the variants of its ablations.

    anchored (Eq. 8), vanilla (Eq. 2) and bce (Eq. 11) are losses of a group's scores; real.py has
    the equations, the closed-form weights and the deviations. They use labels, not rewards.

    A penalty on the KL is averaged over the tokens of a rollout, the rollouts of a group and the
    groups.
    """

    name: ClassVar[str] = "real"
    reach: ClassVar[Reach] = "group"

    variant: Literal["anchored", "vanilla", "bce"] = "anchored"
    """`anchored` is REAL (Eq. 8), `vanilla` Eq. 2, `bce` Eq. 11."""
    tau: Annotated[float, Positive] = 0.5
    """Temperature of the classification loss: |d loss / d score| <= 1 / tau."""
    one_class_groups: Literal["skip", "keep"] = "skip"
    """Groups of a single label: `skip` gives no loss but counts in the denominator, `keep` is Eq. 8
    as printed."""
    bce_reduction: Literal["group_sum", "mean"] = "group_sum"
    """`bce` alone: `group_sum` sums over a group and averages over groups (Eq. 11), `mean` averages
    over all training rollouts of the minibatch, as the authors' code does."""

    def __post_init__(self) -> None:
        if self.bce_reduction != "group_sum" and self.variant != "bce":
            raise ValueError(
                f"objective.bce_reduction = {self.bce_reduction} has no effect with "
                f"objective.variant = {self.variant}; set objective.variant=bce"
            )

    @property
    def min_group_size(self) -> int:
        """Rollouts that a group needs for a gradient.

        With `keep`, Eq. 8 and 11 have a term for each class by itself; Eq. 2 has their product
        alone.
        """
        if self.one_class_groups == "keep" and self.variant != "vanilla":
            return 1
        return 2

    @property
    def weight_bound(self) -> float:
        """1 / tau (Eq. 9 and 10)."""
        return 1 / self.tau

    def facts(self, table: RolloutTable) -> Facts:
        """Returns labels and groups of those that train, and N: groups with a labelled rollout."""
        import torch

        from megatron_real.objective.facts import make_facts, mean_over_samples
        from megatron_real.objective.real import training_rollouts
        from megatron_real.records import EXCLUDED

        # An empty response has a label but no log-prob: it counts as excluded.
        label_R = torch.where(table.labelled_R, table.label_R, EXCLUDED)
        learns_R, num_groups = training_rollouts(
            label_R,
            table.group_R,
            variant=self.variant,
            one_class_groups=self.one_class_groups,
        )

        denominator = num_groups
        # Eq. 11 averages over groups, the authors' code over the rollouts that train.
        if self.bce_reduction == "mean":
            denominator = int(learns_R.sum())

        return make_facts(
            table,
            learns_R=learns_R,
            token_weight_R=mean_over_samples(table),
            regularises=self.regularises,
            denominator=denominator,
        )

    def score_loss(self, score_R: Tensor, old_mean_R: Tensor, facts: Facts) -> Tensor:
        """Returns Eq. 8, 2 or 11."""
        from megatron_real.objective.real import real_loss

        return real_loss(
            score_R,
            facts.label_R,
            facts.group_R,
            tau=self.tau,
            variant=self.variant,
            one_class_groups=self.one_class_groups,
            num_groups=int(facts.denominator),
        )

    def score_weights(self, score_R: Tensor, old_mean_R: Tensor, facts: Facts) -> Tensor:
        """Returns Eq. 9 and 10, or their likes of the variants."""
        from megatron_real.objective.real import real_weights

        return real_weights(
            score_R,
            facts.label_R,
            facts.group_R,
            tau=self.tau,
            variant=self.variant,
            one_class_groups=self.one_class_groups,
            num_groups=int(facts.denominator),
        )
