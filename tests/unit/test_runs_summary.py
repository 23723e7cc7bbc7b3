"""A run's summary is made from its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rows import append_row
from megatron_real.runs.summary import duration, next_commands, summary_lines


def test_a_summary_has_before_and_after_time_and_tokens(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in range(1, 5):
        row = {"reward_mean": step / 10, "response_tokens_mean": 10.0}
        append_row(
            run.metrics, {"step": step, **row, "seconds/rollout": 30.0, "seconds/update": 10.0}
        )
    append_row(run.evaluations, {"step": 0, "heldout/pass_at_1": 0.25})
    append_row(run.evaluations, {"step": 4, "heldout/pass_at_1": 0.75})

    assert summary_lines(run, rollouts_per_step=8) == [
        "summary after 4 steps",
        "  held-out accuracy  0.250 after step 0, 0.750 after step 4",
        "  reward             0.150 in the first 2 steps, 0.350 in the last 2",
        "  time in steps      2 min 40 s (rollout 75%, update 25%)",
        "  response tokens    320",
    ]


def test_a_run_without_steps_has_no_summary(tmp_path: Path) -> None:
    assert summary_lines(RunDirectory(tmp_path), rollouts_per_step=8) == []


def test_a_step_without_labels_has_no_reward(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    append_row(run.metrics, {"step": 1, "reward_mean": None, "response_tokens_mean": None})
    assert "nan" in summary_lines(run, rollouts_per_step=8)[1]


def test_weights_that_are_there_can_be_evaluated(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert not any("eval" in line for line in next_commands(run))
    run.weights.mkdir()
    assert f"  megatron-real eval {tmp_path} --bench NAME=FILE" in next_commands(run)


@pytest.mark.parametrize(
    ("seconds", "text"), [(42.4, "42 s"), (200, "3 min 20 s"), (18720, "5 h 12 min")]
)
def test_durations_are_written_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
