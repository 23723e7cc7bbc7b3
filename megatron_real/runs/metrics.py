"""The metrics of a step, each computed in one place from the whole step, and their files.

Nothing here is an average of averages: every rank knows all rollouts, scores and weights, so each
figure is computed once from all of them. The reduction of each is stated where it is computed. A
figure of nothing is NaN (null on disk).
"""

from __future__ import annotations

import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from megatron_real.records import EXCLUDED, NEGATIVE, POSITIVE, Rollout, Status
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.metric_table import tracked_name
from megatron_real.runs.rows import append_row
from megatron_real.runs.trackers import TRACKERS, Tracker


@dataclass(frozen=True)
class Training:
    """What the updates of one step were, in plain numbers."""

    losses: Sequence[float]
    """[updates] loss of each minibatch."""
    scores: Sequence[float]
    """[rollouts] score of each rollout, NaN where it was not computed."""
    weights: Sequence[float]
    """[rollouts] dL / dscore."""
    max_abs_weight_tau: float
    """max |w| * tau * groups of the minibatch; at most 1 by Eq. 9 and 10. NaN for objectives
    without such a bound."""
    grad_norms: Sequence[float]
    """[updates] gradient norm before clipping."""
    lr: float
    """Learning rate of the last update."""
    skipped: Sequence[int]
    """Updates that were skipped for a loss or gradient that was not finite."""
    token_means: Mapping[str, float]
    """Means over the response tokens that were trained on: entropy, mismatch_mean_abs, mismatch_k3
    (nats) and the share mismatch_share; and mismatch_max_abs, the maximum. `entropy` is the mean of
    -log pi of the sampled tokens: a Monte Carlo estimate."""
    kl: Sequence[float]
    """[updates] KL estimate (nats) of the penalty; 0 without one."""
    clipped_low_share: Sequence[float]
    """[updates] share of the learning tokens that a clip deprived of their gradient at a ratio
    below 1."""
    clipped_high_share: Sequence[float]
    """[updates] the same above 1."""
    low_ratio_tokens: Sequence[tuple[int, int, int]]
    """[updates] number of response tokens with a ratio below 0.8, of those in right answers, and of
    all."""
    equal_groups: int
    """Groups whose rewards are all equal, so that their advantages are 0; of objectives in
    advantages."""
    lag: float
    """Steps between the weights that generated the rollouts and those that the step began with."""
    tokens: int
    """Prompt and response tokens that were trained on."""
    flops: float
    """Model FLOPs of forward and backward over them, recomputation and scoring aside."""
    token_figures: Mapping[str, Sequence[NDArray[numpy.float32] | None]] = field(
        default_factory=dict
    )
    """`log_ratios` and `token_weights`, where they are kept: [rollouts] arrays [n].

    They are over the response tokens, 0 for tokens that were not trained on. The entry is None for
    the rollouts of an update that an earlier life of the run has made.
    """


