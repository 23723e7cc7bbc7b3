"""Draws how far engine and trainer differ over the steps of runs:
the mismatch metrics of docs/rollouts.md.

python tools/plot_mismatch.py --out docs/mismatch.png --runs "SmolLM2, bf16=runs/smollm2/run"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

PANELS = {
    "mismatch_mean_abs": "mean |d| (nats)",
    "mismatch_max_abs": "max |d| (nats)",
    "mismatch_k3": "k3 (nats)",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Draws the mismatch of engine and trainer of several runs."
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--runs", nargs="+", required=True, metavar="NAME=RUN_DIR", help="curves and their runs"
    )
    options = parser.parse_args()

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(10, 3), layout="constrained")
    for word in options.runs:
        name, _, run = word.partition("=")
        rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        for axis, metric in zip(axes, PANELS, strict=True):
            axis.plot(
                [row["step"] for row in rows], [row[metric] for row in rows], lw=1.5, label=name
            )
    for axis, label in zip(axes, PANELS.values(), strict=True):
        axis.set(xlabel="step", ylabel=label, yscale="log")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.savefig(options.out, dpi=110)


if __name__ == "__main__":
    main()
