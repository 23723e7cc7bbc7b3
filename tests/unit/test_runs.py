"""Rollouts on disk and the metrics of a step, against values worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_real.records import Completion, Label, Prompt, Rollout, Status, Verdict
from megatron_real.runs.curves import plot_curves
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.metrics import MetricsWriter, rollout_metrics, score_metrics
from megatron_real.runs.peak import peak_tflops
from megatron_real.runs.rollouts import read_rollouts, read_rows, write_rollouts


def rollout(
    group: int, label: int, tokens: int, *, status: Status = Status.OK, finished: bool = True
) -> Rollout:
    logprobs = tuple(-0.1 * (i + 1) for i in range(tokens))
    prompt = Prompt(
        f"d/{group}", "2+3=\n\N{GREEK SMALL LETTER PI}", (1, 2), ("5", "five"), source="aime"
    )
    completion = Completion((7,) * tokens, logprobs, "so\u2028\\boxed{5}", finished)
    verdict = Verdict(status, Label(label), float(label == 1))
    return Rollout(prompt, group, 0, completion, verdict)


# Group 0 solved, group 1 mixed, group 2 all wrong, group 3 wholly excluded.
STEP = [
    rollout(0, 1, 2),
    rollout(0, 1, 4),
    rollout(1, 1, 2),
    rollout(1, 0, 4, status=Status.WRONG),
    rollout(2, 0, 8, status=Status.OVERLONG, finished=False),
    rollout(3, -1, 4, status=Status.TIMEOUT),
]


def test_rollouts_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step-00001.parquet"
    write_rollouts(path, STEP, step=1, scores=[0.5, math.nan, 0, 0, 0, 0], weights=[-0.1] * 6)
    assert read_rollouts(path) == STEP
    rows = list(read_rows(path))
    assert (rows[0]["score"], rows[1]["score"], rows[0]["weight"]) == (0.5, None, -0.1)
    assert list(path.parent.iterdir()) == [path]


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    write_rollouts(path, STEP, step=1)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"r.parquet is not a whole file of rollouts"):
        read_rollouts(path)
    with pytest.raises(ValueError, match="no saved rollouts"):
        read_rollouts(tmp_path / "nothing.parquet")


def test_rollout_metrics() -> None:
    expected = {
        "reward_mean": 3 / 5, "solved_share": 1 / 3, "one_class_share": 2 / 3,
        "excluded_share": 1 / 6, "truncated_share": 1 / 6, "response_tokens_mean": 4.0,
        "response_tokens_max": 8.0, "status/ok": 3.0, "status/overlong": 1.0, "status/timeout": 1.0,
        "status/wrong": 1.0, "status/crashed": 0.0,
    }  # fmt: skip
    metrics = rollout_metrics(STEP)
    assert {name: metrics[name] for name in expected} == expected


def test_score_metrics_leave_out_what_had_no_weight() -> None:
    metrics = score_metrics(STEP, [9, 9, 0.5, -0.25, 9, 9], [0, 0, -1, 1, 0, 0])
    assert (metrics["score_positive_mean"], metrics["score_negative_p95"]) == (0.5, -0.25)
    assert math.isnan(score_metrics(STEP, [0.0] * 6, [0.0] * 6)["score_positive_mean"])


def test_peak_of_known_devices() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", 0.0) == 989.0
    assert peak_tflops("NVIDIA H100 80GB HBM3", 123.0) == 123.0
    assert peak_tflops("cpu", 0.0) is None


def test_metrics_rows_and_curves(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    writer = MetricsWriter(run, trackers=["tensorboard"], config={})
    for step in (1, 2):
        writer.write(step, {"reward_mean": 0.5, "loss": math.nan, "grad_norm": 1.0})
    writer.close()

    assert [json.loads(line) for line in run.metrics.read_text().splitlines()][1] == {
        "step": 2, "reward_mean": 0.5, "loss": None, "grad_norm": 1.0,
    }  # fmt: skip
    assert list(run.tensorboard.iterdir())

    plot_curves(run.metrics, run.evaluations, run.curves)
    assert run.curves.read_bytes().startswith(b"\x89PNG")
