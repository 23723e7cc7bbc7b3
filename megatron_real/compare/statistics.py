"""Means over seeds, and differences between two variants that had the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
"""Of the intervals."""
_RESAMPLES = 9999
"""Of the bootstrap. The generator's seed is fixed: the same runs give the same interval."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    """NaN of nothing, or where a value is not finite."""
    standard_error: float
    """s / sqrt(count) with the sample standard deviation s; NaN for fewer than two values."""
    count: int
    """Seeds."""


@dataclass(frozen=True)
class Difference(Mean):
    """A variant minus the first one: the mean over the seeds that both have finished."""

    low: float
    """Lower end of the confidence interval; NaN for fewer than two seeds."""
    high: float
    """Upper end."""


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Returns the mean and its standard error."""
    if not values or not all(map(math.isfinite, values)):
        return Mean(math.nan, math.nan, len(values))
    error = math.nan
    if len(values) > 1:
        error = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), error, len(values))


def paired_difference(first: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """Returns `other` minus `first`, seed by seed.

    Two runs of one seed see the same prompts in the same order and are evaluated by the same draws. What they share
    cancels in their difference, so that the interval is of the differences and not of the two means. A seed that only
    one of them has says nothing about the difference and is left out.

    The interval is the bias-corrected and accelerated bootstrap (BCa) over seeds.

    Args:
        first: {seed: figure} of the variant that the others are compared with.
        other: {seed: figure}.
    """
    seeds = sorted(first.keys() & other.keys())
    differences = [other[seed] - first[seed] for seed in seeds]
    mean = mean_over_seeds(differences)
    low = high = math.nan
    if math.isfinite(mean.standard_error):
        low, high = _interval(differences)
    return Difference(mean.value, mean.standard_error, mean.count, low, high)


def _interval(values: Sequence[float]) -> tuple[float, float]:
    if min(values) == max(values):
        return values[0], values[0]  # BCa has no acceleration where nothing varies
    result = scipy.stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)
