"""Draws Figure 1 of the paper: how strongly GRPO and REAL pull at a rollout,
by how far the policy has moved on it.

    python tools/plot_gradient_weights.py --out docs/gradient_weights.png

Both curves come from the library's own functions. The x axis is the log-ratio s: of one token in
GRPO, its mean over the response in REAL. GRPO pulls least at the correct answers the policy is
losing and most at the wrong ones it is moving towards, without bound; REAL's pull grows with the
mistake and never exceeds 1 / tau.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from megatron_real.objective import grpo_weights, real_weights
from megatron_real.records import NEGATIVE, POSITIVE

TAU = 0.5
EPSILON = 0.2
C = 4  # the paper's C+ and C-: 1 + the sum of e^z over the other rollouts of the same side
Y_MAX = 3.6
GRPO_COLOR = "#c0392b"
REAL_COLOR = "#1f4e9c"
MUTED = "#6b7280"
NOTES = {  # label: (text, x, y, color) of what there is to see
    POSITIVE: [
        ("most at what\nis being lost", -1.03, 1.52, REAL_COLOR),
        ("least at what\nis being lost", -2.35, 0.42, GRPO_COLOR),
        ("clipped", 0.27, 0.62, GRPO_COLOR),
    ],
    NEGATIVE: [
        ("no bound", 0.36, 2.85, GRPO_COLOR),
        ("bounded", 1.72, 1.5, REAL_COLOR),
        ("clipped", -0.86, 0.62, GRPO_COLOR),
    ],
}


def real_magnitude(score_X: Tensor, label: int) -> Tensor:
    """[X] |w| of a rollout at each score, one group for each: C - 1 more rollouts of its side,
    at score 0, make C.
    """
    num_others = C - 1
    other_side = POSITIVE
    if label == POSITIVE:
        other_side = NEGATIVE
    score_XG = torch.zeros(len(score_X), 1 + num_others + 1, dtype=score_X.dtype)
    score_XG[:, 0] = score_X
    label_XG = torch.tensor([label] * (1 + num_others) + [other_side]).expand_as(score_XG)
    group_XG = torch.arange(len(score_X)).unsqueeze(1).expand_as(score_XG)
    weight_R = real_weights(
        score_XG.flatten(), label_XG.flatten(), group_XG.flatten(), tau=TAU, num_groups=1
    )
    return weight_R.view_as(score_XG)[:, 0].abs()


def grpo_magnitude(log_ratio_X: Tensor, label: int) -> Tensor:
    """[X] |w| of a token at each log-ratio, for an advantage of +1 or -1."""
    advantage = -1.0
    if label == POSITIVE:
        advantage = 1.0
    return grpo_weights(log_ratio_X, torch.full_like(log_ratio_X, advantage), epsilon=EPSILON).abs()


def draw(path: Path) -> None:
    """Writes the figure."""
    score_X = torch.linspace(-2.5, 2.5, 2001, dtype=torch.float64)
    plt.rcParams.update(
        {"font.size": 10.5, "axes.edgecolor": MUTED, "mathtext.fontset": "dejavusans"}
    )
    figure, panels = plt.subplots(1, 2, figsize=(10.4, 4.4), sharey=True, layout="constrained")
    for panel, label, title in zip(
        panels, (POSITIVE, NEGATIVE), ("Correct rollout", "Wrong rollout"), strict=True
    ):
        panel.axhline(1 / TAU, color=MUTED, linewidth=1, linestyle=(0, (2, 3)))
        panel.axvline(0, color=MUTED, linewidth=0.8, alpha=0.5)
        panel.plot(
            score_X, grpo_magnitude(score_X, label), color=GRPO_COLOR, linewidth=2, label="GRPO"
        )
        panel.plot(
            score_X, real_magnitude(score_X, label), color=REAL_COLOR, linewidth=2.6, label="REAL"
        )
        for text, x, y, color in NOTES[label]:
            panel.text(x, y, text, color=color, fontsize=9.5, linespacing=1.25)
        panel.set(
            xlim=(-2.5, 2.5),
            ylim=(-0.02, Y_MAX),
            xlabel=r"log-ratio  $s = \log\,\pi - \log\,\pi_{old}$  (nats)",
        )
        panel.set_title(title, loc="left", fontweight="bold")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("gradient magnitude  $|w|$")
    panels[0].text(
        2.48, 1 / TAU + 0.06, rf"$1/\tau = {1 / TAU:g}$", color=MUTED, fontsize=9.5, ha="right"
    )
    panels[0].legend(frameon=False, loc="upper left")
    settings = rf"$\tau = {TAU}$,  $C = {C}$,  $\epsilon = {EPSILON}$,  $|A| = 1$"
    panels[1].set_title(settings, loc="right", fontsize=9.5, color=MUTED)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/gradient_weights.png"), help="PNG to write"
    )
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
