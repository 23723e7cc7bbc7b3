"""Completion + gold answers -> positive, negative or excluded.

A failed check is excluded and counted, never a 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_real.labels.labeller import Labeller, RewardNeedsThreshold, TooManyFailedChecks

if TYPE_CHECKING:  # the verifier's processes import this package, and need no configuration
    from megatron_real.config import LabelConfig

__all__ = ["Labeller", "RewardNeedsThreshold", "TooManyFailedChecks", "build_labeller"]


def build_labeller(labels: LabelConfig, *, others: Sequence[str] = ()) -> Labeller:
    """Starts the verifier processes that a configuration asks for.

    Args:
        labels: the configuration's `labels`.
        others: verifiers that training sets name beside `labels.verifier`.

    Raises:
        ValueError: a verifier cannot be loaded.
    """
    return Labeller(
        labels.verifier,
        workers=labels.workers,
        timeout_seconds=labels.timeout_seconds,
        memory_mib=labels.memory_mib,
        sandbox=labels.sandbox,
        require_think=labels.require_think,
        require_boxed=labels.require_boxed,
        excluded=labels.excluded,
        overlong=labels.overlong,
        threshold=labels.threshold,
        max_failed_share=labels.max_failed_share,
        others=others,
    )
