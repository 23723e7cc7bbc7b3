"""One exact update of any objective on Megatron's schedules.

Scores -> gather -> weights -> backward.

A loss may couple all rollouts of a group, but Megatron hands the loss one micro-batch at a time.
What a token or a sequence needs of the others are a few scalars, the scores of the rollouts that
its objective's reach names (objective/objective.py), and with them the gradient of L is that of the
linear surrogate

    sum_t u_t * log pi_t + sum_k w_k * s_k    u, w: dL/dlog pi and dL/dscore, held constant

in any order, packing and layout. So an update of an objective in scores, such as REAL (Eq. 9, 10),
takes these passes:

    first minibatch after a rollout    s = 0 exactly, w is known from the    1 forward, 1 backward
                                       labels
    placement `intact` or `dp`         scores are gathered inside the loss   1 forward, 1 backward
    placement `split`                  a forward-only pass scores all, then  2 forward, 1 backward
                                       as above

and one whose reach is a token or its own sequence always takes one forward and one backward. The KL
penalty and the entropy bonus are terms of single tokens, and come with either.

The surrogate's gradients must be summed, never averaged: every denominator is in u and w.
policy/passes.py says how Megatron's own averaging is switched off.

Legend: R rollouts of the minibatch (of a micro-batch: its sequences), T tokens of a micro-batch on
this rank, K of them response tokens, N response tokens of the minibatch, S results by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_real.batching import Minibatch, Plan
from megatron_real.objective import Objective, sequence_scores
from megatron_real.objective.facts import Facts
from megatron_real.objective.functions import kl_penalty
from megatron_real.parallel.groups import ProcessGroups
from megatron_real.policy.microbatch import MicroBatch, to_device
from megatron_real.policy.passes import Outputs, Passes
from megatron_real.records import POSITIVE

_LOW_RATIO = 0.8
"""A token whose ratio to the old policy is below it has a low ratio.

It is where GRPO's default clip begins, and the same for every objective.
"""


@dataclass
class TokenStats:
    """Sums over response tokens, of the difference d between the trainer and the engine.

    d is the trainer's minus the engine's log-prob, both at the weights that generated.
    """

    sums: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64))
    """[5] sums of -log pi (its mean estimates the entropy), |d|, k3 = e^d - 1 - d (its mean: the
    KL), 1 where |d| is beyond the bound, and 1."""
    largest: float = 0.0
    """max |d| (nats)."""

    def means(self) -> dict[str, float]:
        """Returns the figures of the metrics; NaN when there were no tokens.

        entropy, mismatch_mean_abs, mismatch_k3 and mismatch_max_abs are in nats, mismatch_share is
        the share of the tokens beyond the bound.
        """
        entropy, mean_abs, k3, beyond, tokens = self.sums.tolist()
        # NaN and not 0: a mean of nothing is no figure, and trackers leave it out.
        scale = 1.0 / tokens if tokens else math.nan
        return {
            "entropy": entropy * scale,
            "mismatch_mean_abs": mean_abs * scale,
            "mismatch_k3": k3 * scale,
            "mismatch_share": beyond * scale,
            "mismatch_max_abs": self.largest,
        }


@dataclass
class TokenFigures:
    """What becomes TokenStats, while passes add to it.

    The figures stay on the device, so that no micro-batch is waited for.
    """

    sums: Tensor
    """[5] float64, as TokenStats has them."""
    largest: Tensor
    """[] float64 max |d| (nats)."""

    @classmethod
    def zeros(cls, device: torch.device) -> TokenFigures:
        """Returns the figures of no tokens."""
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        return cls(sums, torch.zeros((), dtype=torch.float64, device=device))

    def add(self, sums: Tensor, largest: Tensor) -> None:
        """Adds the figures of further tokens."""
        self.sums += sums
        torch.maximum(self.largest, largest, out=self.largest)


class Computed:
    """A tensor that a pass leaves behind.

    Reading it before a pass has computed it is a mistake in the order of the passes, and fails.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, results: PassResults, owner: type) -> Tensor:
        value: Tensor | None = vars(results).get(self._name)
        assert value is not None, f"no pass has computed {self._name} yet"
        return value

    def __set__(self, results: PassResults, value: Tensor) -> None:
        # In the instance's own dictionary, which a data descriptor hides: only this class reads it.
        vars(results)[self._name] = value


