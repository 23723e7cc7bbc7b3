"""Completion + gold answers -> positive, negative or excluded. A failed check is excluded and counted, never a 0."""

from megatron_real.labels.labeller import Labeller, RewardNeedsThreshold, TooManyFailedChecks

__all__ = ["Labeller", "RewardNeedsThreshold", "TooManyFailedChecks"]
