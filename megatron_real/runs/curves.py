"""A run at a glance: curves.png from metrics.jsonl and evaluations.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_real.runs.rows import read_rows

# Okabe and Ito's colours, which people with any kind of colour blindness tell apart.
_BLUE = "#0072B2"
_ORANGE = "#D55E00"
_GREEN = "#009E73"
_GREY = "#8a8a8a"
_INK = "#333333"


def plot_curves(metrics: Path, evaluations: Path, out: Path, *, title: str = "") -> None:
    """Draws accuracy, loss, groups, scores, gradient and responses over the steps.

    Faint lines are the steps themselves, strong ones their moving average (over a 30th of the run).
    Nothing is drawn where no step is done yet.

    Args:
        metrics: metrics.jsonl; lines that are not rows, such as one that was cut, are left out.
        evaluations: evaluations.jsonl, likewise.
        out: the picture, which is replaced.
        title: above the panels.
    """
    rows = _with_steps(metrics)
    evaluated_rows = _with_steps(evaluations)
    if not rows:
        return

    # matplotlib takes a second to import, and a run without steps has no use for it.
    from matplotlib import rc_context

    style: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold"}
    style |= {"axes.titlelocation": "left", "axes.edgecolor": _GREY}
    style |= dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color"], _INK)
    with rc_context(style):
        _Figure(rows, evaluated_rows).draw(out, title)


class _Figure:
    """The six panels of one run."""

    def __init__(
        self, rows: Sequence[dict[str, Any]], evaluated_rows: Sequence[dict[str, Any]]
    ) -> None:
        self.rows = rows
        self.evaluated_rows = evaluated_rows
        self.steps = [row["step"] for row in rows]

    def draw(self, out: Path, title: str) -> None:
        """Writes the picture."""
        # A Figure of its own leaves pyplot's global state and backend alone.
        from matplotlib.figure import Figure

        # Inches; with dpi below that is 1690 x 884 pixels.
        figure = Figure(figsize=(13, 6.8), layout="constrained")
        axes = figure.subplots(2, 3, sharex=True)
        panels = (
            self._accuracy,
            self._loss,
            self._groups,
            self._scores,
            self._gradient,
            self._responses,
        )
        for axis, panel in zip(axes.flat, panels, strict=True):
            axis.grid(color="#e6e6e6", lw=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            panel(axis)

        for axis in axes[1]:
            axis.set_xlabel("step")
            axis.xaxis.get_major_locator().set_params(integer=True)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=12, weight="bold")

        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130, facecolor="white")

    def _accuracy(self, axis: Any) -> None:
        self._line(axis, "reward_mean", _BLUE, "training reward")
        if self.evaluated_rows:
            steps = [row["step"] for row in self.evaluated_rows]
            accuracies = _column(self.evaluated_rows, "heldout/pass_at_1")
            axis.errorbar(
                steps,
                accuracies,
                yerr=_column(self.evaluated_rows, "heldout/standard_error"),
                color=_ORANGE,
                marker="o",
                ms=4,
                lw=1.8,
                capsize=3,
                label="held-out accuracy (+- standard error)",
            )
            # The first and the last one in figures: they are what a reader asks for.
            beside = {"textcoords": "offset points", "color": _ORANGE, "ha": "center"}
            for i in sorted({0, len(steps) - 1}):
                at = (steps[i], accuracies[i])
                axis.annotate(f"{accuracies[i]:.3f}", at, (0, -16), **beside)

        # Rewards may be of any size. Where they are shares, all runs have the same scale.
        rewards = [value for value in self._values("reward_mean") if math.isfinite(value)]
        if all(0 <= value <= 1 for value in rewards):
            axis.set_ylim(-0.02, 1.02)
        axis.set_title("accuracy")
        _legend(axis, "lower right")

    def _loss(self, axis: Any) -> None:
        self._line(axis, "loss", _BLUE, "")
        # One entry in the legend for all of them.
        label: str | None = "skipped update"
        for step, count in zip(self.steps, self._values("skipped_updates"), strict=True):
            if count > 0:
                axis.axvline(step, color=_ORANGE, lw=1, ls=":", label=label)
                label = None
        axis.set_title("loss")
        _legend(axis)

    def _groups(self, axis: Any) -> None:
        self._line(axis, "one_class_share", _BLUE, "groups of one class")
        self._line(axis, "solved_share", _GREEN, "solved groups")
        self._line(axis, "excluded_share", _GREY, "excluded rollouts")
        self._line(axis, "truncated_share", _ORANGE, "truncated rollouts")
        axis.set(title="shares", ylim=(-0.02, 1.02))
        _legend(axis)

    def _scores(self, axis: Any) -> None:
        names = ("score_positive_mean", "score_negative_mean")
        if not any(value for name in names for value in self._values(name) if math.isfinite(value)):
            # With one update a step every score is 0, and there is nothing to see.
            self._line(axis, "mismatch_mean_abs", _BLUE, "mean |difference|")
            self._line(axis, "mismatch_k3", _ORANGE, "k3")
            axis.set_title("log-probs of trainer and engine (nats)")
            axis.set_ylim(bottom=0)
            _legend(axis)
            return

        for name, color in (("positive", _GREEN), ("negative", _ORANGE)):
            low = _smooth(self._values(f"score_{name}_p5"))
            high = _smooth(self._values(f"score_{name}_p95"))
            axis.fill_between(self.steps, low, high, color=color, alpha=0.15, lw=0)
            self._line(axis, f"score_{name}_mean", color, f"{name}s, with 5-95 %")
        axis.axhline(0, color=_GREY, lw=0.8)
        axis.set_title("scores: mean log-ratio (nats)")
        _legend(axis)

    def _gradient(self, axis: Any) -> None:
        axis.set_title("gradient, and largest weight")
        right = self._pair(
            axis, ("grad_norm", "gradient norm"), ("max_abs_weight_tau", "max |w| tau")
        )
        right.set_ylim(0, 1.05)

    def _responses(self, axis: Any) -> None:
        axis.set_title("response length, and entropy")
        self._pair(
            axis,
            ("response_tokens_mean", "mean length (tokens)"),
            ("entropy", "entropy (nats per token)"),
        )

    def _pair(self, axis: Any, left: tuple[str, str], right: tuple[str, str]) -> Any:
        """Draws two metrics of unlike units, each with a scale from 0 in its line's colour.

        Returns:
            The right axis.
        """
        # The right axis draws over the left one, whose spines stay.
        twin = axis.twinx()
        twin.spines[["top", "left"]].set_visible(False)
        for side, (name, label), color in ((axis, left, _BLUE), (twin, right, _ORANGE)):
            self._line(side, name, color, "")
            side.set_ylabel(label, color=color)
            side.tick_params(axis="y", colors=color)
            side.set_ylim(bottom=0)
        return twin

    def _line(self, axis: Any, name: str, color: str, label: str) -> None:
        """Draws a metric: faintly as it is, and its moving average."""
        raw = self._values(name)
        smooth = _smooth(raw)
        if smooth != raw:
            axis.plot(self.steps, raw, color=color, lw=0.8, alpha=0.3)
        # A line of one point would not be seen.
        marker = "o" if len(raw) < 3 else None
        axis.plot(self.steps, smooth, color=color, lw=1.8, marker=marker, ms=4, label=label)

    def _values(self, name: str) -> list[float]:
        return _column(self.rows, name)


def _with_steps(file: Path) -> list[dict[str, Any]]:
    rows, _ = read_rows(file)
    return [row for row in rows if isinstance(row.get("step"), int)]


def _column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """Returns [rows] the values of a metric, NaN where a row has none."""
    # matplotlib leaves a gap in a line where a value is NaN.
    values = [row.get(name) for row in rows]
    return [math.nan if value is None else value for value in values]


def _smooth(values: Sequence[float]) -> list[float]:
    """Returns the centred moving average over a 30th of the run.

    NaN stays NaN and is left out of its neighbours' averages.
    """
    # Half of a 30th on either side of a value.
    half = len(values) // 60
    if not half:
        return list(values)

    averages = []
    for i, value in enumerate(values):
        if not math.isfinite(value):
            averages.append(math.nan)
            continue

        window = values[max(0, i - half) : i + half + 1]
        finite = [neighbour for neighbour in window if math.isfinite(neighbour)]
        averages.append(sum(finite) / len(finite))

    return averages


def _legend(axis: Any, where: str = "best") -> None:
    # matplotlib warns of a legend without an entry.
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc=where, framealpha=0.85, edgecolor="none", fontsize=8)
