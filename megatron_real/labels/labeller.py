"""Verdicts on completions: what the verifier found, turned into positive, negative or excluded."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_real.labels.pool import Check, VerifierPool
from megatron_real.labels.verifiers import Result, check_name
from megatron_real.records import EXCLUDED, NEGATIVE, POSITIVE, Completion, Prompt, Verdict

FAILED = ("timeout", "crashed")
"""Statuses of a check that failed and says nothing of the answer."""


class TooManyFailedChecks(RuntimeError):
    """More than the allowed share of a step's checks timed out or crashed."""


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
        overlong: str = "negative",
        threshold: float | None = None,
        max_failed_share: float = 0.2,
    ) -> None:
        """Starts the workers. Raises ValueError for a verifier that does not exist."""
        check_name(verifier)
        self._pool = VerifierPool(verifier, workers=workers, timeout_seconds=timeout_seconds, memory_mib=memory_mib)
        self._overlong = NEGATIVE if overlong == "negative" else EXCLUDED
        self._threshold, self._max_failed_share = threshold, max_failed_share

    def __call__(self, items: Sequence[tuple[Prompt, Completion]]) -> list[Verdict]:
        """[items] verdicts in order. A truncated or empty completion is not shown to the verifier.

        Raises:
            TooManyFailedChecks: the share of checks that timed out or crashed passes the bound.
            ValueError: a reward is neither 0 nor 1 and there is no threshold.
        """
        checked = [i for i, (_, completion) in enumerate(items) if completion.finished and completion.token_ids]
        results = self._pool.run([Check(items[i][1].text, items[i][0].answers, items[i][0].metadata) for i in checked])
        failed = sum(status in FAILED for (status, _), _ in results)
        if failed > self._max_failed_share * max(len(results), 1):
            raise TooManyFailedChecks(
                f"{failed} of {len(results)} checks timed out or crashed, more than labels.max_failed_share = "
                f"{self._max_failed_share}; look at the verifier's messages, or raise labels.timeout_seconds"
            )
        verdicts = [self._unchecked(completion) for _, completion in items]
        for i, (result, seconds) in zip(checked, results, strict=True):
            verdicts[i] = self._verdict(result, seconds)
        return verdicts

    def _unchecked(self, completion: Completion) -> Verdict:
        return Verdict("overlong", self._overlong, None) if completion.token_ids else Verdict("empty", EXCLUDED, None)

    def _verdict(self, result: Result, seconds: float) -> Verdict:
        status, reward = result
        if status in FAILED:
            return Verdict(status, EXCLUDED, None, seconds)  # type: ignore[arg-type]
        if reward is None:
            return Verdict("unparsable", NEGATIVE, 0.0, seconds)
        if self._threshold is None and reward not in (0.0, 1.0):
            raise ValueError(
                f"the verifier gave the reward {reward}; set labels.threshold to say what counts as correct"
            )
        positive = reward >= (1.0 if self._threshold is None else self._threshold)
        return Verdict(status, POSITIVE if positive else NEGATIVE, reward, seconds)  # type: ignore[arg-type]

    def close(self) -> None:
        """Ends the verifier processes."""
        self._pool.close()

    def __enter__(self) -> Labeller:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