def step_metrics(
    rollouts: Sequence[Rollout],
    training: Training,
    seconds: Mapping[str, float],
    *,
    num_ranks: int,
    peak_tflops: float | None,
    seconds_of_ranks: Sequence[Mapping[str, float]] = (),
    memory_of_ranks: Sequence[Mapping[str, float]] = (),
    engines: Sequence[Mapping[str, float]] = (),
) -> dict[str, float]:
    """Returns all metrics of a step.

    loss, grad_norm: mean over the updates that were made. lr: of the last update. skipped_updates:
    count. max_abs_weight_tau: maximum over the step. kl, clipped_low_share, clipped_high_share:
    mean over the updates. equal_groups: count over the step. seconds/STAGE: wall clock of the first
    rank, summed over the step. The others are described at the functions that compute them, and at
    `Training`.

    Args:
        rollouts: all of the step's.
        training: what its updates were.
        seconds: of each stage; "old_logprobs" and "update" are the training ones.
        num_ranks: processes that share the training.
        peak_tflops: of one device; None leaves `mfu` out.
        seconds_of_ranks: [rank] `seconds` of each.
        memory_of_ranks: [rank] host memory of each, GiB.
        engines: [engine] the seconds in which each generated, and the response tokens of it.
    """
    # Those of skipped updates are not finite.
    losses = [loss for loss in training.losses if math.isfinite(loss)]
    norms = [norm for norm in training.grad_norms if math.isfinite(norm)]
    # The scoring pass counts as time of training but not as its FLOPs: it is part of the price.
    in_training = seconds.get("old_logprobs", 0.0) + seconds.get("update", 0.0)

    return {
        "loss": _mean(losses),
        **rollout_metrics(rollouts),
        **score_metrics(rollouts, training.scores, training.weights),
        **training.token_means,
        "max_abs_weight_tau": training.max_abs_weight_tau,
        "grad_norm": _mean(norms),
        "lr": training.lr,
        "kl": _mean(training.kl),
        "clipped_low_share": _mean(training.clipped_low_share),
        "clipped_high_share": _mean(training.clipped_high_share),
        **low_ratio_metrics(training.low_ratio_tokens),
        "equal_groups": float(training.equal_groups),
        "lag": training.lag,
        "skipped_updates": float(len(training.skipped)),
        **{f"seconds/{name}": value for name, value in seconds.items()},
        **rank_metrics(seconds_of_ranks),
        **memory_metrics(memory_of_ranks),
        **engine_metrics(engines),
        **speed_metrics(training.tokens, training.flops, in_training * num_ranks, peak_tflops),
    }


def low_ratio_metrics(tokens: Sequence[tuple[int, int, int]]) -> dict[str, float]:
    """Returns shares of the step's response tokens, each counted in the update that trained on it.

    low_ratio_share: of all tokens, those whose ratio to the policy that generated them was below
        0.8.
    low_ratio_positive_share: of these, the tokens of right answers, which a policy gradient in
        ratios pulls at the less the lower they are; NaN where none was low.
    """
    # Counts are summed before they are divided: updates differ in tokens.
    low, positive, every = (sum(counts) for counts in zip(*tokens, strict=True))
    return {
        "low_ratio_share": _quotient(low, every),
        "low_ratio_positive_share": _quotient(positive, low),
    }


