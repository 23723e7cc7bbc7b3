"""A run at a glance: curves.png from metrics.jsonl and evaluations.jsonl."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_real.runs.rows import read_rows

# Okabe and Ito's colours, which people with any kind of colour blindness tell apart.
_BLUE, _ORANGE, _GREEN, _GREY, _INK = "#0072B2", "#D55E00", "#009E73", "#8a8a8a", "#333333"


def plot_curves(metrics: Path, evaluations: Path, out: Path, *, title: str = "") -> None:
    """Draws accuracy, loss, groups, scores, gradient and responses over the steps; nothing where no step is done yet.

    Faint lines are the steps themselves, strong ones their moving average (over a 30th of the run). Lines that are not
    rows, such as one that was cut, are left out.
    """
    rows = _with_steps(metrics)
    held = _with_steps(evaluations)
    if not rows:
        return
    from matplotlib import rc_context

    style: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold"}
    style |= {"axes.titlelocation": "left", "axes.edgecolor": _GREY}
    style |= dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color"], _INK)
    with rc_context(style):
        _Figure(rows, held).draw(out, title)


class _Figure:
    """The six panels of one run."""

    def __init__(self, rows: Sequence[dict[str, Any]], held: Sequence[dict[str, Any]]) -> None:
        self.rows, self.held = rows, held
        self.steps = [row["step"] for row in rows]

    def draw(self, out: Path, title: str) -> None:
        from matplotlib.figure import (
            Figure,
        )  # a Figure of its own leaves pyplot's global state and backend alone

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
        rewards = [v for v in self._values("reward_mean") if math.isfinite(v)]
        if self.held:
            at = [row["step"] for row in self.held]
            found, error = (
                _column(self.held, "heldout/pass_at_1"),
                _column(self.held, "heldout/standard_error"),
            )
            label = "held-out accuracy (+- standard error)"
            axis.errorbar(
                at,
                found,
                yerr=error,
                color=_ORANGE,
                marker="o",
                ms=4,
                lw=1.8,
                capsize=3,
                label=label,
            )
            beside = {"textcoords": "offset points", "color": _ORANGE, "ha": "center"}
            for i in sorted({0, len(at) - 1}):
                axis.annotate(f"{found[i]:.3f}", (at[i], found[i]), (0, -16), **beside)
        if all(0 <= v <= 1 for v in rewards):
            axis.set_ylim(-0.02, 1.02)
        axis.set_title("accuracy")
        _legend(axis, "lower right")

    def _loss(self, axis: Any) -> None:
        self._line(axis, "loss", _BLUE, "")
        skipped = [
            s for s, v in zip(self.steps, self._values("skipped_updates"), strict=True) if v > 0
        ]
        for i, step in enumerate(skipped):
            axis.axvline(
                step, color=_ORANGE, lw=1, ls=":", label="skipped update" if i == 0 else None
            )
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
            self._mismatch(axis)  # one update a step: every score is 0
            return
        for name, color in (("positive", _GREEN), ("negative", _ORANGE)):
            low, high = self._values(f"score_{name}_p5"), self._values(f"score_{name}_p95")
            axis.fill_between(
                self.steps, _smooth(low), _smooth(high), color=color, alpha=0.15, lw=0
            )
            self._line(axis, f"score_{name}_mean", color, f"{name}s, with 5-95 %")
        axis.axhline(0, color=_GREY, lw=0.8)
        axis.set_title("scores: mean log-ratio (nats)")
        _legend(axis)

    def _mismatch(self, axis: Any) -> None:
        self._line(axis, "mismatch_mean_abs", _BLUE, "mean |difference|")
        self._line(axis, "mismatch_k3", _ORANGE, "k3")
        axis.set_title("log-probs of trainer and engine (nats)")
        axis.set_ylim(bottom=0)
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
        """Two metrics of unlike units, each with a scale from 0 in its line's colour. Returns the right axis."""
        twin = axis.twinx()
        twin.spines[["top", "left"]].set_visible(False)
        for side, (name, label), color in ((axis, left, _BLUE), (twin, right, _ORANGE)):
            self._line(side, name, color, "")
            side.set_ylabel(label, color=color)
            side.tick_params(axis="y", colors=color)
            side.set_ylim(bottom=0)
        return twin

    def _line(self, axis: Any, name: str, color: str, label: str) -> None:
        raw = self._values(name)
        smooth = _smooth(raw)
        if smooth != raw:
            axis.plot(self.steps, raw, color=color, lw=0.8, alpha=0.3)
        axis.plot(
            self.steps,
            smooth,
            color=color,
            lw=1.8,
            marker="o" if len(raw) < 3 else None,
            ms=4,
            label=label,
        )

    def _values(self, name: str) -> list[float]:
        return _column(self.rows, name)


def _with_steps(file: Path) -> list[dict[str, Any]]:
    rows, _ = read_rows(file)
    return [row for row in rows if isinstance(row.get("step"), int)]


def _column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    values = [row.get(name) for row in rows]
    return [math.nan if v is None else v for v in values]


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred moving average over a 30th of the run; NaN stays NaN and is left out of its neighbours' averages."""
    half = len(values) // 60
    if not half:
        return list(values)
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [
        _finite_mean(w) if math.isfinite(v) else math.nan
        for v, w in zip(values, windows, strict=True)
    ]


def _finite_mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite)


def _legend(axis: Any, where: str = "best") -> None:
    if axis.get_legend_handles_labels()[1]:
        axis.legend(loc=where, framealpha=0.85, edgecolor="none", fontsize=8)
