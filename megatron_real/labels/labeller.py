"""Verdicts on completions: a verifier's outcome as positive, negative or excluded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

from megatron_real.errors import ExpectedEnd, Refused
from megatron_real.labels.answers import opened_thinking
from megatron_real.labels.pool import Check, CheckOutcome, VerifierPool
from megatron_real.labels.verifiers import NAMES, check_name
from megatron_real.records import (
    EXCLUDED,
    NEGATIVE,
    POSITIVE,
    Completion,
    Label,
    Prompt,
    Status,
    Verdict,
)


class TooManyFailedChecks(ExpectedEnd, RuntimeError):
    """More than the allowed share of a step's checks failed."""


class RewardNeedsThreshold(Refused):
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
        sandbox: str = "auto",
        require_think: bool = False,
        require_boxed: bool = True,
        excluded: Sequence[str] = ("timeout", "crashed"),
        overlong: str = "negative",
        threshold: float | None = None,
        max_failed_share: float = 0.2,
        others: Sequence[str] = (),
    ) -> None:
        """Starts the workers. The options are those of `labels.*`.

        `others` are the verifiers of training sets that have another one, each with as many
        processes.

        Raises:
            ValueError: the verifier cannot be loaded.
        """
        self._verifier = verifier
        self._threshold = threshold
        self._max_failed_share = max_failed_share
        self._excluded = set(excluded)
        if overlong == "excluded":
            self._excluded.add("overlong")

        self._pools: dict[str, VerifierPool] = {}
        for name in (verifier, *others):
            check_name(name)
            if name in self._pools:
                continue
            try:
                self._pools[name] = VerifierPool(
                    name,
                    workers=workers,
                    timeout_seconds=timeout_seconds,
                    memory_mib=memory_mib,
                    sandbox=sandbox,
                    require_think=require_think,
                    require_boxed=require_boxed,
                    partial=threshold is not None,
                )
            # The pools before it have processes, which nobody else would end.
            except ValueError:
                self.close()
                raise

    def __call__(self, items: Sequence[tuple[Prompt, Completion]]) -> list[Verdict]:
        """Returns [items] verdicts in order. Raises as `check_failures` does."""
        # All are submitted before the first result is awaited.
        futures = [self.submit(prompt, completion) for prompt, completion in items]
        verdicts = [future.result() for future in futures]
        self.check_failures(verdicts)
        return verdicts

    def submit(self, prompt: Prompt, completion: Completion) -> Future[Verdict]:
        """Returns the verdict, once there is one.

        A truncated or empty completion is not shown to the verifier.
        """
        if completion.finished and completion.num_trained:
            verifier = prompt.verifier or self._verifier
            text = completion.text
            if verifier in NAMES:  # a user's own is given what the model wrote, and nothing else
                text = opened_thinking(prompt.text) + text
            check = Check(text, prompt.answers, prompt.metadata)
            return self._pools[verifier].submit(check, self._verdict)

        unchecked: Future[Verdict] = Future()
        if completion.num_trained:
            overlong = Verdict(Status.OVERLONG, self._label_of_failure(Status.OVERLONG), None)
            unchecked.set_result(overlong)
        else:
            unchecked.set_result(Verdict(Status.EMPTY, EXCLUDED, None))
        return unchecked

    def check_failures(self, verdicts: Sequence[Verdict]) -> None:
        """Judges the checks of a whole step, so that every rank that knows them decides alike.

        Raises:
            TooManyFailedChecks: the share of checks that failed passes the bound.
            RewardNeedsThreshold: a reward is neither 0 nor 1 and there is no threshold.
        """
        failed = [verdict for verdict in verdicts if verdict.status.failed]
        # Truncated and empty completions were never checked, and must not thin out the share.
        num_checked = sum(not verdict.status.unchecked for verdict in verdicts)

        if len(failed) > self._max_failed_share * num_checked:
            by_status = Counter(verdict.status for verdict in failed)
            counts = ", ".join(f"{count} {status}" for status, count in by_status.items())
            reasons = Counter(verdict.reason for verdict in failed)
            most_often = reasons.most_common(1)[0][0]
            raise TooManyFailedChecks(
                f"{len(failed)} of {num_checked} checks failed ({counts}), more than "
                f"labels.max_failed_share = {self._max_failed_share}; most often: {most_often}"
            )

        for verdict in verdicts:
            if self._needs_threshold(verdict.reward):
                raise RewardNeedsThreshold(
                    f"the verifier gave the reward {verdict.reward}; set labels.threshold to say "
                    "what counts as correct"
                )

    def _verdict(self, outcome: CheckOutcome) -> Verdict:
        status = Status(outcome.status)
        reward = outcome.reward
        # Without a threshold rewards are 0 and 1: `check_failures` refuses any other.
        threshold = 1.0
        if self._threshold is not None:
            threshold = self._threshold

        if self._needs_threshold(reward):
            label = EXCLUDED  # check_failures stops the run
        elif reward is not None and reward >= threshold:
            label = POSITIVE
        else:
            label = self._label_of_failure(status)
        return Verdict(status, label, reward, outcome.seconds, outcome.reason)

    def _label_of_failure(self, status: Status) -> Label:
        """Returns what a completion counts as that was not verified correct."""
        if status in self._excluded:
            return EXCLUDED
        return NEGATIVE

    def _needs_threshold(self, reward: float | None) -> bool:
        """Returns whether nothing says if a reward means correct or wrong."""
        return self._threshold is None and reward not in (None, 0.0, 1.0)

    def close(self) -> None:
        """Ends the verifier processes."""
        for pool in self._pools.values():
            pool.close()

    def __enter__(self) -> Labeller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
