"""Draws the paper's figures from the runs of a sweep (docs/results.md).

    python tools/plot_paper.py --sweep runs/results/seeds --figure 2 --out docs/results_figure_2.png
    python tools/plot_paper.py --sweep runs/results/seeds --figure 5 --out docs/results_figure_5.png

Figure 2 is about ratios: which share of the low ones are of right answers, and what clips take
away. Figure 4 is how each method trains; Figure 5 is the same of REAL, REAL without its anchor, and
plain BCE. A line is the mean over seeds, its band from the lowest seed to the highest. Figure 1 is
tools/plot_gradient_weights.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from megatron_real.runs.rows import read_rows

# Okabe and Ito's palette (2008), which colour-blind readers can tell apart; more variants change
# the dash.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("solid", "dashed", "dotted")

TRAINING = (
    ("entropy", "entropy (nats per token)"),
    ("reward_mean", "reward of the step's rollouts"),
    ("solved_share", "share of prompts solved"),
    ("grad_norm", "gradient norm before clipping"),
)
RATIOS = (
    ("low_ratio_positive_share", "of tokens below ratio 0.8:\nshare in right answers"),
    ("low_ratio_share", "share of tokens below ratio 0.8"),
    ("clipped_low_share", "share clipped below ratio 1"),
    ("clipped_high_share", "share clipped above ratio 1"),
)


@dataclass(frozen=True)
class Figure:
    """One of the paper's."""

    panels: Sequence[tuple[str, str]]
    """(metric, title) of each panel."""
    variants: Sequence[str]
    """The variants that it compares, where the sweep has them; empty: all."""


FIGURES = {
    2: Figure(RATIOS, ()),
    4: Figure(TRAINING, ()),
    5: Figure(TRAINING, ("real", "vanilla", "bce")),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sweep",
        type=Path,
        required=True,
        help="the sweep's `out`: VARIANT/seed-N run directories",
    )
    parser.add_argument("--figure", type=int, choices=FIGURES, required=True)
    parser.add_argument("--variants", nargs="+", help="draw these; default: the figure's own")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    options = parser.parse_args()

    figure = FIGURES[options.figure]
    present = [path.parent.name for path in options.sweep.glob("*/seed-*")]
    present = sorted(set(present), key=lambda name: (name != "real", name))
    variants = options.variants or [v for v in figure.variants or present if v in present]
    missing = sorted(set(variants) - set(present))
    if missing or not variants:
        print(
            f"plot_paper: {options.sweep} has no runs of {', '.join(missing) or 'any variant'}; "
            f"it has {', '.join(present) or 'none'}",
            file=sys.stderr,
        )
        sys.exit(2)
    draw(figure, options.sweep, variants, options.out)


def draw(figure: Figure, sweep: Path, variants: Sequence[str], out: Path) -> None:
    """Writes the figure."""
    columns = 2
    rows = -(-len(figure.panels) // columns)
    canvas, axes = pyplot.subplots(
        rows, columns, figsize=(9.6, 2.9 * rows), sharex=True, layout="constrained"
    )
    for axis, (metric, title) in zip(axes.flat, figure.panels, strict=True):
        for number, variant in enumerate(variants):
            curves_SN = curves(sweep / variant, metric)
            if curves_SN.size:
                color = COLORS[number % len(COLORS)]
                draw_mean(axis, curves_SN, color, DASHES[number // len(COLORS)], variant)
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step")

    # Every variant has a line in every panel: one legend serves all.
    handles, labels = axes.flat[-1].get_legend_handles_labels()
    canvas.legend(
        handles, labels, loc="outside lower center", ncols=min(9, len(labels)), frameon=False
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(out, dpi=150)
    pyplot.close(canvas)


def curves(variant: Path, metric: str) -> NDArray[np.float64]:
    """[seeds, steps] of a metric, NaN where a step has no such figure;
    of runs that have the most steps.
    """
    curves = []
    for run in sorted(variant.glob("seed-*")):
        rows, _ = read_rows(run / "metrics.jsonl")
        # float64 turns None into NaN.
        curves.append(np.array([row.get(metric) for row in rows], dtype=np.float64))
    steps = max(map(len, curves), default=0)
    return np.array([curve for curve in curves if len(curve) == steps])


def draw_mean(axis: Axes, curves_SN: NDArray[np.float64], color: str, dash: str, name: str) -> None:
    """The mean over seeds, and a band over their range."""
    known = np.isfinite(curves_SN).any(axis=0)  # a step in which no seed has the figure is left out
    step_N = 1 + np.flatnonzero(known)
    mean_N = np.nanmean(curves_SN[:, known], axis=0)
    axis.plot(step_N, mean_N, color=color, linestyle=dash, linewidth=1.8, label=name)
    if len(curves_SN) > 1:
        lowest_N = np.nanmin(curves_SN[:, known], axis=0)
        highest_N = np.nanmax(curves_SN[:, known], axis=0)
        axis.fill_between(step_N, lowest_N, highest_N, color=color, alpha=0.12, linewidth=0)


if __name__ == "__main__":
    main()
