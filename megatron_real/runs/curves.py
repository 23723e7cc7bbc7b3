"""A run at a glance: curves.png from metrics.jsonl and evaluations.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_BLUE, _ORANGE, _GREEN, _GREY = "#2f6db3", "#d9772b", "#3a8f5c", "#8a8a8a"


def plot_curves(metrics: Path, evaluations: Path, out: Path, *, title: str = "") -> None:
    """Draws reward, loss, groups, scores, gradient and lengths over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = _read(metrics)
    steps = [row["step"] for row in rows]

    def curve(name: str) -> list[float]:
        return [row[name] if row.get(name) is not None else float("nan") for row in rows]

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    reward, loss, groups, scores, gradient, length = axes.flat
    reward.plot(steps, curve("reward_mean"), color=_BLUE, lw=1, label="training reward")
    held = _read(evaluations) if evaluations.exists() else []
    if held:
        points, errors = [r["heldout/pass_at_1"] for r in held], [r["heldout/standard_error"] for r in held]
        at = [r["step"] for r in held]
        reward.errorbar(at, points, yerr=errors, color=_ORANGE, marker="o", ms=4, lw=2, label="held-out pass@1")
    reward.set(title="accuracy", ylim=(0, 1))
    loss.plot(steps, curve("loss"), color=_BLUE, lw=1)
    loss.set(title="loss")
    groups.plot(steps, curve("one_class_share"), color=_BLUE, lw=1, label="one class")
    groups.plot(steps, curve("solved_share"), color=_GREEN, lw=1, label="solved")
    groups.plot(steps, curve("excluded_share"), color=_GREY, lw=1, label="excluded rollouts")
    groups.set(title="share of groups", ylim=(0, 1))
    for name, color in (("positive", _GREEN), ("negative", _ORANGE)):
        scores.plot(steps, curve(f"score_{name}_mean"), color=color, lw=1, label=f"{name}s, 5-95 %")
        low, high = curve(f"score_{name}_p5"), curve(f"score_{name}_p95")
        scores.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
    scores.set(title="score: mean log-ratio (nats)")
    gradient.plot(steps, curve("grad_norm"), color=_BLUE, lw=1, label="gradient norm")
    gradient.plot(steps, curve("max_abs_weight_tau"), color=_GREY, lw=1, label="max |w| tau")
    gradient.set(title="gradient", yscale="log")
    length.plot(steps, curve("response_tokens_mean"), color=_BLUE, lw=1, label="response tokens")
    length.plot(steps, curve("entropy"), color=_ORANGE, lw=1, label="entropy (nats)")
    length.set(title="responses")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.suptitle(title)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
