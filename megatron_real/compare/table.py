"""The table of a sweep: a row for each variant, and the same as JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_real.compare.results import RunOutcome, RunResult
from megatron_real.compare.statistics import (
    CONFIDENCE,
    Difference,
    Mean,
    mean_over_seeds,
    paired_difference,
)
from megatron_real.compare.sweep import Sweep
from megatron_real.disk import whole_file, write_whole

FIGURES = ("accuracy", "reward")
"""Figures of a run that are compared."""


@dataclass(frozen=True)
class VariantRow:
    """A variant: how its runs ended, and figures over those that finished."""

    variant: str
    runs: int
    """Number of runs that the sweep has of it."""
    counts: dict[RunOutcome, int]
    """Number of runs by their outcome."""
    means: dict[str, Mean]
    """Mean over the finished runs, by figure."""
    differences: dict[str, Difference]
    """Difference to the first variant, by figure; empty for the first variant itself."""
    seconds: Mean
    """Wall clock of a finished run."""
    tokens: Mean
    """Response tokens of a finished run."""
    skipped_updates: int
    """Number of skipped updates of all runs."""


def variant_rows(sweep: Sweep, results: Sequence[RunResult]) -> list[VariantRow]:
    """Returns a row for each variant, in the order of the sweep."""
    rows = []
    for variant in sweep.variants:
        of_variant = [result for result in results if result.variant == variant]
        # A diverged run has figures too, and is counted instead: in a mean they would hide it.
        finished = [result for result in of_variant if result.outcome == RunOutcome.FINISHED]
        # Every outcome has a count, 0 too, and so a column in each row of the CSV file.
        counts = dict.fromkeys(RunOutcome, 0)
        for result in of_variant:
            counts[result.outcome] += 1

        means = {}
        differences = {}
        for figure in FIGURES:
            means[figure] = mean_over_seeds([getattr(result, figure) for result in finished])
            # The first variant is what the others are compared with.
            if variant != sweep.variants[0]:
                differences[figure] = _difference(results, sweep.variants[0], variant, figure)

        row = VariantRow(
            variant=variant,
            runs=len(of_variant),
            counts=counts,
            means=means,
            differences=differences,
            seconds=mean_over_seeds([result.seconds for result in finished]),
            tokens=mean_over_seeds([float(result.tokens) for result in finished]),
            skipped_updates=sum(result.skipped_updates for result in of_variant),
        )
        rows.append(row)
    return rows


def _difference(results: Sequence[RunResult], first: str, variant: str, figure: str) -> Difference:
    """Returns the difference of two variants in a figure.

    For the accuracy, the accuracies of each problem narrow the interval.
    """
    first_figures = _by_seed(results, first, figure)
    figures = _by_seed(results, variant, figure)
    if figure != "accuracy":
        return paired_difference(first_figures, figures)
    return paired_difference(
        first_figures,
        figures,
        first_problems=_by_seed(results, first, "accuracy_of"),
        other_problems=_by_seed(results, variant, "accuracy_of"),
    )


def _by_seed(results: Sequence[RunResult], variant: str, figure: str) -> dict[int, Any]:
    """Returns a figure of a variant's finished runs, by seed."""
    return {
        result.seed: getattr(result, figure)
        for result in results
        if result.variant == variant and result.outcome == RunOutcome.FINISHED
    }


def as_json(sweep: Sweep, results: Sequence[RunResult]) -> dict[str, Any]:
    """Returns the table and every run as plain values; what is not finite is null."""
    rows = variant_rows(sweep, results)
    runs = []
    for result in results:
        run = dataclasses.asdict(result)
        del run["accuracy_of"]  # a number for each problem, which the run's own directory has
        runs.append(run)

    whole = {
        "compared_with": sweep.variants[0],
        "confidence": CONFIDENCE,
        "budget_rollouts": sweep.budget,
        "seeds": sweep.seeds,
        "variants": [dataclasses.asdict(row) for row in rows],
        "runs": runs,
    }
    plain: dict[str, Any] = _finite(whole)
    return plain


def _finite(value: Any) -> Any:
    """Returns plain values with None for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {str(name): _finite(below) for name, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(below) for below in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_table(sweep: Sweep, results: Sequence[RunResult]) -> None:
    """Writes table.json and table.csv into the sweep's directory."""
    whole = as_json(sweep, results)
    write_whole(sweep.out / "table.json", json.dumps(whole, indent=2) + "\n")
    flat = [_flat(row) for row in whole["variants"]]
    # The first variant has no differences, so that no single row has all columns.
    columns = list(dict.fromkeys(name for row in flat for name in row))
    with whole_file(sweep.out / "table.csv", newline="") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(flat)


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a row whose nested values have joined names, such as means.accuracy.value."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        path = f"{prefix}{name}"
        if isinstance(value, dict):
            flat |= _flat(value, f"{path}.")
        else:
            flat[path] = value
    return flat


def runs_table(rows: Sequence[VariantRow]) -> list[list[str]]:
    """Returns the cells of the table of runs: how they ended, and what a finished one took."""
    table = [["variant", "finished", "diverged", "failed", "minutes", "tokens"]]
    for row in rows:
        counts = [row.counts[outcome] for outcome in (RunOutcome.DIVERGED, RunOutcome.FAILED)]
        minutes = "-"
        if row.seconds.count:
            minutes = f"{row.seconds.value / 60:.1f}"
        tokens = "-"
        if row.tokens.count:
            tokens = f"{row.tokens.value:,.0f}"

        finished = f"{row.counts[RunOutcome.FINISHED]} of {row.runs}"
        table.append([row.variant, finished, *map(str, counts), minutes, tokens])
    return table


def figure_table(figure: str, rows: Sequence[VariantRow]) -> list[list[str]]:
    """Returns the cells of a figure's table, [] where no run has the figure."""
    if not any(math.isfinite(row.means[figure].value) for row in rows):
        return []

    interval = f"{CONFIDENCE:.0%} interval"
    table = [[figure, "mean", "std error", "difference", interval, "pairs"]]
    for row in rows:
        mean = row.means[figure]
        difference = row.differences.get(figure)
        cells = [row.variant, _number(mean.value), _number(mean.standard_error)]
        if difference is None:
            # The first variant, which is compared with no other.
            cells += ["-", "-", "-"]
        else:
            # A single pair of seeds has a difference, but no interval.
            between = "-"
            if math.isfinite(difference.low):
                between = f"{difference.low:+.3f} to {difference.high:+.3f}"
            cells += [_number(difference.value, "+"), between, str(difference.count)]
        table.append(cells)
    return table


def _number(value: float, sign: str = "") -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:{sign}.3f}"