def rollout_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Returns shares and lengths of a step's rollouts.

    Excluded rollouts, empty responses among them, are not labelled.

    reward_mean: mean over labelled rollouts of the verifier's reward; a rollout that no verifier
    saw (truncated, and counted as negative) has its label instead. With rewards of 0 and 1 it is
    the correct share. solved_share, one_class_share: of the groups that have a labelled rollout,
    those all correct, and those of a single label (the solved ones among them). refilled_share: of
    all groups, those whose prompt stands in for one or more that were given up. excluded_share: of
    all rollouts. truncated_share, response_tokens_mean, response_tokens_max: of all that no engine
    lost. status/NAME: how many rollouts ended so. checked_early_share: of the rollouts that a
    verifier saw, those whose check was over before their rank had finished generating.
    check_seconds_max: of the longest check.
    """
    labels_of_groups: dict[int, set[int]] = defaultdict(set)
    refilled_groups: dict[int, bool] = {}
    rewards: list[float] = []
    for rollout in rollouts:
        refilled_groups[rollout.group] = rollout.refills > 0
        if rollout.label == EXCLUDED or not rollout.completion.num_trained:
            continue

        labels_of_groups[rollout.group].add(rollout.label)
        reward = rollout.verdict.reward
        # A truncated rollout counts as wrong and was seen by no verifier: its label is its reward.
        if reward is None:
            reward = float(rollout.label)
        rewards.append(reward)
    label_sets = labels_of_groups.values()

    excluded_share = math.nan
    if rollouts:
        excluded_share = (len(rollouts) - len(rewards)) / len(rollouts)

    # A lost rollout has no completion that an engine wrote.
    sampled = [r.completion for r in rollouts if r.verdict.status != Status.LOST]
    lengths = [completion.num_trained for completion in sampled]
    # 0 seconds: no verifier saw it.
    checks = [r.verdict for r in rollouts if r.verdict.seconds > 0]
    statuses = Counter(r.verdict.status for r in rollouts)
    return {
        "reward_mean": _mean(rewards),
        "solved_share": _mean([labels == {POSITIVE} for labels in label_sets]),
        "one_class_share": _mean([len(labels) == 1 for labels in label_sets]),
        "refilled_share": _mean(list(refilled_groups.values())),
        "excluded_share": excluded_share,
        "truncated_share": _mean([not completion.finished for completion in sampled]),
        "response_tokens_mean": _mean(lengths),
        "response_tokens_max": float(max(lengths, default=0)),
        "checked_early_share": _mean([check.early for check in checks]),
        "check_seconds_max": max((check.seconds for check in checks), default=math.nan),
        **{f"status/{name}": float(statuses[name]) for name in Status},
    }


def score_metrics(
    rollouts: Sequence[Rollout], scores: Sequence[float], weights: Sequence[float]
) -> dict[str, float]:
    """Returns the mean, the 5th and the 95th percentile of the scores of each class.

    score_positive_*, score_negative_*: over the rollouts that had a weight. The others (excluded,
    skipped one-class groups) were never scored. A score that is not finite is left out: its update
    was skipped, and skipped_updates says so.
    """
    metrics = {}
    for name, label in (("positive", POSITIVE), ("negative", NEGATIVE)):
        of_class = [
            score
            for rollout, score, weight in zip(rollouts, scores, weights, strict=True)
            if rollout.label == label and weight != 0 and math.isfinite(score)
        ]
        metrics[f"score_{name}_mean"] = _mean(of_class)
        metrics[f"score_{name}_p5"] = percentile(of_class, 5)
        metrics[f"score_{name}_p95"] = percentile(of_class, 95)
    return metrics


def speed_metrics(
    tokens: int, flops: float, rank_seconds: float, peak_tflops: float | None
) -> dict[str, float]:
    """Returns the speed of training, rollouts aside.

    The figures are sums over the step, divided by the seconds of all ranks together.
    tokens_per_second_per_rank: prompt and response tokens trained on. tflops_per_rank: model FLOPs,
    so that recomputation and scoring passes lower it. mfu: tflops_per_rank / peak, only where the
    peak is known.
    """
    # NaN, and not 0: nothing was trained, and so nothing was slow.
    per_second = math.nan
    if rank_seconds > 0:
        per_second = 1.0 / rank_seconds
    speed = {
        "tokens_per_second_per_rank": tokens * per_second,
        "tflops_per_rank": flops * per_second / 1e12,
    }
    if peak_tflops:
        speed["mfu"] = speed["tflops_per_rank"] / peak_tflops
    return speed


def rank_metrics(seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns how the seconds of each stage spread over the ranks; {} of a single rank.

    rank_seconds/STAGE_min, _mean, _max, and _slowest, the rank of the maximum. A stage that ends in
    a collective takes all ranks as long as the slowest; others (rollout) show who it is.
    """
    if len(seconds) < 2:
        return {}
    return _over_ranks("rank_seconds", seconds, which="slowest")