class PassResults:
    """What passes have computed of one micro-batch, on the last pipeline stage."""

    old_logprob_T = Computed()
    """[T] log-probs under the weights that generated the rollouts."""
    score_R = Computed()
    """[R] detached scores of its sequences."""
    old_mean_R = Computed()
    """[R] mean old log-prob of its sequences, where the objective asks for it."""
    weight_R = Computed()
    """[R] dL / dscore of its sequences."""
    log_ratio_T = Computed()
    """[T] log pi - log pi_old at the update (nats), where token figures are kept."""
    token_weight_T = Computed()
    """[T] dL / dlog pi, the entropy bonus aside, where token figures are kept."""

    def has(self, name: str) -> bool:
        """Returns whether a pass has computed the tensor of this name."""
        return name in vars(self)

    def forget(self, name: str) -> None:
        """Drops the tensor of this name, so that the next pass computes it anew."""
        vars(self).pop(name, None)


@dataclass
class Batch:
    """A minibatch on this rank: its plan, its micro-batches, and what passes computed of them."""

    minibatch: Minibatch
    """What is trained on."""
    plan: Plan
    """Which rank computes what."""
    micro_batches: tuple[MicroBatch, ...]
    """This rank's, in schedule order."""
    facts: Facts = field(init=False)
    """[R] what the objective knows of all rollouts of the minibatch, float64, on the host: what
    couples rollouts is computed there, of a few numbers that are read back once."""
    token_facts: Facts = field(init=False)
    """[R] the same on the device, for the terms of single tokens."""
    results: list[PassResults] = field(default_factory=list)
    """[micro-batches] what passes have computed of each."""
    has_old_logprobs: bool = False
    """Whether the old log-probs were computed; if not, the weights still are those that generated
    the rollouts."""
    tokens: TokenFigures = field(init=False)
    """Token-level figures of this rank's micro-batches, complete on the ranks that write
    log-probs."""
    has_token_weights: bool = False
    """Whether the update has left ratio and weight of every token in `results`; on all ranks
    alike."""

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return self.token_facts.label_R.device

    def __post_init__(self) -> None:
        def float64(values_R: Tensor) -> Tensor:
            return values_R.double() if values_R.is_floating_point() else values_R

        self.facts = self.minibatch.facts.map(float64)
        self.token_facts = self.facts.map(to_device)
        self.tokens = TokenFigures.zeros(self.device)
        self.results = [PassResults() for _ in self.micro_batches]


@dataclass(frozen=True)
class Gradient:
    """What the passes of an update found; the gradients are in the model's buffers."""

    loss: float
    """L of the minibatch (0 for a minibatch without groups)."""
    score_R: Tensor
    """[R] fp64 on the CPU, scores of the minibatch's rollouts; 0 for those not kept."""
    weight_R: Tensor
    """[R] fp64 on the CPU, dL / dscore: of an objective in tokens the sum of its tokens' weights; 0
    if not kept."""
    kl: float = 0.0
    """The KL estimate (nats), averaged as the objective averages tokens; 0 without a penalty."""
    clipped_low_share: float = 0.0
    """Share of the learning rollouts' tokens that a clip deprived of their gradient at a ratio
    below 1."""
    clipped_high_share: float = 0.0
    """The same at a ratio above 1."""
    low_ratio_tokens: tuple[int, int, int] = (0, 0, 0)
    """Response tokens with a ratio below 0.8, those of right answers among them, and all."""


@dataclass
class TokenSums:
    """Sums over this rank's response tokens in one training pass."""

    values: Tensor
    """[6] float64: the objective's own loss, the KL penalty, the entropy bonus, tokens clipped
    below and above ratio 1, and tokens that learn."""
    low_ratio: Tensor
    """[3] float64: tokens of a low ratio, those of right answers among them, and all tokens."""
    weight_R: Tensor
    """[R] float64: sum of the objective's own token weights."""


