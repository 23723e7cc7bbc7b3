"""The tables of a report.

They say what ran and what differs, time by rank, faults and restarts, and evaluations.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_real.records import Status
from megatron_real.report.variants import Run
from megatron_real.runs.summary import duration


@dataclass(frozen=True)
class Table:
    """A table of texts."""

    head: Sequence[str]
    """[columns] names."""
    rows: Sequence[Sequence[str]]
    """[rows][columns] cells."""


def overview(runs: Sequence[Run]) -> Table:
    """Says what ran, and how far it came."""
    head = ["run", "state", "steps", "objective", "model", "reward, last steps", "time in steps"]
    rows = []
    for run in runs:
        seconds: list[float] = []
        for row in run.steps:
            seconds += [row[name] or 0.0 for name in row if name.startswith("seconds/")]

        num_steps = _setting(run.config, "trainer.steps")
        done = 0
        if run.steps:
            done = run.steps[-1]["step"]

        rows.append(
            [
                run.name,
                str(run.status.get("state", "")),
                f"{done} of {num_steps}",
                str(_setting(run.config, "objective.name")),
                str(_setting(run.config, "model.path")),
                # A single step's reward is noisy.
                _number(_mean(run.steps[-5:], "reward_mean")),
                duration(math.fsum(seconds)),
            ]
        )
    return Table(head, rows)


def differences(runs: Sequence[Run]) -> Table:
    """Lists the settings in which the runs differ, with a column for each run."""
    flat = [flattened(run.config) for run in runs]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    rows = []
    for name in names:
        # As texts: a value may be a list, which a set cannot hold.
        values = [_text(settings.get(name)) for settings in flat]
        if len(set(values)) > 1:
            rows.append([name, *values])
    return Table(["setting", *(run.name for run in runs)], rows)


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns every setting under its dotted name."""
    settings: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            settings |= flattened(value, f"{prefix}{name}.")
        else:
            settings[f"{prefix}{name}"] = value
    return settings


def rank_times(runs: Sequence[Run]) -> Table:
    """Lists each stage's time on the fastest, mean and slowest rank, as means over the steps.

    The last column is the rank that was the slowest most often.
    """
    rows = []
    for run in runs:
        names = dict.fromkeys(name for row in run.steps for name in row)
        for name in names:
            # Each stage has rank_seconds/STAGE_min, _mean, _max and _slowest.
            if not name.startswith("rank_seconds/") or not name.endswith("_max"):
                continue
            stem = name.removesuffix("_max")
            means = [_number(_mean(run.steps, f"{stem}_{of}")) for of in ("min", "mean", "max")]

            # A rank that is always the slowest is a slow GPU or link; one that changes is chance.
            ranks = Counter(row[f"{stem}_slowest"] for row in run.steps if f"{stem}_slowest" in row)
            often = "-"
            for rank, times in ranks.most_common(1):
                often = f"rank {rank:.0f} ({times / len(run.steps):.0%} of the steps)"
            rows.append([run.name, stem.removeprefix("rank_seconds/"), *means, often])

    return Table(
        ["run", "stage", "fastest rank (s)", "mean (s)", "slowest (s)", "most often"], rows
    )


def exchange(runs: Sequence[Run]) -> Table:
    """Says how far trainer and engine were apart, and what bringing the weights over cost."""
    of_mismatch = ("mismatch_mean_abs", "mismatch_k3", "mismatch_share", "mismatch_max_abs")
    names = (*of_mismatch, "seconds/sync", "lag")
    rows = []
    for run in runs:
        for name in names:
            values = [row[name] for row in run.steps if row.get(name) is not None]
            if values:
                figures = (math.fsum(values) / len(values), max(values), values[-1])
                rows.append([run.name, name, *map(_number, figures)])
    return Table(["run", "figure", "mean over the steps", "largest", "last step"], rows)


def events(runs: Sequence[Run]) -> Table:
    """Lists starts and restarts, skipped updates, failed checks and completions, and the end."""
    failed = [f"status/{status}" for status in Status if status.failed]
    rows = []
    for run in runs:
        for number, life in enumerate(run.lives, 1):
            changed = "; ".join(map(str, life.get("changed") or []))
            what = f"start {number}: {life.get('processes')} processes, from {life.get('from')}"
            if changed:
                what += f"; {changed}"
            rows.append([run.name, str(life.get("time", "")), what])

        for row in run.steps:
            skipped = row.get("skipped_updates")
            if skipped:
                what = f"{skipped:.0f} updates skipped: loss or gradient not finite"
                rows.append([run.name, f"step {row['step']}", what])

            counts = {name.removeprefix("status/"): row.get(name) or 0 for name in failed}
            lost = ", ".join(f"{count:.0f} {name}" for name, count in counts.items() if count)
            if lost:
                what = f"rollouts without a verdict: {lost}"
                rows.append([run.name, f"step {row['step']}", what])

        end = str(run.status.get("state"))
        reason = run.status.get("reason")
        if reason:
            end += f": {reason}"
        rows.append([run.name, str(run.status.get("time", "")), end])
    return Table(["run", "when", "what"], rows)


def held_out(runs: Sequence[Run]) -> Table:
    """Lists the first, best and last accuracy on held-out problems, with standard errors."""
    name = "heldout/pass_at_1"
    rows = []
    for run in runs:
        figures = [row for row in run.evaluations if row.get(name) is not None]
        if not figures:
            continue
        # Of equally good ones, the earliest.
        best = max(figures, key=lambda row: float(row[name]))

        cells = [run.name]
        for row in (figures[0], best, figures[-1]):
            accuracy = _with_error(row[name], row.get("heldout/standard_error"))
            cells.append(f"{accuracy} (step {row['step']})")
        rows.append([*cells, f"{figures[-1].get('heldout/problems') or 0:.0f}"])
    return Table(["run", "first", "best", "last", "problems"], rows)


def _with_error(accuracy: float, error: float | None) -> str:
    if error is None:
        return f"{accuracy:.4f}"
    return f"{accuracy:.4f} \N{PLUS-MINUS SIGN} {error:.4f}"


def benchmarks(directories: Sequence[str]) -> Table:
    """Lists the results of `megatron-real eval`, with standard errors.

    Raises:
        ValueError: a directory has no results.
    """
    rows = []
    for directory in directories:
        file = Path(directory) / "results.json"
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            of_benchmarks = {**results["benchmarks"], "average": results["average"]}

            for name, row in of_benchmarks.items():
                accuracy = _with_error(row["pass_at_1"], row.get("standard_error"))
                figures = [accuracy, _number(row.get("majority"))]
                sizes = [str(row.get("problems", "")), str(row.get("samples", ""))]
                rows.append([str(results["model"]), name, *figures, *sizes])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{file} holds no results ({type(error).__name__}: {error}); "
                "give the --out of a finished `megatron-real eval`"
            ) from error

    return Table(["model", "benchmark", "pass@1", "majority", "problems", "samples"], rows)


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Returns the mean of a metric over the rows that have it; NaN where none has."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return math.nan
    return math.fsum(values) / len(values)


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4g}"


def _setting(config: Mapping[str, Any], name: str) -> Any:
    return flattened(config).get(name, "-")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    # As JSON, so that true and null read as in the file; a text is shown without its quotes.
    return json.dumps(value, default=str).strip('"')
