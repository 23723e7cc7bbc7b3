"""The picture of a run: what is drawn in it, and what a short or broken run gives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from megatron_real.runs.curves import _smooth, plot_curves


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics_row(step: int, **changes: float | None) -> dict[str, Any]:
    row = {
        "step": step,
        "reward_mean": 0.5,
        "loss": 2.0 + step,
        "one_class_share": 0.25,
        "solved_share": 0.125,
        "excluded_share": 0.0,
        "truncated_share": 0.0,
        "score_positive_mean": 0.1,
        "score_positive_p5": 0.0,
        "score_positive_p95": 0.2,
        "score_negative_mean": -0.1,
        "score_negative_p5": -0.2,
        "score_negative_p95": 0.0,
        "grad_norm": 1.0,
        "max_abs_weight_tau": 0.5,
        "response_tokens_mean": 30.0,
        "entropy": 0.3,
        "skipped_updates": 0.0,
    }
    return row | changes


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collects figures as they are saved."""
    saved: list[Figure] = []
    savefig = Figure.savefig

    def remembered(figure: Figure, *arguments: Any, **options: Any) -> None:
        saved.append(figure)
        savefig(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", remembered)
    return saved


def test_the_figure_shows_the_run(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [
        metrics_row(1),
        metrics_row(2, loss=None, grad_norm=None, skipped_updates=1.0),
        metrics_row(3),
    ]
    held = [
        {"step": 0, "heldout/pass_at_1": 0.25, "heldout/standard_error": 0.02},
        {"step": 3, "heldout/pass_at_1": 0.75, "heldout/standard_error": 0.03},
    ]
    backend = matplotlib.get_backend()
    out = tmp_path / "curves.png"
    plot_curves(
        write(tmp_path / "m.jsonl", rows), write(tmp_path / "e.jsonl", held), out, title="first run"
    )

    assert out.read_bytes().startswith(b"\x89PNG") and matplotlib.get_backend() == backend

    (figure,) = figures
    titles = [axis.get_title(loc="left") for axis in figure.axes[:6]]
    assert [t.split(",")[0].split(":")[0] for t in titles] == [
        "accuracy",
        "loss",
        "shares",
        "scores",
        "gradient",
        "response length",
    ]

    accuracy, loss = figure.axes[:2]
    (bars,) = accuracy.containers
    assert isinstance(bars, ErrorbarContainer)

    line, _, (spread,) = bars.lines
    assert numpy.asarray(line.get_xydata()).tolist() == [[0, 0.25], [3, 0.75]]
    assert spread.get_segments()[1].tolist() == [[3, 0.72], [3, 0.78]], (
        "one standard error each way"
    )
    assert [t.get_text() for t in accuracy.texts] == ["0.250", "0.750"]

    curve = numpy.asarray(loss.lines[0].get_ydata())
    assert curve[0] == 3.0 and math.isnan(curve[1]) and curve[2] == 5.0, "a skipped step is a gap"
    assert loss.lines[1].get_xdata() == [2, 2] and loss.lines[1].get_label() == "skipped update"
    assert figure.get_suptitle() == "first run"


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([metrics_row(1)], id="one step"),
        pytest.param([{"step": 1, "loss": None}, {"step": 2}], id="no figures"),
        pytest.param(
            [metrics_row(1, reward_mean=-3.0), metrics_row(2, reward_mean=40.0)],
            id="rewards beyond 0..1",
        ),
    ],
)
def test_odd_runs_are_drawn_without_evaluations(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    out = tmp_path / "curves.png"
    plot_curves(write(tmp_path / "m.jsonl", rows), tmp_path / "none.jsonl", out)
    assert out.stat().st_size > 10_000


def test_a_run_without_a_finished_step_draws_nothing(tmp_path: Path) -> None:
    plot_curves(tmp_path / "none.jsonl", tmp_path / "none.jsonl", tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_row_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    plot_curves(tmp_path / "m.jsonl", tmp_path / "none.jsonl", tmp_path / "c.png")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_the_moving_average_keeps_gaps_and_is_not_spoilt_by_them() -> None:
    values = [float(i) for i in range(120)]  # a window of 2 each way
    values[50] = math.nan
    smooth = _smooth(values)
    assert smooth[0] == 1.0 and smooth[20] == 20.0  # mean of 0, 1, 2; mean of 18..22
    assert math.isnan(smooth[50]) and smooth[49] == (47 + 48 + 49 + 51) / 4
    assert _smooth(values[:20]) == values[:20], "short runs are drawn as they are"
