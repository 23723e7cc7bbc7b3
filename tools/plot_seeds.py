"""Draws the held-out accuracy of several runs over their steps:
the quickstart's seeds and its control.

python tools/plot_seeds.py --out docs/quickstart_seeds.png --runs runs/seed-1 runs/seed-2 --controls
runs/permuted-1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the held-out accuracy of several runs.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="run directories trained by REAL"
    )
    parser.add_argument(
        "--controls",
        type=Path,
        nargs="*",
        default=[],
        help="run directories with labels.permute=true",
    )
    options = parser.parse_args()

    figure, axis = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for kind, runs, color in (
        ("REAL", options.runs, "#2f6db3"),
        ("labels permuted", options.controls, "#8a8a8a"),
    ):
        for i, run in enumerate(runs):
            rows = [
                json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()
            ]
            accuracy, error = (
                [row[f"heldout/{k}"] for row in rows] for k in ("pass_at_1", "standard_error")
            )
            steps = [row["step"] for row in rows]
            # One entry in the legend for all seeds.
            label = None
            if i == 0:
                label = f"{kind}, {len(runs)} seeds"
            axis.errorbar(
                steps, accuracy, yerr=error, color=color, lw=1.5, marker="o", ms=3, label=label
            )
    axis.set(xlabel="step", ylabel="held-out pass@1", ylim=(0, 1.02))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
