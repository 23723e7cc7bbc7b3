"""Verdicts on completions: what the verifier found, turned into positive, negative or excluded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

from megatron_real.labels.pool import Check, Outcome, VerifierPool
from megatron_real.labels.verifiers import check_name
from megatron_real.records import EXCLUDED, NEGATIVE, POSITIVE, Completion, Prompt, Verdict

FAILED = ("timeout", "crashed", "lost")
"""Statuses that say nothing of the answer: the check failed, or an engine lost the completion."""
UNCHECKED = ("overlong", "empty")
"""Statuses of completions that are not shown to a verifier."""


class TooManyFailedChecks(RuntimeError):
    """More than the allowed share of a step's checks failed."""


class RewardNeedsThreshold(ValueError):
    """A reward is neither 0 nor 1, and the configuration does not say what counts as correct."""


class Labeller:
    """Labels completions with one verifier pool.

    Example:
        with Labeller("math_verify", workers=2, timeout_seconds=10, memory_mib=1024) as label:
            verdicts = label([(prompt, completion)])
    """

    def __init__(
        self,
        verifier: str,
        *,
        workers: int,
        timeout_seconds: float,
        memory_mib: int,
        require_think: bool = False,
        require_boxed: bool = True,
        excluded: Sequence[str] = ("timeout", "crashed"),
        overlong: str = "negative",
        threshold: float | None = None,
        max_failed_share: float = 0.2,
    ) -> None:
        """Starts the workers. The options are those of `labels.*`.

        Raises:
            ValueError: the verifier cannot be loaded.
        """
        check_name(verifier)
        self._pool = VerifierPool(
            verifier,
            workers=workers,
            timeout_seconds=timeout_seconds,
            memory_mib=memory_mib,
            require_think=require_think,
            require_boxed=require_boxed,
        )
        self._excluded = {*excluded, *(["overlong"] if overlong == "excluded" else [])}
        self._threshold, self._max_failed_share = threshold, max_failed_share

    def __call__(self, items: Sequence[tuple[Prompt, Completion]]) -> list[Verdict]:
        """[items] verdicts in order. Raises as `check_failures` does."""
        verdicts = [future.result() for future in [self.submit(*item) for item in items]]
        self.check_failures(verdicts)
        return verdicts

    def submit(self, prompt: Prompt, completion: Completion) -> Future[Verdict]:
        """The verdict, once there is one. A truncated or empty completion is not shown to the verifier."""
        if completion.finished and completion.token_ids:
            return self._pool.submit(Check(completion.text, prompt.answers, prompt.metadata), self._verdict)
        known: Future[Verdict] = Future()
        overlong = Verdict("overlong", self._negative("overlong"), None)
        known.set_result(overlong if completion.token_ids else Verdict("empty", EXCLUDED, None))
        return known

    def check_failures(self, verdicts: Sequence[Verdict]) -> None:
        """Judges the checks of a whole step, so that every rank that knows them decides alike.

        Raises:
            TooManyFailedChecks: the share of checks that failed passes the bound.
            RewardNeedsThreshold: a reward is neither 0 nor 1 and there is no threshold.
        """
        failed = [v for v in verdicts if v.status in FAILED]
        checked = sum(v.status not in UNCHECKED for v in verdicts)
        if len(failed) > self._max_failed_share * checked:
            counts = ", ".join(f"{count} {status}" for status, count in Counter(v.status for v in failed).items())
            (reason, _), *_ = Counter(v.reason for v in failed).most_common(1)
            raise TooManyFailedChecks(
                f"{len(failed)} of {checked} checks failed ({counts}), more than labels.max_failed_share = "
                f"{self._max_failed_share}; most often: {reason}"
            )
        unclear = next((v.reward for v in verdicts if self._unclear(v.reward)), None)
        if unclear is not None:
            raise RewardNeedsThreshold(
                f"the verifier gave the reward {unclear}; set labels.threshold to say what counts as correct"
            )

    def _verdict(self, outcome: Outcome) -> Verdict:
        status, reward = outcome.status, outcome.reward
        if self._unclear(reward):
            label = EXCLUDED  # check_failures stops the run
        elif reward is not None and reward >= (1.0 if self._threshold is None else self._threshold):
            label = POSITIVE
        else:
            label = self._negative(status)
        return Verdict(status, label, reward, outcome.seconds, outcome.reason)  # type: ignore[arg-type]

    def _negative(self, status: str) -> int:
        return EXCLUDED if status in self._excluded else NEGATIVE

    def _unclear(self, reward: float | None) -> bool:
        return self._threshold is None and reward not in (None, 0.0, 1.0)

    def close(self) -> None:
        """Ends the verifier processes."""
        self._pool.close()

    def __enter__(self) -> Labeller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
