"""Means over seeds, and differences between two variants that had the same seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
from numpy.typing import NDArray

CONFIDENCE = 0.95
"""Confidence level of the intervals."""
_RESAMPLES = 9999
"""Resamples of the bootstrap.

The generator's seed is fixed: the same runs give the same interval.
"""
_BATCH = 1000
"""Resamples that are computed together.

It bounds the memory, which is a number for each of their problems and seeds.
"""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    value: float
    """The mean; NaN of no values, or where a value is not finite."""
    standard_error: float
    """s / sqrt(count) with the sample standard deviation s; NaN for fewer than two values."""
    count: int
    """Number of seeds."""


@dataclass(frozen=True)
class Difference(Mean):
    """A variant minus the first one: the mean over the seeds that both have finished."""

    low: float
    """Lower end of the confidence interval; NaN for fewer than two seeds."""
    high: float
    """Upper end of the confidence interval."""
    resampled: str
    """Whose spread is in the interval: "seeds", or "seeds and problems"."""


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Returns the mean and its standard error."""
    if not values or not all(map(math.isfinite, values)):
        return Mean(math.nan, math.nan, len(values))
    error = math.nan
    if len(values) > 1:
        # One value has no spread that could be estimated.
        error = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), error, len(values))


def paired_difference(
    first: Mapping[int, float],
    other: Mapping[int, float],
    *,
    first_problems: Mapping[int, Mapping[str, float]] | None = None,
    other_problems: Mapping[int, Mapping[str, float]] | None = None,
) -> Difference:
    """Returns `other` minus `first`, seed by seed.

    Two runs of one seed see the same prompts in the same order and are evaluated by the same draws.
    What they share cancels in their difference, so that the interval is of the differences and not
    of the two means. A seed that only one of them has says nothing about the difference and is left
    out.

    The interval is the bias-corrected and accelerated bootstrap (BCa) over seeds. Where every run
    says what each problem contributed to its figure, problems are resampled, too, independently of
    the seeds. All runs answer the same problems, so a resample has whole rows and whole columns of
    the seeds x problems table (Owen 2007, arXiv:0708.1850).

    Args:
        first: {seed: figure} of the variant that the others are compared with.
        other: {seed: figure} of the other variant.
        first_problems: {seed: {problem: its figure}}, whose mean over problems is `first`. None, or
            another set of problems for any of the runs, leaves the interval to the seeds.
        other_problems: the same for `other`.
    """
    # In order, so that the bootstrap draws the same resamples every time.
    seeds = sorted(first.keys() & other.keys())
    differences = [other[seed] - first[seed] for seed in seeds]
    mean = mean_over_seeds(differences)

    table_SN = _problem_differences(seeds, first_problems or {}, other_problems or {})
    resampled = "seeds and problems"
    if table_SN is None:
        # A column of the seeds' own differences, as if each run had one problem.
        resampled = "seeds"
        table_SN = np.asarray(differences)[:, None]

    low = math.nan
    high = math.nan
    if math.isfinite(mean.standard_error):
        low, high = _interval(table_SN)
    return Difference(mean.value, mean.standard_error, mean.count, low, high, resampled)


def _problem_differences(
    seeds: Sequence[int],
    first: Mapping[int, Mapping[str, float]],
    other: Mapping[int, Mapping[str, float]],
) -> NDArray[np.float64] | None:
    """Returns the table [seeds, problems] of other - first.

    Returns:
        None where the runs do not all have the same problems.
    """
    # The runs of both variants in one list: one odd run leaves the problems out for all.
    runs = [figures.get(seed, {}) for seed in seeds for figures in (first, other)]
    # A problem that one run has not answered would leave a hole in its row.
    problems = sorted(runs[0]) if runs else []
    if not problems or any(run.keys() != runs[0].keys() for run in runs):
        return None
    rows = [[other[seed][name] - first[seed][name] for name in problems] for seed in seeds]
    return np.asarray(rows)


def _interval(table_SN: NDArray[np.float64]) -> tuple[float, float]:
    """Returns the confidence interval of the mean of a table [seeds, problems].

    A table with a single column is resampled over seeds alone.
    """
    if table_SN.min() == table_SN.max():
        # Nothing varies, so BCa has no acceleration to compute.
        return float(table_SN[0, 0]), float(table_SN[0, 0])

    num_seeds, num_problems = table_SN.shape

    # scipy asks for many resamples at once: seed_S is [..., S], and `axis` its last one.
    def mean_of_seeds(seed_S: Any, axis: int) -> Any:
        return table_SN[seed_S.astype(int), 0].mean(axis)

    def mean_of_both(seed_S: Any, problem_N: Any, axis: int) -> Any:
        # Problems first: a row of the transposed table has a problem's differences of all seeds.
        # Over the resample's problems first, then over its seeds: every seed has the same
        # problems, as in the runs.
        of_each_seed = table_SN.T[problem_N.astype(int)].mean(axis=-2)
        return np.take_along_axis(of_each_seed, seed_S.astype(int), axis).mean(axis)

    # What scipy resamples are the numbers of rows and of columns, [..., S] and [..., N].
    samples: tuple[NDArray[np.int64], ...] = (np.arange(num_seeds), np.arange(num_problems))
    statistic: Any = mean_of_both
    if num_problems == 1:
        samples = samples[:1]
        statistic = mean_of_seeds

    # Seeds and problems are drawn independently: scipy pairs samples only where it is told to.
    result = scipy.stats.bootstrap(
        samples,
        statistic,
        confidence_level=CONFIDENCE,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        vectorized=True,
        method="BCa",
        rng=np.random.default_rng(0),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)
