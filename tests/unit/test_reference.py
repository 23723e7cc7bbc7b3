"""Generated pages are up to date with the code, and the table of metrics has every metric."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_real.runs.metric_table import METRICS, metric_of, tracked_name
from megatron_real.runs.metrics import Training, step_metrics

ROOT = Path(__file__).parents[2]
TRAINING = Training(
    losses=[1.0], scores=[], weights=[], max_abs_weight_tau=1.0, grad_norms=[1.0], lr=1e-6,
    skipped=[], token_means=dict.fromkeys(
        ("entropy", "mismatch_mean_abs", "mismatch_k3", "mismatch_share", "mismatch_max_abs"), 0.0
    ),
    kl=[0.0], clipped_low_share=[0.0], clipped_high_share=[0.0], low_ratio_tokens=[(1, 1, 2)],
    equal_groups=0, lag=0, tokens=1, flops=1.0,
)  # fmt: skip


def test_generated_pages_are_up_to_date() -> None:
    check = [sys.executable, str(ROOT / "tools/reference.py"), "--check"]
    completed = subprocess.run(check, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr


def test_every_metric_is_in_the_table() -> None:
    seconds = {"rollout": 1.0, "update": 1.0}
    written = step_metrics(
        [], TRAINING, seconds, num_ranks=2, peak_tflops=1.0, seconds_of_ranks=[seconds, seconds],
        memory_of_ranks=[{"resident_gib": 1.0}],
        engines=[{"seconds": 1.0, "tokens": 8, "taken_over": 0}],
    )  # fmt: skip
    assert [name for name in written if metric_of(name) is None] == []
    plain = {metric.name for metric in METRICS if not any(c.isupper() for c in metric.name)}
    missing = plain - written.keys() - {"seconds/evaluation", "heldout/standard_error"}
    assert missing == set(), "the table has metrics that nobody writes"


@pytest.mark.parametrize(
    ("name", "tracked"),
    [
        ("loss", "objective/loss"),
        ("status/timeout", "rollout/status/timeout"),
        ("seconds/old_logprobs", "time/old_logprobs"),
        ("rank_seconds/update_slowest", "time/ranks/update_slowest"),
        ("memory/resident_gib_max", "system/memory/resident_gib_max"),
        ("heldout/pass_at_8", "heldout/pass_at_8"),
        ("heldout/unanswered_share", "heldout/unanswered_share"),
        ("unheard_of", "unheard_of"),
    ],
)
def test_trackers_show_metrics_in_groups(name: str, tracked: str) -> None:
    assert tracked_name(name) == tracked


def test_names_in_trackers_are_unique() -> None:
    names = [metric.tracked for metric in METRICS]
    assert len(set(names)) == len(names)
