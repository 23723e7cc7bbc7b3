"""What an objective is: a loss in log-probs with a declared reach.

    L = sum over tokens of  token_loss(log pi, log pi_old, log pi_ref)     couples nothing
      + score_loss(s_1, ..., s_R)                                          couples rollouts

with the score s_k = mean over the response tokens of log pi - log pi_old. Its gradient is that of
the linear surrogate

    sum_t u_t * log pi_t + sum_k w_k * s_k

    u_t = d token_loss / d log pi_t      w_k = d score_loss / d s_k

with u and w held constant, in any order, packing and layout, because u_t depends on one token and
w_k on the few scalars that the reach names. The trainer (policy/train_step.py) knows no objective
by name: it asks for the reach, gathers the scores that this reach needs, and takes u and w from
here.

    reach       what a weight depends on               what the trainer gathers        passes
    token       the token's own log-probs              nothing                         1
    sequence    the score of the token's own rollout   the sum over context parallel   1
    group       the scores of the rollout's group      the group's scores              1 (cut: 2)
    minibatch   the scores of the whole minibatch      all scores                      2

An objective is a frozen dataclass: its fields are its settings, its methods the mathematics.
Everything that depends on labels, rewards and lengths alone (which rollouts train, advantages, the
denominators of all means) is computed once per minibatch by `facts`, before anything is packed. To
add one: a file beside this one, a line in registry.py and a row in the invariance matrix
(docs/objectives.md shows the difference that the last one made).

The modules of objectives import no torch, so that a configuration is checked without it.

Legend: R rollouts of a minibatch, K response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from megatron_real.bounds import NonNegative, ZeroIsOff

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_real.objective.facts import Facts, RolloutTable

Reach = Literal["token", "sequence", "group", "minibatch"]
"""What one term of a loss couples."""


@dataclass(frozen=True, kw_only=True)
class KlConfig:
    """A penalty on the divergence from another policy, added to the loss of any objective.

    Each response token of a labelled rollout adds coefficient * estimate, averaged as the objective
    averages its own tokens. With d = log pi - log pi_other, the estimators are k1 = d, k2 = d^2 / 2
    and k3 = e^-d - 1 + d (Schulman, http://joschu.net/blog/kl-approx.html); the gradient is that of
    the estimate.
    """

    to: Literal["none", "reference", "old"] = "none"
    """The other policy: `reference` is frozen, `old` the policy that generated the rollouts."""
    estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the divergence is estimated from the sampled token."""
    coefficient: Annotated[float, NonNegative] = 0.001
    """Weight of the penalty in the loss."""
    reference_path: str = ""
    """Directory of HF weights of the reference; empty: the weights that training starts from."""

    def __post_init__(self) -> None:
        if self.reference_path and self.to != "reference":
            raise ValueError(
                f"objective.kl.reference_path = {self.reference_path!r} has no effect with "
                f"objective.kl.to = {self.to}; set objective.kl.to=reference"
            )


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of all objectives. The fields here are settings of every one of them."""

    name: ClassVar[str]
    """The objective's name in the configuration."""
    reach: ClassVar[Reach]
    """What one term of the loss couples."""
    free_first_minibatch: ClassVar[bool] = True
    """Whether the weights at log pi = log pi_old follow from labels, rewards and lengths alone. The
    first minibatch after a rollout then needs no scores."""

    kl: KlConfig = field(default_factory=KlConfig)
    """Penalty on the divergence from the reference or the old policy."""
    entropy_bonus: Annotated[float, ZeroIsOff] = 0.0
    """Weight of the policy's entropy, averaged as the objective averages its tokens, subtracted
    from the loss."""

    @property
    def has_scores(self) -> bool:
        """Whether the loss has a part in the rollouts' scores."""
        return self.reach != "token"

    @property
    def gathers_scores(self) -> bool:
        """Whether a weight needs the scores of other rollouts than its own."""
        return self.reach in ("group", "minibatch")

    @property
    def weight_bound(self) -> float | None:
        """Bound of |d loss / d score| times the denominator, or None without such a bound."""
        return None

    @property
    def min_group_size(self) -> int:
        """Rollouts that a group needs for a gradient: 2, as a smaller group is of one class."""
        return 2

    @property
    def needs_reference(self) -> bool:
        """Whether the log-probs of a frozen reference policy are needed."""
        return self.kl.to == "reference" and self.kl.coefficient > 0

    @property
    def regularises(self) -> bool:
        """Whether every labelled rollout has a gradient, beside that of the objective itself."""
        return (self.kl.to != "none" and self.kl.coefficient > 0) or self.entropy_bonus > 0

    def facts(self, table: RolloutTable) -> Facts:
        """Returns all that follows from labels, rewards and lengths of one minibatch.

        Args:
            table: [R] every rollout of the minibatch, whole groups, whatever their labels.
        """
        raise NotImplementedError

    def token_loss(
        self, logprob_K: Tensor, old_logprob_K: Tensor, rollout_K: Tensor, facts: Facts
    ) -> Tensor:
        """Returns [K] the terms of the loss that couple nothing, divided by their denominators.

        Args:
            logprob_K: [K] log pi of response tokens, nats; differentiable.
            old_logprob_K: [K] log pi_old.
            rollout_K: [K] int64, the rollout of each token, as a position in `facts`.
            facts: of the minibatch; floating values in the dtype of `logprob_K`.
        """
        raise NotImplementedError

    def score_loss(self, score_R: Tensor, old_mean_R: Tensor, facts: Facts) -> Tensor:
        """Returns the scalar part of the loss in the rollouts' scores.

        Args:
            score_R: [R] mean over the response tokens of log pi - log pi_old, nats; differentiable.
            old_mean_R: [R] mean over the response tokens of log pi_old, nats.
            facts: of these rollouts: all of the minibatch, or what the reach couples as a whole.
        """
        raise NotImplementedError

    def score_weights(self, score_R: Tensor, old_mean_R: Tensor, facts: Facts) -> Tensor:
        """Returns [R] d score_loss / d score_R.

        By autograd, unless an objective has it in closed form.
        """
        import torch

        # The caller may be under no_grad, as the trainer is between its passes.
        with torch.enable_grad():
            # A leaf of its own: the graph ends at the scores and never reaches the model.
            leaf_R = score_R.detach().requires_grad_()
            loss = self.score_loss(leaf_R, old_mean_R, facts)
            (weight_R,) = torch.autograd.grad(loss, leaf_R)
        return weight_R
