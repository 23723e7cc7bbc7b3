"""Verdicts on completions: what the verifier found, turned into positive, negative or excluded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

from megatron_real.labels.answers import opened_thinking
from megatron_real.labels.pool import Check, Outcome, VerifierPool
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
            except ValueError:
                self.close()
                raise
        self._excluded = {*excluded, *(["overlong"] if overlong == "excluded" else [])}
        self._threshold, self._max_failed_share = threshold, max_failed_share

    def __call__(self, items: Sequence[tuple[Prompt, Completion]]) -> list[Verdict]:
        """[items] verdicts in order. Raises as `check_failures` does."""
        verdicts = [future.result() for future in [self.submit(*item) for item in items]]
        self.check_failures(verdicts)
        return verdicts

    def submit(self, prompt: Prompt, completion: Completion) -> Future[Verdict]:
        """The verdict, once there is one.

        A truncated or empty completion is not shown to the verifier.
        """
        if completion.finished and completion.num_trained:
            verifier = prompt.verifier or self._verifier
            text = completion.text
            if verifier in NAMES:  # a user's own is given what the model wrote, and nothing else
                text = opened_thinking(prompt.text) + text
            check = Check(text, prompt.answers, prompt.metadata)
            return self._pools[verifier].submit(check, self._verdict)
        known: Future[Verdict] = Future()
        overlong = Verdict(Status.OVERLONG, self._negative(Status.OVERLONG), None)
        known.set_result(
            overlong if completion.num_trained else Verdict(Status.EMPTY, EXCLUDED, None)
        )
        return known

    def check_failures(self, verdicts: Sequence[Verdict]) -> None:
        """Judges the checks of a whole step, so that every rank that knows them decides alike.

        Raises:
            TooManyFailedChecks: the share of checks that failed passes the bound.
            RewardNeedsThreshold: a reward is neither 0 nor 1 and there is no threshold.
        """
        failed = [v for v in verdicts if v.status.failed]
        checked = sum(not v.status.unchecked for v in verdicts)
        if len(failed) > self._max_failed_share * checked:
            counts = ", ".join(
                f"{count} {status}" for status, count in Counter(v.status for v in failed).items()
            )
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
        status, reward = Status(outcome.status), outcome.reward
        if self._unclear(reward):
            label = EXCLUDED  # check_failures stops the run
        elif reward is not None and reward >= (1.0 if self._threshold is None else self._threshold):
            label = POSITIVE
        else:
            label = self._negative(status)
        return Verdict(status, label, reward, outcome.seconds, outcome.reason)

    def _negative(self, status: Status) -> Label:
        return EXCLUDED if status in self._excluded else NEGATIVE

    def _unclear(self, reward: float | None) -> bool:
        return self._threshold is None and reward not in (None, 0.0, 1.0)

    def close(self) -> None:
        """Ends the verifier processes."""
        for pool in self._pools.values():
            pool.close()

    def __enter__(self) -> Labeller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
