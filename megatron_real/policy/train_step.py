"""One exact update of REAL on Megatron's schedules: scores -> gather -> weights -> backward.

REAL's loss couples all rollouts of a group, but Megatron hands the loss one micro-batch at a time. Every sequence needs
one scalar of the others, w_k = dL/ds_k (Eq. 9, 10), and with it the gradient of L is that of the linear surrogate
sum_k w_k * s_k, in any order, packing and layout. So an update is

    first minibatch after a rollout     s = 0 exactly, w is known from the labels            1 forward, 1 backward
    placement `intact` or `dp`          scores are gathered inside the loss                  1 forward, 1 backward
    placement `split`                   a forward-only pass scores all, then as above        2 forward, 1 backward

The surrogate's gradients must be summed, never averaged: the denominator N is in w. Megatron averages in three places,
and one switch, calculate_per_token_loss=True with a loss of three values whose token count is 0, turns all of them off
(checked in megatron-core 0.16.1 and 0.19.2):
    pipeline_parallel/schedules.py forward_step_calc_loss: no division by the token count or the number of
        micro-batches, no multiplication by the context-parallel size;
    distributed/distributed_data_parallel.py: gradient_scaling_factor = 1, gradients are summed over DP and CP;
    distributed/finalize_model_grads.py: scales only `if num_tokens > 0`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_real.batching import Minibatch, Plan
from megatron_real.config import ObjectiveConfig
from megatron_real.objective import real_loss, real_weights, sequence_scores
from megatron_real.policy.layout import Groups
from megatron_real.policy.microbatch import MicroBatch
from megatron_real.records import EXCLUDED

LossFunction = Callable[[MicroBatch, Tensor], Tensor]
"""(micro-batch, its log-probs [T]) -> scalar to be differentiated."""


@dataclass
class TokenStats:
    """Sums over response tokens, of d = the trainer's minus the engine's log-prob at the weights that generated."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(5, dtype=torch.float64))
    """[5] sums of -log pi (its mean estimates the entropy), |d|, k3 = e^d - 1 - d (its mean: the KL), 1 where |d| is
    beyond the bound, and 1."""
    largest: float = 0.0
    """max |d| (nats)."""

    def means(self) -> dict[str, float]:
        """entropy, mismatch_mean_abs, mismatch_k3 and mismatch_max_abs (nats), and mismatch_share of the tokens beyond
        the bound; NaN when there were no tokens."""
        entropy, mean_abs, k3, beyond, tokens = self.sums.tolist()
        scale = 1.0 / tokens if tokens else math.nan
        return {
            "entropy": entropy * scale,
            "mismatch_mean_abs": mean_abs * scale,
            "mismatch_k3": k3 * scale,
            "mismatch_share": beyond * scale,
            "mismatch_max_abs": self.largest,
        }


@dataclass
class Batch:
    """A minibatch on this rank: its plan, its micro-batches, and the minibatch-wide vectors of the loss."""

    minibatch: Minibatch
    """What is trained on."""
    plan: Plan
    """Which rank computes what."""
    micro_batches: list[MicroBatch]
    """This rank's, in schedule order."""
    label_R: Tensor
    """[R] labels of all rollouts of the minibatch; those not kept count as excluded."""
    group_R: Tensor
    """[R] group of each rollout."""
    has_old_logprobs: bool = False
    """The old log-probs were computed; if not, the weights still are those that generated the rollouts."""
    tokens: TokenStats = field(default_factory=lambda: TokenStats())
    """Token-level figures of this rank's micro-batches, complete on the ranks that write log-probs."""


@dataclass(frozen=True)
class Gradient:
    """What the passes of an update found; the gradients are in the model's buffers."""

    loss: float
    """L of the minibatch (0 for a minibatch without groups)."""
    score_R: Tensor
    """[R] fp64 on the CPU, scores of the minibatch's rollouts; 0 for those not kept."""
    weight_R: Tensor
    """[R] fp64 on the CPU, dL / dscore; 0 for those not kept."""


