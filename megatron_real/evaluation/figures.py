"""pass@1, pass@k and the majority's accuracy on held-out problems.

Answers come from the engine of training and are judged by its verifier.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_real.records import POSITIVE, Prompt, Rollout, Sampling, Status
from megatron_real.rollout.stage import RolloutStage


@dataclass(frozen=True)
class Judged:
    """What the figures need of one completion."""

    problem: str
    """Which problem it answers."""
    status: str
    """What became of its check."""
    correct: bool
    """Verified correct. A check that failed, a truncated and an empty completion are not."""
    tokens: int
    """Response length."""
    answer_class: int | None = None
    """Answers to the problem that say the same have the same number; None: no answer that could
    vote."""


@dataclass(frozen=True)
class Evaluation:
    """Figures of one set of problems, each answered by the same number of samples."""

    pass_at_1: float
    """Mean over problems of the share of samples verified correct."""
    standard_error: float
    """Standard error of pass_at_1, over problems."""
    pass_at_k: tuple[tuple[int, float], ...]
    """(k, chance that one of k samples is correct, mean over problems) for k = 1, 2, 4, ... and the
    samples drawn."""
    majority: float | None
    """maj@k for k = samples: mean over problems of whether the most frequent answer is correct;
    ties count in part. None where no vote was held."""
    problems: int
    """Problems asked."""
    samples: int
    """Completions per problem."""
    failed_checks: int
    """Completions whose check failed: they count as wrong here."""
    unanswered_share: float
    """Share of completions that ended without an answer that the verifier could read."""
    truncated_share: float
    """Share of completions cut at the length limit."""
    response_tokens_mean: float
    """Mean response length."""
    correct: tuple[tuple[str, int], ...] = ()
    """(uid, correct completions) of each problem, in the order of the problems."""

    def figures(self) -> dict[str, float]:
        """Returns the figures of the whole set by name, pass@k as pass_at_K.

        There is no majority where no vote was held.
        """
        figures = {"pass_at_1": self.pass_at_1, "standard_error": self.standard_error}
        figures |= {f"pass_at_{k}": value for k, value in self.pass_at_k}
        for name, value in vars(self).items():
            if name not in ("pass_at_k", "correct") and value is not None:
                figures[name] = value
        return figures


def evaluate(
    stage: RolloutStage, problems: Sequence[Prompt], sampling: Sampling, *, seed: int
) -> Evaluation:
    """Samples and verifies answers to `problems`. The engine must hold the weights.

    Collective over all ranks.
    """
    rollouts = stage.label(problems, stage.generate(problems, sampling, seed=seed))
    return summarise([judged(rollout) for rollout in rollouts])


def judged(rollout: Rollout, answer_class: int | None = None) -> Judged:
    """Returns what the figures need of a labelled rollout."""
    return Judged(
        problem=rollout.prompt.uid,
        status=rollout.verdict.status,
        correct=rollout.label == POSITIVE,
        tokens=rollout.completion.num_trained,
        answer_class=answer_class,
    )


def summarise(completions: Sequence[Judged], *, vote: bool = False) -> Evaluation:
    """Returns the figures of judged completions.

    Args:
        completions: equally many for each problem, in any order.
        vote: compute the majority, for which they need their answer classes.

    Raises:
        ValueError: there are none, or not equally many for each problem.
    """
    if not completions:
        raise ValueError(
            "there is no completion to evaluate; data.heldout may be empty after the length filter"
        )
    of_problem: dict[str, list[Judged]] = defaultdict(list)
    for completion in completions:
        of_problem[completion.problem].append(completion)

    samples = len(completions) // len(of_problem)
    if any(len(group) != samples for group in of_problem.values()):
        raise ValueError(
            "the problems do not have equally many completions; each needs evaluation.samples of "
            "them"
        )

    # In the order in which the problems came, which dictionaries keep.
    correct = [sum(c.correct for c in group) for group in of_problem.values()]
    # Over problems, not completions: those of one problem are alike, and an error over them all
    # would look too small.
    shares = [count / samples for count in correct]

    # 1, 2, 4, ... up to the samples, and the samples themselves.
    passes = []
    for k in sorted({samples, *(2**i for i in range(samples.bit_length()))}):
        passes.append((k, _mean([pass_at_k(count, samples, k) for count in correct])))
    majority_share = None
    if vote:
        majority_share = _mean([majority(group) for group in of_problem.values()])

    return Evaluation(
        pass_at_1=_mean(shares),
        standard_error=standard_error(shares),
        pass_at_k=tuple(passes),
        majority=majority_share,
        problems=len(of_problem),
        samples=samples,
        failed_checks=sum(Status(c.status).failed for c in completions),
        unanswered_share=_mean([c.status == "unparsable" for c in completions]),
        truncated_share=_mean([c.status == "overlong" for c in completions]),
        response_tokens_mean=_mean([c.tokens for c in completions]),
        correct=tuple(zip(of_problem, correct, strict=True)),
    )


def pass_at_k(correct: int, samples: int, k: int) -> float:
    """Returns the chance that a correct one is among k of the samples (arXiv:2107.03374, Eq. 1).

    They are drawn without replacement.
    Unbiased: 1 - C(samples - correct, k) / C(samples, k); 1 - (1 - correct / samples)^k is not.
    """
    assert 0 <= correct <= samples and 1 <= k <= samples, f"pass@{k} of {correct} among {samples}"
    # comb is 0 where fewer than k are wrong: the chance is then 1.
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def majority(completions: Sequence[Judged]) -> float:
    """Returns 1 if the most frequent answer to a problem is correct, 0 if not.

    Of several that are equally frequent it is the share that is correct.
    """
    # Completions without an answer do not vote, but count among the samples elsewhere.
    votes = Counter(c.answer_class for c in completions if c.answer_class is not None)
    if not votes:
        return 0.0
    highest = max(votes.values())
    most = [answer for answer, count in votes.items() if count == highest]
    correct = {c.answer_class for c in completions if c.correct}
    return sum(answer in correct for answer in most) / len(most)


def standard_error(shares: Sequence[float]) -> float:
    """Returns that of the mean over problems; NaN for a single one, whose spread is not known."""
    if len(shares) < 2:
        return math.nan
    mean = _mean(shares)
    variance = math.fsum((share - mean) ** 2 for share in shares) / (len(shares) - 1)
    return math.sqrt(variance / len(shares))


def _mean(values: Sequence[float]) -> float:
    # fsum: the figures do not depend on the order of the chunks.
    return math.fsum(values) / len(values)