def memory_metrics(memory: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns how the host memory (GiB) spreads over the ranks.

    memory/NAME_min, _mean, _max, and _largest, the rank of the maximum. resident_gib: pages of the
    rank's process. pinned_gib: what CUDA has locked of it. An engine's or a verifier's own
    processes are not in it.
    """
    return _over_ranks("memory", memory, which="largest")


def engine_metrics(engines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns how generating spread over the engines; {} without one.

    engine/seconds_mean, _max: of generating in the step, draws that were repeated among them.
    engine/slowest: the number of the engine with the maximum, from 0 in order of ranks.
    engine/tokens_mean, tokens_slowest: response tokens of an engine, and of that one: a slow engine
    with few tokens is ill, one with many had the long answers.
    engine/tokens_per_second_mean: tokens of all over seconds of all.
    engine/tokens_per_second_min: of the engine with the lowest rate.
    engine/taken_over: completions that engines gave out of other engines' shares.
    """
    if not engines:
        return {}

    seconds = [engine["seconds"] for engine in engines]
    tokens = [engine["tokens"] for engine in engines]
    # Of equals the first, so that a figure is the same on every reading.
    slowest = seconds.index(max(seconds))
    rates = [n / s for n, s in zip(tokens, seconds, strict=True) if n > 0 and s > 0]
    total = math.fsum(seconds)
    return {
        "engine/seconds_mean": _mean(seconds),
        "engine/seconds_max": seconds[slowest],
        "engine/slowest": float(slowest),
        "engine/tokens_mean": _mean(tokens),
        "engine/tokens_slowest": float(tokens[slowest]),
        "engine/tokens_per_second_mean": _quotient(math.fsum(tokens), total),
        "engine/tokens_per_second_min": min(rates, default=math.nan),
        "engine/taken_over": math.fsum(engine["taken_over"] for engine in engines),
    }


def _over_ranks(
    prefix: str, ranks: Sequence[Mapping[str, float]], *, which: str
) -> dict[str, float]:
    if not ranks:
        return {}

    metrics = {}
    # A stage that the first rank did not have is left out; one that another lacks took
    # 0 seconds there.
    for name in ranks[0]:
        values = [rank.get(name, 0.0) for rank in ranks]
        metrics[f"{prefix}/{name}_min"] = min(values)
        metrics[f"{prefix}/{name}_mean"] = _mean(values)
        metrics[f"{prefix}/{name}_max"] = max(values)
        metrics[f"{prefix}/{name}_{which}"] = float(values.index(max(values)))

    return metrics


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns a percentile, between the two nearest values as in numpy's default; NaN of nothing.

    Args:
        values: in any order, all finite.
        percent: from 0 to 100.
    """
    if not values:
        return math.nan

    ordered = sorted(values)
    # Between two neighbours, as numpy's default `linear` has it.
    below, fraction = divmod(percent / 100 * (len(ordered) - 1), 1)
    low = ordered[int(below)]
    high = ordered[min(int(below) + 1, len(ordered) - 1)]
    return low + fraction * (high - low)


def _mean(values: Sequence[float]) -> float:
    # Unlike sum(), fsum() gives the same figure for any order of the values.
    return _quotient(math.fsum(values), len(values))


def _quotient(part: float, whole: float) -> float:
    """Returns part / whole; NaN of nothing."""
    if not whole:
        return math.nan
    return part / whole


class MetricsWriter:
    """Appends rows to metrics.jsonl and evaluations.jsonl, and gives the same figures to trackers.

    The files are the record. A tracker that fails is reported once and left out from then on: it
    ends no run.
    """

    def __init__(
        self,
        directory: RunDirectory,
        *,
        trackers: Sequence[str],
        config: Mapping[str, Any],
        first_step: int | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Opens the trackers.

        Args:
            directory: of the run.
            trackers: names of `TRACKERS`.
            config: the run's configuration, which each tracker shows.
            first_step: of a resumed run.
            say: shows a warning.
        """
        self._directory = directory
        self._say = say
        self._trackers: list[Tracker] = []
        for setting in trackers:
            tracker = TRACKERS[setting]
            try:
                self._trackers.append(tracker(directory, config, first_step))
            # A service or a library of others, which raises what it likes.
            except Exception as error:
                self._say(f"WARNING: {tracker.name} is left out: {_first_line(error)}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes the row of a finished step. What is not finite becomes null."""
        self._append(self._directory.metrics, step, metrics)

    def write_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the row of an evaluation after `step` steps."""
        self._append(self._directory.evaluations, step, values)

    def close(self) -> None:
        """Flushes and ends the trackers."""
        # A copy, since `_guarded` removes a tracker that fails.
        for tracker in list(self._trackers):
            self._guarded(tracker, tracker.close)

    def _append(self, path: Path, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN: such a figure becomes null, so that every row has every column.
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        append_row(path, {"step": step} | {name: finite.get(name) for name in values})

        # Trackers have no null: they get the finite values alone.
        grouped = {tracked_name(name): value for name, value in finite.items()}
        for tracker in list(self._trackers):
            self._guarded(tracker, functools.partial(tracker.write, step, grouped))

    def _guarded(self, tracker: Tracker, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._trackers.remove(tracker)
            self._say(f"WARNING: {tracker.name} is left out from now on: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