class TrainStep:
    """Runs the passes of an update over one model. Holds no state of its own between updates."""

    def __init__(
        self, chunks: Sequence[nn.Module], groups: Groups, objective: ObjectiveConfig, *, mismatch_bound: float
    ) -> None:
        """`mismatch_bound`: of |d| (nats), beyond which a token counts in mismatch_share."""
        self.chunks, self.groups, self.objective = list(chunks), groups, objective
        self.mismatch_bound = mismatch_bound

    def old_logprobs(self, batch: Batch) -> None:
        """Forward pass that keeps each token's log-prob under the present weights as the old one."""

        def keep(micro: MicroBatch, logprob_T: Tensor) -> Tensor:
            micro.old_logprob_T = logprob_T.detach()
            self._compare_with_engine(batch, micro)
            return logprob_T.sum()

        self._run(batch.micro_batches, keep, forward_only=True)
        batch.has_old_logprobs = True

    def mismatch(self, batch: Batch) -> Tensor:
        """[R] on every rank: mean |d| (nats) of each rollout under the present weights, 0 if not kept."""

        def keep(micro: MicroBatch, logprob_T: Tensor) -> Tensor:
            difference_T = (logprob_T.detach() - micro.engine_logprob_T).abs()
            micro.score_R = self._summed_over_cp(self._means(micro, difference_T, torch.zeros_like(difference_T)))
            return logprob_T.sum()

        self._run(batch.micro_batches, keep, forward_only=True)
        mean_R = torch.zeros(len(batch.label_R), dtype=torch.float64, device=batch.label_R.device)
        if self.groups.is_last_stage:
            mean_R, _ = self._scores_of(batch, batch.micro_batches, over_dp=True)
        return self._from_last_stage(mean_R).cpu()

    def gradient(self, batch: Batch) -> Gradient:
        """Adds the gradient of L over the minibatch to the model's gradient buffers and finishes their reduction."""
        if not batch.has_old_logprobs:
            at_zero_R = torch.zeros_like(batch.label_R, dtype=torch.float64)
            self._set_weights(batch, self._weights(batch, at_zero_R, batch.label_R != EXCLUDED))
        elif batch.plan.placement == "split":
            self._run(batch.micro_batches, self._keep_score, forward_only=True)
            if self.groups.is_last_stage:
                score_R, present_R = self._scores_of(batch, batch.micro_batches, over_dp=True)
                self._set_weights(batch, self._weights(batch, score_R, present_R))
        else:
            for micro in batch.micro_batches:
                micro.weight_R = None  # the pass below gathers the scores itself, also when it runs on a batch again
        self._run(batch.micro_batches, partial(self._surrogate, batch), forward_only=False)
        return self._summary(batch)

    def _surrogate(self, batch: Batch, micro: MicroBatch, logprob_T: Tensor) -> Tensor:
        """sum_k w_k * s_k over the micro-batch's sequences, s_k differentiable, w_k not."""
        if micro.old_logprob_T is None:  # the weights are those that generated the rollouts
            micro.old_logprob_T = logprob_T.detach()
            self._compare_with_engine(batch, micro)
        partial_score_R = self._partial_scores(micro, logprob_T)
        micro.score_R = self._summed_over_cp(partial_score_R.detach())
        if micro.weight_R is None:
            self._weigh_in_scope(batch, micro)
        assert micro.weight_R is not None, "weights are set before this pass or by it"
        # An empty micro-batch has no score; its log-probs are all 0 and carry the graph that the schedule needs.
        return (micro.weight_R * partial_score_R).sum() if micro.positions else logprob_T.sum()

    def _keep_score(self, micro: MicroBatch, logprob_T: Tensor) -> Tensor:
        micro.score_R = self._summed_over_cp(self._partial_scores(micro, logprob_T))
        return logprob_T.sum()

    def _weigh_in_scope(self, batch: Batch, micro: MicroBatch) -> None:
        """Weights from the scores of this micro-batch (`intact`) or of this index on all DP ranks (`dp`)."""
        score_R, present_R = self._scores_of(batch, [micro], over_dp=batch.plan.placement == "dp")
        micro.weight_R = self._weights(batch, score_R, present_R)[list(micro.positions)]

    def _partial_scores(self, micro: MicroBatch, logprob_T: Tensor) -> Tensor:
        """[R] this context-parallel rank's share of each score; log-probs are complete on each tensor-parallel rank."""
        assert micro.old_logprob_T is not None, "scores need the old log-probs"
        return self._means(micro, logprob_T, micro.old_logprob_T)

    def _means(self, micro: MicroBatch, one_T: Tensor, other_T: Tensor) -> Tensor:
        """[R] this context-parallel rank's share of the mean over response tokens of one - other."""
        used = slice(0, micro.num_used)
        return sequence_scores(
            one_T[used],
            other_T[used],
            mask=micro.target_T[used] >= 0,
            cu_seqlens=micro.cu_seqlens,
            num_tokens_R=micro.num_tokens_R,
        )

    def _summed_over_cp(self, partial_R: Tensor) -> Tensor:
        if self.groups.cp.size() > 1 and partial_R.numel():
            dist.all_reduce(partial_R, group=self.groups.cp)
        return partial_R

    def _scores_of(self, batch: Batch, micros: Sequence[MicroBatch], *, over_dp: bool) -> tuple[Tensor, Tensor]:
        """[R] scores of the minibatch's rollouts as far as `micros` have them, and [R] bool: which they have."""
        both_2R = torch.zeros(2, len(batch.label_R), dtype=torch.float64, device=batch.label_R.device)
        for micro in micros:
            assert micro.score_R is not None, "the pass has scored its micro-batches"
            both_2R[0, list(micro.positions)] = micro.score_R.double()
            both_2R[1, list(micro.positions)] = 1
        if over_dp and self.groups.dp.size() > 1:
            dist.all_reduce(both_2R, group=self.groups.dp)
        return both_2R[0], both_2R[1] > 0

    def _weights(self, batch: Batch, score_R: Tensor, present_R: Tensor) -> Tensor:
        """[R] dL / dscore of the present rollouts, whose groups are present as a whole; 0 for the others."""
        return real_weights(
            score_R, torch.where(present_R, batch.label_R, EXCLUDED), batch.group_R, **self._terms(batch)
        )

    def _terms(self, batch: Batch) -> dict[str, Any]:
        terms = {"tau": self.objective.tau, "variant": self.objective.variant}
        one_class = self.objective.one_class_groups
        return {**terms, "one_class_groups": one_class, "num_groups": max(batch.minibatch.num_groups, 1)}

    def _set_weights(self, batch: Batch, weight_R: Tensor) -> None:
        for micro in batch.micro_batches:
            micro.weight_R = weight_R[list(micro.positions)]

    def _compare_with_engine(self, batch: Batch, micro: MicroBatch) -> None:
        """Adds the micro-batch's tokens to the entropy and the train/engine mismatch."""
        assert micro.old_logprob_T is not None, "called when the old log-probs are known"
        chosen = micro.target_T >= 0
        old, engine = micro.old_logprob_T[chosen].double(), micro.engine_logprob_T[chosen].double()
        difference = old - engine
        if difference.numel():
            terms = [-old, difference.abs(), difference.expm1() - difference, difference.abs() > self.mismatch_bound]
            batch.tokens.sums += torch.stack([term.double().sum() for term in [*terms, torch.ones_like(old)]]).cpu()
            batch.tokens.largest = max(batch.tokens.largest, float(difference.abs().max()))

    def _summary(self, batch: Batch) -> Gradient:
        """Makes loss, scores and weights known on every rank: over DP on the last stage, then from there over PP."""
        num_rollouts = len(batch.label_R)
        told = torch.zeros(1 + 2 * num_rollouts, dtype=torch.float64, device=batch.label_R.device)
        if self.groups.is_last_stage:
            score_R, present_R = self._scores_of(batch, batch.micro_batches, over_dp=True)
            told[0] = real_loss(score_R, batch.label_R, batch.group_R, **self._terms(batch))
            told[1:] = torch.cat([score_R, self._weights(batch, score_R, present_R)])
        loss, score_R, weight_R = torch.split(self._from_last_stage(told).cpu(), [1, num_rollouts, num_rollouts])
        return Gradient(float(loss), score_R, weight_R)

    def _from_last_stage(self, told: Tensor) -> Tensor:
        """The last pipeline stage's values, in place on every stage."""
        if self.groups.pp.size() > 1:
            last = dist.get_global_rank(self.groups.pp, self.groups.pp.size() - 1)
            dist.broadcast(told, src=last, group=self.groups.pp)
        return told

    def _run(self, micros: Sequence[MicroBatch], loss: LossFunction, *, forward_only: bool) -> None:
        """One pass of Megatron's schedule over the micro-batches."""

        def forward_step(iterator: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Callable[[Tensor], Any]]:
            micro = next(iterator)
            return model(micro.tokens_T, micro.target_T, micro.packed), partial(summed, micro)

        def summed(micro: MicroBatch, logprob_T: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            no_averaging = torch.zeros((), dtype=torch.int, device=logprob_T.device)  # the module's docstring says why
            return loss(micro, logprob_T), no_averaging, {}

        iterators = [iter(micros) for _ in self.chunks]
        # forward_only alone leaves autograd on: every micro-batch's activations would live as long as its score.
        with torch.set_grad_enabled(not forward_only):
            get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iterators if len(self.chunks) > 1 else iterators[0],
                model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
                num_microbatches=len(micros),
                seq_length=micros[0].tokens_T.numel(),
                micro_batch_size=1,
                forward_only=forward_only,
            )