class TrainStep:
    """Runs the passes of an update over one model. Holds no state of its own between updates."""

    def __init__(
        self,
        passes: Passes,
        groups: ProcessGroups,
        objective: Objective,
        *,
        mismatch_bound: float,
        keep_token_weights: bool = False,
    ) -> None:
        """
        Args:
            passes: over this rank's part of the model.
            groups: this rank's place in the layout.
            objective: the loss.
            mismatch_bound: of |d| (nats), beyond which a token counts in mismatch_share.
            keep_token_weights: updates leave each token's ratio and weight in the batch's results.
        """
        self.passes = passes
        self.groups = groups
        self.objective = objective
        self.mismatch_bound = mismatch_bound
        self.keep_token_weights = keep_token_weights
        # REAL without a penalty has no term in single tokens, and pays for none.
        self._has_token_terms = not objective.has_scores or objective.regularises

    def old_logprobs(self, batch: Batch) -> None:
        """Keeps each token's log-prob under the present weights as the old one.

        It takes a forward pass. Collective.
        """
        self.passes.forward(
            batch.micro_batches, lambda i, outputs: self._keep_old(batch, i, outputs)
        )
        batch.has_old_logprobs = True

    def mismatch(self, batch: Batch) -> Tensor:
        """Returns [R] mean |d| (nats) of each rollout under the present weights, 0 if not kept.

        It takes a forward pass; every rank has the result. Collective.
        """

        def keep(index: int, outputs: Outputs) -> None:
            micro = batch.micro_batches[index]
            difference_T = (outputs.logprob_T.detach() - micro.engine_logprob_T).abs()
            means_R = self._means(micro, difference_T, torch.zeros_like(difference_T))
            batch.results[index].score_R = self._summed_over_cp(means_R)

        self.passes.forward(batch.micro_batches, keep)
        mean_R = torch.zeros_like(batch.token_facts.advantage_R)
        if self.groups.is_last_stage:
            everything = range(len(batch.results))
            mean_R, _ = self._gathered(batch, everything, self.groups.dp)
        return _from_last_stage(self.groups, mean_R).cpu()

    def gradient(self, batch: Batch) -> Gradient:
        """Adds the gradient of L over the minibatch to the model's gradient buffers.

        Their reduction is finished when it returns. Collective.
        """
        if self.objective.has_scores:
            self._prepare_weights(batch)

        sums = TokenSums(
            values=torch.zeros(6, dtype=torch.float64, device=batch.device),
            low_ratio=torch.zeros(3, dtype=torch.float64, device=batch.device),
            weight_R=torch.zeros_like(batch.token_facts.advantage_R),
        )

        def surrogate_of(index: int, outputs: Outputs) -> Tensor:
            surrogate = self._surrogate(batch, index, outputs, sums)
            if self.keep_token_weights:
                # The surrogate is linear in log-probs, so its gradient there is the weights. The
                # graph between the two is elementwise and knows nothing of the model.
                results = batch.results[index]
                (results.token_weight_T,) = torch.autograd.grad(
                    surrogate, outputs.logprob_T, retain_graph=True
                )
                results.log_ratio_T = outputs.logprob_T.detach() - results.old_logprob_T
            return surrogate

        self.passes.forward_backward(batch.micro_batches, surrogate_of)
        batch.has_token_weights = self.keep_token_weights

        # Loss, scores and weights on every rank: over DP on the last stage, from there over PP.
        num_rollouts = len(batch.facts.label_R)
        figures = torch.zeros(7 + 2 * num_rollouts, dtype=torch.float64)
        if self.groups.is_last_stage:
            figures = self._figures(batch, sums)
        if self.groups.pp.size() > 1:
            figures = _from_last_stage(self.groups, to_device(figures)).cpu()

        scalars, score_R, weight_R = torch.split(figures, [7, num_rollouts, num_rollouts])
        loss, kl, clipped_low, clipped_high, *counts = scalars.tolist()
        # Counts came as float64, which holds them exactly up to 2^53.
        low, low_positive, tokens = map(round, counts)
        return Gradient(
            loss, score_R, weight_R, kl, clipped_low, clipped_high, (low, low_positive, tokens)
        )

    def _prepare_weights(self, batch: Batch) -> None:
        """Sets every rollout's weight before the training pass where that can be.

        Where it cannot, the pass itself computes them, micro-batch by micro-batch.
        """
        objective = self.objective
        for results in batch.results:
            # An earlier pass over the same batch may have left its own.
            results.forget("weight_R")

        if not batch.has_old_logprobs and objective.free_first_minibatch:
            # On-policy every score is 0, exactly: the labels alone decide.
            zero_R = torch.zeros_like(batch.facts.advantage_R)
            weight_R = objective.score_weights(zero_R, zero_R, batch.facts)
        elif objective.gathers_scores and batch.plan.placement == "split":

            def keep_score(index: int, outputs: Outputs) -> None:
                results = batch.results[index]
                if not results.has("old_logprob_T"):
                    # No pass came before this one: the weights still are those that generated.
                    self._keep_old(batch, index, outputs)
                means_R = self._means(
                    batch.micro_batches[index], outputs.logprob_T, results.old_logprob_T
                )
                results.score_R = self._summed_over_cp(means_R)

            self.passes.forward(batch.micro_batches, keep_score)
            if not self.groups.is_last_stage:
                return
            everything = range(len(batch.results))
            weight_R = self._weights(
                batch, *self._scores_of(batch, everything, over=self.groups.dp)
            )
        else:
            return

        weight_R = to_device(weight_R)
        for micro, results in zip(batch.micro_batches, batch.results, strict=True):
            results.weight_R = weight_R[micro.position_R]

    def _surrogate(self, batch: Batch, index: int, outputs: Outputs, sums: TokenSums) -> Tensor:
        """Returns the micro-batch's part of the linear surrogate.

        The log-probs in it are differentiable, the weights are not.
        """
        micro = batch.micro_batches[index]
        results = batch.results[index]
        if not results.has("old_logprob_T"):
            # The weights are those that generated the rollouts.
            self._keep_old(batch, index, outputs)
        if not micro.positions:
            # Its log-probs are all 0 and carry the graph that the schedule needs.
            return outputs.logprob_T.sum()

        self._count_low_ratios(batch, index, outputs, sums)
        partial_score_R = self._means(micro, outputs.logprob_T, results.old_logprob_T)
        if not self.objective.has_scores:
            # Only a figure of the metrics: the context-parallel ranks' shares are summed with those
            # of DP.
            results.score_R = partial_score_R.detach()
            return self._token_surrogate(batch, index, outputs, sums)

        results.score_R = self._summed_over_cp(partial_score_R.detach())
        if not results.has("weight_R"):
            # From the scores of this micro-batch, or, for `dp`, of this index on all DP ranks. An
            # objective that couples nothing beyond a sequence never needs more than the former.
            over_dp = self.objective.gathers_scores and batch.plan.placement == "dp"
            scores = self._scores_of(batch, [index], over=self.groups.dp if over_dp else None)
            results.weight_R = to_device(self._weights(batch, *scores))[micro.position_R]

        # Each context-parallel rank's share of a score has the gradient of its own tokens.
        surrogate = (results.weight_R * partial_score_R).sum()
        if self._has_token_terms:
            surrogate = surrogate + self._token_surrogate(batch, index, outputs, sums)
        return surrogate

    def _token_surrogate(
        self, batch: Batch, index: int, outputs: Outputs, sums: TokenSums
    ) -> Tensor:
        """Returns sum_t u_t * log pi_t over the response tokens, minus the entropy bonus.

        The figures of these tokens are added to `sums`.
        """
        objective = self.objective
        micro = batch.micro_batches[index]
        kept_K = micro.kept_K
        rollout_K = micro.rollout_K
        logprob_K = outputs.logprob_T[kept_K]
        old_logprob_K = batch.results[index].old_logprob_T[kept_K]
        facts = batch.token_facts.to(device=logprob_K.device, dtype=logprob_K.dtype)

        # Weights by autograd in log-prob space: elementwise, and nothing beside the model's own
        # passes.
        leaf_K = logprob_K.detach().requires_grad_()
        weight_K = torch.zeros_like(leaf_K)
        with torch.enable_grad():
            if not objective.has_scores:
                # The objective's own weights apart from the penalty's: they are figures of the
                # metrics.
                own_loss = objective.token_loss(leaf_K, old_logprob_K, rollout_K, facts).sum()
                (own_weight_K,) = torch.autograd.grad(own_loss, leaf_K)
                weight_K = weight_K + own_weight_K
                sums.values[0] += own_loss.detach()
                sums.weight_R.index_add_(0, rollout_K, own_weight_K.double())
                sums.values[3:6] += _clipped(
                    own_weight_K == 0,
                    logprob_K.detach() - old_logprob_K,
                    facts.learns_R[rollout_K].double(),
                )

            reference_K = None
            if objective.needs_reference:
                assert micro.reference_logprob_T is not None, "policy/reference.py has been asked"
                reference_K = micro.reference_logprob_T[kept_K].to(logprob_K.dtype)
            penalty = kl_penalty(objective, leaf_K, old_logprob_K, reference_K, rollout_K, facts)
            # Without a penalty it is a plain 0, which autograd refuses to differentiate.
            if penalty.requires_grad:
                (penalty_weight_K,) = torch.autograd.grad(penalty, leaf_K)
                weight_K = weight_K + penalty_weight_K
                sums.values[1] += penalty.detach()

        surrogate = (weight_K * logprob_K).sum()
        if objective.entropy_bonus:
            # The head gives the exact gradient of an entropy: no surrogate is needed.
            assert outputs.entropy_T is not None, "the model was built to compute entropies"
            token_weight_K = objective.entropy_bonus * facts.token_weight_R[rollout_K]
            bonus = (token_weight_K * outputs.entropy_T[kept_K]).sum()
            sums.values[2] += bonus.detach()
            surrogate = surrogate - bonus
        return surrogate

    def _count_low_ratios(
        self, batch: Batch, index: int, outputs: Outputs, sums: TokenSums
    ) -> None:
        """Adds the micro-batch's tokens of a low ratio, of right answers and of all, to `sums`."""
        micro = batch.micro_batches[index]
        old_logprob_T = batch.results[index].old_logprob_T
        log_ratio_K = outputs.logprob_T.detach()[micro.kept_K] - old_logprob_T[micro.kept_K]
        low_K = log_ratio_K < math.log(_LOW_RATIO)
        positive_K = batch.token_facts.label_R[micro.rollout_K] == POSITIVE
        counted = [low_K, low_K & positive_K, torch.ones_like(low_K)]
        sums.low_ratio += torch.stack([tokens_K.sum() for tokens_K in counted])

    def _keep_old(self, batch: Batch, index: int, outputs: Outputs) -> None:
        """Keeps a micro-batch's log-probs as the old ones, and compares them with the engine's."""
        micro = batch.micro_batches[index]
        old_logprob_T = outputs.logprob_T.detach()
        batch.results[index].old_logprob_T = old_logprob_T
        if not micro.kept_K.numel():
            return

        # float64: the differences are small and the sums long.
        old_K = old_logprob_T[micro.kept_K].double()
        difference_K = old_K - micro.engine_logprob_T[micro.kept_K].double()
        terms = [
            -old_K,
            difference_K.abs(),
            # k3 of the KL from the engine; expm1 keeps the digits of a small difference.
            difference_K.expm1() - difference_K,
            (difference_K.abs() > self.mismatch_bound).double(),
            torch.ones_like(old_K),
        ]

        batch.tokens.add(torch.stack([term.sum() for term in terms]), difference_K.abs().max())

    def _means(self, micro: MicroBatch, value_T: Tensor, baseline_T: Tensor) -> Tensor:
        """Returns [R] this rank's share of the mean over tokens of value - baseline.

        A context-parallel rank's share is that of its own tokens.

        Log-probs are complete on each tensor-parallel rank, so nothing is summed over TP.
        """
        used = slice(0, micro.num_used)
        return sequence_scores(
            value_T[used],
            baseline_T[used],
            # The mean is over trained response tokens; prompt and padding have no target.
            mask=micro.target_T[used] >= 0,
            cu_seqlens=micro.cu_seqlens,
            num_tokens_R=micro.num_tokens_R,
        )

    def _summed_over_cp(self, partial_R: Tensor) -> Tensor:
        if self.groups.cp.size() > 1 and partial_R.numel():
            dist.all_reduce(partial_R, group=self.groups.cp)
        return partial_R

    def _scores_of(
        self, batch: Batch, indices: Sequence[int], *, over: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what some micro-batches know of the minibatch's rollouts.

        Args:
            batch: the minibatch.
            indices: of its micro-batches.
            over: the process group whose ranks bring theirs together; None for this rank alone.

        Returns:
            [R] float64 scores and mean old log-probs, 0 where they are not known; [R] bool: where
            they are. On the host, which waits for the device once.
        """
        # Objectives in ratios alone need no mean old log-prob, and send one row less.
        if self.objective.free_first_minibatch:
            score_R, present_R = self._gathered(batch, indices, over).cpu()
            return score_R, torch.zeros_like(score_R), present_R > 0

        for index in indices:
            micro = batch.micro_batches[index]
            results = batch.results[index]
            if micro.positions and not results.has("old_mean_R"):
                old_T = results.old_logprob_T
                means_R = self._means(micro, old_T, torch.zeros_like(old_T))
                results.old_mean_R = self._summed_over_cp(means_R)
        score_R, present_R, old_mean_R = self._gathered(batch, indices, over, "old_mean_R").cpu()
        return score_R, old_mean_R, present_R > 0

    def _gathered(
        self,
        batch: Batch,
        indices: Sequence[int],
        over: dist.ProcessGroup | None,
        *others: str,
    ) -> Tensor:
        """Brings results of some micro-batches to their rollouts' places in the minibatch.

        Args:
            batch: the minibatch.
            indices: of its micro-batches.
            over: the process group whose ranks' rows are summed; None for this rank's alone.
            *others: names of results beside the scores.

        Returns:
            [S, R] float64: the scores, 1 where there is one, and the others; 0 elsewhere.
        """
        advantage_R = batch.token_facts.advantage_R
        rows_SR = advantage_R.new_zeros(2 + len(others), len(advantage_R))
        for index in indices:
            micro = batch.micro_batches[index]
            results = batch.results[index]
            if not micro.positions:
                continue
            rows_SR[0, micro.position_R] = results.score_R.double()
            rows_SR[1, micro.position_R] = 1
            for row, name in enumerate(others, 2):
                rows_SR[row, micro.position_R] = getattr(results, name).double()

        # A rollout lies on one data-parallel rank only: the others add 0.
        if over is not None and over.size() > 1:
            dist.all_reduce(rows_SR, group=over)
        return rows_SR

    def _weights(
        self, batch: Batch, score_R: Tensor, old_mean_R: Tensor, present_R: Tensor
    ) -> Tensor:
        """Returns [R] dL / dscore of the present rollouts, 0 for the others.

        The groups of the present ones are present as a whole.
        """
        return self.objective.score_weights(score_R, old_mean_R, batch.facts.of(present_R))

    def _figures(self, batch: Batch, sums: TokenSums) -> Tensor:
        """Returns [7 + 2 R] the figures of an update on the last stage's ranks, on the host.

        They are loss, KL, shares clipped low and high, the three counts of low ratios, scores and
        weights.
        """
        objective = self.objective
        facts = batch.facts
        everything = range(len(batch.results))
        if self._has_token_terms and self.groups.dp_cp.size() > 1:
            # Tensor-parallel ranks have the same tokens; context-parallel ones each their part.
            dist.all_reduce(sums.values, group=self.groups.dp_cp)
            dist.all_reduce(sums.weight_R, group=self.groups.dp_cp)
        if self.groups.dp_cp.size() > 1:
            dist.all_reduce(sums.low_ratio, group=self.groups.dp_cp)
        values = sums.values.cpu()

        if objective.has_scores:
            # The loss itself, from all scores: the value of the surrogate is not that of the loss.
            score_R, old_mean_R, present_R = self._scores_of(batch, everything, over=self.groups.dp)
            loss = objective.score_loss(score_R, old_mean_R, facts)
            weight_R = self._weights(batch, score_R, old_mean_R, present_R)
            learning_R = facts.num_tokens_R * (facts.advantage_R != 0)
            clipped = _clipped(weight_R == 0, score_R, learning_R)
        else:
            # Here each context-parallel rank has its share of a score: see _surrogate.
            score_R, _, _ = self._scores_of(batch, everything, over=self.groups.dp_cp)
            loss = values[0]
            weight_R = sums.weight_R.cpu()
            clipped = values[3:6]

        penalty = values[1]
        bonus = values[2]
        kl = penalty
        if objective.kl.coefficient:
            # The estimate itself, which is comparable between runs of different coefficients.
            kl = penalty / objective.kl.coefficient

        shares = clipped[:2] / clipped[2].clamp(min=1)
        own_loss = (loss + penalty - bonus)[None]
        return torch.cat([own_loss, kl[None], shares, sums.low_ratio.cpu(), score_R, weight_R])


def gathered_tokens(groups: ProcessGroups, batch: Batch, values: Sequence[Tensor]) -> Tensor:
    """Brings values of single tokens together on every rank. Collective.

    Args:
        groups: this rank's place in the layout.
        batch: [micro-batches] whose tokens they are.
        values: [micro-batches] of [T] each; empty on all stages but the last.

    Returns:
        [N] float64 on the CPU, of the response tokens of the minibatch's rollouts in order; 0 for
        rollouts not kept.
    """
    value_N = torch.zeros(
        batch.minibatch.num_response_tokens,
        dtype=torch.float64,
        device=batch.device,
    )
    if groups.is_last_stage:
        for micro, value_T in zip(batch.micro_batches, values, strict=True):
            value_N[micro.index_T[micro.kept_K]] = value_T[micro.kept_K].double()
        # A token lies on one data- and context-parallel rank only: the others add 0.
        dist.all_reduce(value_N, group=groups.dp_cp)
    return _from_last_stage(groups, value_N).cpu()


def values_of_replica(
    groups: ProcessGroups, batch: Batch, values: Sequence[Tensor]
) -> dict[int, NDArray[Any]]:
    """Brings values of single tokens together within a data-parallel replica.

    Collective on its last pipeline stage.

    Args:
        groups: this rank's place in the layout, on the last stage.
        batch: [micro-batches] whose tokens they are.
        values: [micro-batches] of [T] each.

    Returns:
        By position in the minibatch, for the rollouts that this replica computes: [n] float64 of
        all tokens of the completion, 0 where a token is not trained.
    """
    # index_T counts over the whole minibatch; minus its rollout's first it is the place in the
    # rollout.
    lengths_R = torch.tensor([r.completion.num_tokens for r in batch.minibatch.rollouts])
    first_R = to_device(lengths_R.cumsum(0) - lengths_R)
    by_position: dict[int, NDArray[Any]] = {}
    for micro, value_T in zip(batch.micro_batches, values, strict=True):
        if not micro.positions:
            continue

        # The micro-batch's rollouts in a row: tokens move from their places in the minibatch to
        # those in the row.
        lengths = [int(lengths_R[position]) for position in micro.positions]
        start_R = torch.zeros_like(first_R)
        start_R[micro.position_R] = to_device(torch.tensor([0, *lengths]).cumsum(0)[:-1])
        index_K = micro.index_T[micro.kept_K] - first_R[micro.rollout_K] + start_R[micro.rollout_K]
        value_N = torch.zeros(sum(lengths), dtype=torch.float64, device=batch.device)
        value_N[index_K] = value_T[micro.kept_K].double()
        if groups.cp.size() > 1:
            # Each context-parallel rank has a part of each sequence.
            dist.all_reduce(value_N, group=groups.cp)

        parts = value_N.cpu().split(lengths)
        for position, part in zip(micro.positions, parts, strict=True):
            by_position[position] = part.numpy()
    return by_position


def _from_last_stage(groups: ProcessGroups, values: Tensor) -> Tensor:
    """Overwrites `values` on every pipeline stage with those of the last one."""
    if groups.pp.size() > 1:
        last = dist.get_global_rank(groups.pp, groups.pp.size() - 1)
        dist.broadcast(values, src=last, group=groups.pp)
    return values


def _clipped(no_gradient: Tensor, log_ratio: Tensor, count: Tensor) -> Tensor:
    """Counts what a clip has deprived of its gradient, below and above ratio 1, and all that learn.

    Args:
        no_gradient: [n] bool, the weight is exactly 0.
        log_ratio: [n] log pi - log pi_old, nats.
        count: [n] float64, tokens that each stands for; 0 where nothing is learned anyway.

    Returns:
        [3] float64.
    """
    low = (count * (no_gradient & (log_ratio < 0))).sum()
    high = (count * (no_gradient & (log_ratio > 0))).sum()
    return torch.stack([low, high, count.sum()]).double()
