"""The metrics of a step against values worked out by hand, and the files in which they
are written.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_real.records import (
    EXCLUDED,
    NEGATIVE,
    POSITIVE,
    Completion,
    Label,
    Prompt,
    Rollout,
    Status,
    Verdict,
)
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.metrics import (
    MetricsWriter,
    Training,
    engine_metrics,
    percentile,
    rollout_metrics,
    score_metrics,
    speed_metrics,
    step_metrics,
)
from megatron_real.runs.peak import PEAK_TFLOPS, peak_tflops


def rollout(
    group: int,
    label: Label,
    length: int,
    status: Status = Status.OK,
    reward: float | None = None,
    finished: bool = True,
) -> Rollout:
    prompt = Prompt(f"train/{group}", "1+1=", (1, 2), ("2",))
    completion = Completion((7,) * length, (-0.5,) * length, "2", finished)
    return Rollout(prompt, group, 0, completion, Verdict(status, label, reward))


# group 0 solved; group 1 mixed, its wrong one truncated and never checked; group 2 one-class after
# exclusion; group 3 wholly excluded: an exploded check and an empty response.
STEP = [
    rollout(0, POSITIVE, 2, reward=1.0),
    rollout(0, POSITIVE, 4, reward=1.0),
    rollout(1, POSITIVE, 6, reward=1.0),
    rollout(1, NEGATIVE, 8, Status.OVERLONG, finished=False),
    rollout(2, NEGATIVE, 1, Status.WRONG, reward=0.0),
    rollout(2, EXCLUDED, 3, Status.TIMEOUT),
    rollout(3, EXCLUDED, 5, Status.CRASHED),
    rollout(3, EXCLUDED, 0, Status.EMPTY),
]


def training(**changes: Any) -> Training:
    values: dict[str, Any] = {
        "losses": [2.0, 1.0],
        "scores": [0.0, 0.0, 0.25, -0.5, 0.0, 0.0, 0.0, 0.0],
        "weights": [0.0, 0.0, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
        "max_abs_weight_tau": 0.75,
        "grad_norms": [1.0, 4.0],
        "lr": 1e-6,
        "skipped": [],
        "token_means": {"entropy": 0.3},
        "kl": [0.25, 0.75],
        "clipped_low_share": [0.0, 0.5],
        "clipped_high_share": [0.125, 0.125],
        "low_ratio_tokens": [(0, 0, 10), (4, 1, 6)],
        "equal_groups": 2,
        "lag": 0.0,
        "tokens": 18,
        "flops": 6e12,
    }
    return Training(**(values | changes))


def test_rollout_metrics_equal_those_computed_by_hand() -> None:
    assert rollout_metrics(STEP) == pytest.approx(
        {
            "reward_mean": 3 / 5,  # 3 right of the 5 labelled
            "solved_share": 1 / 3,  # group 0 of groups 0, 1, 2
            "one_class_share": 2 / 3,  # groups 0 and 2
            "refilled_share": 0,
            "excluded_share": 3 / 8,
            "truncated_share": 1 / 8,
            "response_tokens_mean": 29 / 8,  # 2+4+6+8+1+3+5+0
            "response_tokens_max": 8,
            "checked_early_share": math.nan,  # no check has a time: a replay
            "check_seconds_max": math.nan,
            "status/ok": 3,
            "status/overlong": 1,
            "status/wrong": 1,
            "status/timeout": 1,
            "status/crashed": 1,
            "status/empty": 1,
            "status/unparsable": 0,
            "status/lost": 0,
            "status/score": 0,
            "status/mismatch": 0,
        },
        nan_ok=True,
    )


def test_figures_of_checks_refills_and_lost_completions_equal_those_by_hand() -> None:
    checked = [
        replace(r, verdict=replace(r.verdict, seconds=s, early=early), refills=refills)
        for r, s, early, refills in zip(
            STEP[:3], [0.5, 2.0, 0.25], [True, False, True], [0, 0, 2], strict=True
        )
    ]
    lost = rollout(2, EXCLUDED, 0, Status.LOST, finished=False)
    metrics = rollout_metrics([*checked, lost])

    assert metrics["checked_early_share"] == 2 / 3
    assert metrics["check_seconds_max"] == 2.0
    assert metrics["refilled_share"] == 1 / 3  # group 1 of 0, 1, 2
    assert (metrics["status/lost"], metrics["excluded_share"]) == (1, 1 / 4)
    assert (metrics["truncated_share"], metrics["response_tokens_mean"]) == (0, 4), (
        "what never came was not cut"
    )


def test_an_empty_response_is_not_labelled_whatever_its_label() -> None:
    metrics = rollout_metrics(
        [rollout(0, POSITIVE, 3, reward=1.0), rollout(0, NEGATIVE, 0, Status.EMPTY)]
    )
    assert metrics["reward_mean"] == 1.0
    assert metrics["solved_share"] == 1.0
    assert metrics["excluded_share"] == 0.5


def test_reward_mean_is_of_rewards_where_a_threshold_makes_the_labels() -> None:
    metrics = rollout_metrics(
        [rollout(0, POSITIVE, 1, reward=0.75), rollout(0, NEGATIVE, 1, reward=0.25)]
    )
    assert metrics["reward_mean"] == 0.5


def test_nothing_labelled_and_nothing_at_all_are_nan_and_no_error() -> None:
    assert math.isnan(rollout_metrics([rollout(0, EXCLUDED, 1, Status.TIMEOUT)])["reward_mean"])
    assert math.isnan(rollout_metrics([])["excluded_share"])


def test_score_metrics_leave_out_what_was_not_scored_and_what_is_not_finite() -> None:
    rollouts = [
        rollout(0, POSITIVE, 1),
        rollout(0, POSITIVE, 1),
        rollout(0, POSITIVE, 1),
        rollout(0, NEGATIVE, 1),
    ]
    metrics = score_metrics(rollouts, [1.0, 99.0, math.nan, math.inf], [-0.5, 0.0, math.nan, 0.5])

    assert metrics["score_positive_mean"] == 1.0
    assert metrics["score_positive_p5"] == 1.0
    assert metrics["score_positive_p95"] == 1.0
    assert math.isnan(metrics["score_negative_mean"]) and math.isnan(metrics["score_negative_p5"])


def test_score_metrics_equal_those_computed_by_hand() -> None:
    rollouts = [rollout(0, NEGATIVE, 1)] * 21
    metrics = score_metrics(rollouts, [float(i) for i in range(20, -1, -1)], [0.5] * 21)
    named = (
        metrics["score_negative_mean"],
        metrics["score_negative_p5"],
        metrics["score_negative_p95"],
    )
    assert named == pytest.approx((10.0, 1.0, 19.0))  # of 0..20


@pytest.mark.parametrize("percent", [0, 5, 37.5, 95, 100])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_percentiles_equal_those_of_numpy(percent: float, size: int) -> None:
    values = np.random.default_rng(size).normal(size=size).tolist()
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_speed_metrics_equal_those_computed_by_hand() -> None:
    # 1200 tokens and 60 TFLOP in 3 s on 2 ranks: 200 tokens/s and 10 TFLOP/s a rank, a tenth of the
    # peak of 100
    metrics = speed_metrics(1200, 60e12, 6.0, 100.0)
    assert metrics == pytest.approx(
        {"tokens_per_second_per_rank": 200, "tflops_per_rank": 10, "mfu": 0.1}
    )
    assert "mfu" not in speed_metrics(1200, 60e12, 6.0, None)


def test_engine_metrics_equal_those_computed_by_hand() -> None:
    # 300 tokens in 10 s over three engines; the last drew nothing.
    engines = [
        {"seconds": 2.0, "tokens": 100, "taken_over": 3},
        {"seconds": 8.0, "tokens": 200, "taken_over": 0},
        {"seconds": 0.0, "tokens": 0, "taken_over": 1},
    ]

    assert engine_metrics(engines) == pytest.approx(
        {
            "engine/seconds_mean": 10 / 3,
            "engine/seconds_max": 8,
            "engine/slowest": 1,
            "engine/tokens_mean": 100,
            "engine/tokens_slowest": 200,
            "engine/tokens_per_second_mean": 30,
            "engine/tokens_per_second_min": 25,
            "engine/taken_over": 4,
        }
    )
    assert engine_metrics([]) == {}, "a replay has no engine"


def test_step_metrics_equal_those_computed_by_hand() -> None:
    seconds = {"rollout": 100.0, "old_logprobs": 1.0, "update": 2.0}
    metrics = step_metrics(STEP, training(), seconds, num_ranks=2, peak_tflops=10.0)
    expected = {
        "loss": 1.5,
        "grad_norm": 2.5,
        "lr": 1e-6,
        "skipped_updates": 0,
        "max_abs_weight_tau": 0.75,
        "kl": 0.5,  # means over the two updates
        "clipped_low_share": 0.25,
        "clipped_high_share": 0.125,
        "low_ratio_share": 0.25,  # 0 + 4 of 10 + 6 tokens
        "low_ratio_positive_share": 0.25,  # 0 + 1 of these 4
        "equal_groups": 2.0,
        "entropy": 0.3,
        "score_positive_mean": 0.25,
        "score_negative_mean": -0.5,
        "seconds/rollout": 100.0,
        # 18 / (2 ranks x 3 s): the rollout stage is not training.
        "tokens_per_second_per_rank": 3.0,
        "tflops_per_rank": 1.0,
        "mfu": 0.1,
    }

    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_a_skipped_update_is_counted_and_spoils_no_mean() -> None:
    step = training(losses=[math.nan, 1.0], grad_norms=[math.inf, 4.0], skipped=[1])
    metrics = step_metrics(STEP, step, {"update": 1.0}, num_ranks=1, peak_tflops=None)
    assert (metrics["loss"], metrics["grad_norm"], metrics["skipped_updates"]) == (1.0, 4.0, 1.0)


@pytest.mark.parametrize(
    "name, expected",
    [
        pytest.param("NVIDIA H100 80GB HBM3", 989.0, id="SXM"),
        pytest.param("NVIDIA H100 PCIe", 756.0, id="PCIe is slower"),
        pytest.param("NVIDIA A100-SXM4-80GB", 312.0, id="dashes"),
        pytest.param("NVIDIA H200", 989.0, id="H200 is no H20"),
        pytest.param("NVIDIA H20", 148.0, id="H20"),
        pytest.param("NVIDIA GB200", PEAK_TFLOPS["GB200"], id="GB200 is no B200"),
        pytest.param("NVIDIA L40", None, id="L40 is no L4"),
        pytest.param("cpu", None, id="unknown"),
    ],
)
def test_the_peak_is_that_of_the_named_gpu(name: str, expected: float | None) -> None:
    assert peak_tflops(name) == expected


def test_the_configured_peak_wins() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", 500.0) == 500.0


def test_rows_are_on_disk_at_once_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    writer = MetricsWriter(RunDirectory(tmp_path), trackers=[], config={})
    writer.write(1, {"loss": 0.1 + 0.2, "score_positive_mean": math.nan, "grad_norm": math.inf})
    writer.write(2, {"loss": 1.0})
    writer.write_evaluation(2, {"heldout/pass_at_1": 0.5})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 1, "loss": 0.1 + 0.2, "score_positive_mean": None, "grad_norm": None}
    assert [row["step"] for row in rows] == [1, 2]
    assert json.loads((tmp_path / "evaluations.jsonl").read_text()) == {
        "step": 2,
        "heldout/pass_at_1": 0.5,
    }
