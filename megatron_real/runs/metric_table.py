"""Every metric of a run: what it is, its unit, how it is reduced, and its group in trackers.

docs/metrics.md is made of this table (`python tools/reference.py`), and trackers (TensorBoard, W&B)
name metrics by it. metrics.jsonl has the plain names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric, or a family of them."""

    name: str
    """Its name in metrics.jsonl or evaluations.jsonl; capitals stand for what varies, as in
    `seconds/STAGE`."""
    tracked: str
    """Its name in TensorBoard and W&B, group first."""
    unit: str
    """What one means."""
    reduction: str
    """How one number comes of a step."""
    meaning: str
    """One sentence."""

    def pattern(self) -> re.Pattern[str]:
        """Returns what matches the names in the files; what varies is a named group."""
        # Letters need no escaping, so the capitals are still there to be replaced.
        escaped = re.sub(r"[A-Z]+", lambda part: f"(?P<{part[0]}>.+)", re.escape(self.name))
        return re.compile(escaped)


_LABELLED = "mean over labelled rollouts"
_GROUPS = "share of the groups with a labelled rollout"
_TOKENS = "mean over the response tokens that were trained on"
_UPDATES = "mean over the updates of the step"
_SCORED = "over the rollouts that had a weight"

# Each entry: its names in the files and in trackers; its unit and its reduction; its meaning.
METRICS = (
    # Rewards and labels.
    Metric(
        "reward_mean", "reward/mean",
        "reward", _LABELLED,
        "The verifier's reward; with rewards of 0 and 1, the share of right answers.",
    ),
    Metric(
        "solved_share", "reward/solved_share",
        "share", _GROUPS,
        "Groups whose labelled rollouts are all right.",
    ),
    Metric(
        "one_class_share", "reward/one_class_share",
        "share", _GROUPS,
        "Groups of a single label, solved ones among them.",
    ),
    Metric(
        "excluded_share", "reward/excluded_share",
        "share", "of all rollouts",
        "Rollouts without a label: failed checks, filters, empty responses.",
    ),

    # The objective and the updates.
    Metric(
        "loss", "objective/loss",
        "objective", _UPDATES,
        "The objective of the minibatch; updates that were skipped are left out.",
    ),
    Metric(
        "grad_norm", "objective/grad_norm",
        "norm", _UPDATES,
        "Norm of the gradient before clipping.",
    ),
    Metric(
        "lr", "objective/lr",
        "rate", "of the last update",
        "Learning rate.",
    ),
    Metric(
        "max_abs_weight_tau", "objective/max_abs_weight_tau",
        "at most 1", "maximum over the step",
        "The largest |weight| of a rollout, times tau and the minibatch's groups: 1 is the bound "
        "of the paper's Equations 9 and 10.",
    ),
    Metric(
        "score_positive_mean", "objective/score_positive_mean",
        "nats per token", f"mean {_SCORED}",
        "Score of right answers: mean log-ratio of the policy to the one that generated.",
    ),
    Metric(
        "score_positive_p5", "objective/score_positive_p5",
        "nats per token", f"5th percentile {_SCORED}",
        "The same, low end.",
    ),
    Metric(
        "score_positive_p95", "objective/score_positive_p95",
        "nats per token", f"95th percentile {_SCORED}",
        "The same, high end.",
    ),
    Metric(
        "score_negative_mean", "objective/score_negative_mean",
        "nats per token", f"mean {_SCORED}",
        "Score of wrong answers.",
    ),
    Metric(
        "score_negative_p5", "objective/score_negative_p5",
        "nats per token", f"5th percentile {_SCORED}",
        "The same, low end.",
    ),
    Metric(
        "score_negative_p95", "objective/score_negative_p95",
        "nats per token", f"95th percentile {_SCORED}",
        "The same, high end.",
    ),
    Metric(
        "entropy", "objective/entropy",
        "nats per token", _TOKENS,
        "Mean of -log pi of the sampled tokens: a Monte Carlo estimate of the entropy.",
    ),
    Metric(
        "kl", "objective/kl",
        "nats", _UPDATES,
        "KL estimate of the penalty; 0 without one.",
    ),
    Metric(
        "clipped_low_share", "objective/clipped_low_share",
        "share", _UPDATES,
        "Learning tokens that a clip deprived of their gradient at a ratio below 1.",
    ),
    Metric(
        "clipped_high_share", "objective/clipped_high_share",
        "share", _UPDATES,
        "The same at a ratio above 1.",
    ),
    Metric(
        "low_ratio_share", "objective/low_ratio_share",
        "share", "sums over the step",
        "Response tokens whose ratio to the policy that generated them was below 0.8 when they "
        "were trained on.",
    ),
    Metric(
        "low_ratio_positive_share", "objective/low_ratio_positive_share",
        "share", "sums over the step",
        "Those of right answers among these: hard positive tokens.",
    ),
    Metric(
        "equal_groups", "objective/equal_groups",
        "groups", "count over the step",
        "Groups whose rewards are all equal, which have no advantage.",
    ),
    Metric(
        "skipped_updates", "objective/skipped_updates",
        "updates", "count over the step",
        "Updates that were skipped for a loss or gradient that was not finite.",
    ),

    # Rollouts, and the engines that generate them.
    Metric(
        "lag", "rollout/lag",
        "steps", "of the step",
        "Steps between the weights that generated and those that train.",
    ),
    Metric(
        "refilled_share", "rollout/refilled_share",
        "share", "of all groups",
        "Groups whose prompt stands in for one or more that taught nothing "
        "(rollout.refill_rounds).",
    ),
    Metric(
        "truncated_share", "rollout/truncated_share",
        "share", "of the rollouts that no engine lost",
        "Responses that reached their limit without an end.",
    ),
    Metric(
        "response_tokens_mean", "rollout/response_tokens_mean",
        "tokens", "mean over the rollouts that no engine lost",
        "Length of a response.",
    ),
    Metric(
        "response_tokens_max", "rollout/response_tokens_max",
        "tokens", "maximum",
        "Length of the longest response.",
    ),
    Metric(
        "checked_early_share", "rollout/checked_early_share",
        "share", "of the rollouts that a verifier saw",
        "Checks that were over before their rank had finished generating.",
    ),
    Metric(
        "check_seconds_max", "rollout/check_seconds_max",
        "s", "maximum",
        "The longest check of a verifier.",
    ),
    Metric(
        "status/NAME", "rollout/status/NAME",
        "rollouts", "count over the step",
        "Rollouts that ended with this status (docs/labels.md).",
    ),
    Metric(
        "engine/seconds_mean", "rollout/engine/seconds_mean",
        "s", "mean over the engines",
        "Time in which an engine generated in the step, repeated draws among it.",
    ),
    Metric(
        "engine/seconds_max", "rollout/engine/seconds_max",
        "s", "maximum over the engines",
        "The same of the slowest engine, which the others wait for.",
    ),
    Metric(
        "engine/slowest", "rollout/engine/slowest",
        "number", "of the step",
        "Which engine that is, from 0 in the order of the ranks.",
    ),
    Metric(
        "engine/tokens_mean", "rollout/engine/tokens_mean",
        "tokens", "mean over the engines",
        "Response tokens of an engine.",
    ),
    Metric(
        "engine/tokens_slowest", "rollout/engine/tokens_slowest",
        "tokens", "of the slowest engine",
        "Its response tokens: many are long answers, few an engine that is ill.",
    ),
    Metric(
        "engine/tokens_per_second_mean", "rollout/engine/tokens_per_second_mean",
        "tokens/s", "sums over the engines",
        "Response tokens of all engines over the seconds of all.",
    ),
    Metric(
        "engine/tokens_per_second_min", "rollout/engine/tokens_per_second_min",
        "tokens/s", "minimum over the engines that had tokens",
        "The lowest rate of an engine.",
    ),
    Metric(
        "engine/taken_over", "rollout/engine/taken_over",
        "completions", "sum over the engines",
        "Completions that waited for an engine and that another one, which had room, has drawn.",
    ),

    # Trainer against engine: the same weights, two programs.
    Metric(
        "mismatch_mean_abs", "mismatch/mean_abs",
        "nats per token", _TOKENS,
        "|log-prob of the trainer - of the engine|.",
    ),
    Metric(
        "mismatch_k3", "mismatch/k3",
        "nats per token", _TOKENS,
        "The k3 estimate of the KL divergence between engine and trainer.",
    ),
    Metric(
        "mismatch_share", "mismatch/share",
        "share", "of the response tokens that were trained on",
        "Tokens whose ratio of trainer to engine is far from 1 (docs/rollouts.md).",
    ),
    Metric(
        "mismatch_max_abs", "mismatch/max_abs",
        "nats", "maximum",
        "The largest difference at a token.",
    ),

    # Seconds. The evaluation's entry comes first, since seconds/STAGE matches its name as well.
    Metric(
        "seconds/evaluation", "time/evaluation",
        "s", "of the first rank",
        "Time of an evaluation.",
    ),
    Metric(
        "seconds/STAGE", "time/STAGE",
        "s", "sum over the step, of the first rank",
        "Time in a stage: sync, rollout, label, mismatch, write, old_logprobs, reference, update; "
        "report, seam, evaluation and checkpoint, which come after a row was written, are in the "
        "next one.",
    ),
    Metric(
        "rank_seconds/STAGE", "time/ranks/STAGE",
        "s", "min, mean, max over the ranks",
        "The same over all ranks; `_slowest` is the number of the rank with the maximum.",
    ),

    # Speed and memory.
    Metric(
        "tokens_per_second_per_rank", "system/tokens_per_second_per_rank",
        "tokens/s", "sums over the step",
        "Prompt and response tokens that were trained on, over the time of training on all ranks; "
        "rollouts aside.",
    ),
    Metric(
        "tflops_per_rank", "system/tflops_per_rank",
        "TFLOP/s", "sums over the step",
        "Model FLOPs of training, over the same time: recomputation and scoring passes lower it.",
    ),
    Metric(
        "mfu", "system/mfu",
        "share", "sums over the step",
        "tflops_per_rank over the device's peak; only where that is known.",
    ),
    Metric(
        "memory/KIND", "system/memory/KIND",
        "GiB", "min, mean, max over the ranks",
        "Host memory of the ranks: resident pages, and what CUDA has locked; `_largest` is the "
        "number of the rank with the maximum.",
    ),

    # Held-out problems. FIGURE matches the names of the first two as well, and so comes last.
    Metric(
        "heldout/pass_at_K", "heldout/pass_at_K",
        "share", "mean over the problems",
        "Share of the problems with a right answer among K samples, estimated from all samples.",
    ),
    Metric(
        "heldout/standard_error", "heldout/standard_error",
        "share", "over the problems",
        "Standard error of pass_at_1.",
    ),
    Metric(
        "heldout/FIGURE", "heldout/FIGURE",
        "see its name", "over all samples",
        "Other figures of an evaluation: problems, samples, failed_checks, unanswered_share, "
        "truncated_share, response_tokens_mean.",
    ),
)  # fmt: skip
"""In the order of their groups; of families that overlap, the first that matches counts."""


def metric_of(name: str) -> Metric | None:
    """Returns the metric, or the family, that a name in the run's files is of; None without one."""
    return next((metric for metric in METRICS if metric.pattern().fullmatch(name)), None)


def tracked_name(name: str) -> str:
    """Returns a metric's name in TensorBoard and W&B; a name that is not in the table is kept."""
    for metric in METRICS:
        match = metric.pattern().fullmatch(name)
        if match is None:
            continue
        tracked = metric.tracked
        for part, value in match.groupdict().items():
            tracked = tracked.replace(part, value)
        return tracked
    return name
