"""Whole runs under other objectives: a reference survives a resume,
and saved rollouts train another objective.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.integration import conftest
from tests.integration.conftest import rows
from tests.integration.test_resume import assert_same_run

# One process: that several train as one, with a reference too, is tests/distributed/.
train = partial(conftest.train, processes=1)

SMALL = (
    "rollout.num_prompts=16", "batch.minibatch_prompts=4", "evaluation.max_problems=20",
    "checkpoint.every=1",
)  # fmt: skip
WITH_REFERENCE = (
    "objective.name=grpo", "objective.kl.to=reference", "objective.kl.coefficient=0.1",
    "optimizer.lr=1e-4", "objective.entropy_bonus=0.001",
)  # fmt: skip
KEPT = "trainer.keep_token_weights=true"


def test_a_reference_is_the_same_after_a_resume_and_a_replay_needs_none_of_it(
    base: Path, tmp_path: Path
) -> None:
    """The reference is the starting weights, not those that a checkpoint brings back. Bit for bit.

    The saved rollouts carry its log-probs. A replay by the same objective computes the same losses
    from them, and a replay by another objective trains.
    """
    words = (*SMALL, *WITH_REFERENCE)
    whole = tmp_path / "whole"
    resumed = tmp_path / "resumed"
    for run_dir, steps in ((whole, 2), (resumed, 1), (resumed, 2)):
        done = train(base, run_dir, *words, f"trainer.steps={steps}")
        assert done.returncode == 0, done.stderr

    metrics = rows(whole / "metrics.jsonl")
    assert all(row["kl"] > 0 for row in metrics), "the policy has left the reference"
    assert all(row["seconds/reference"] > 0 for row in metrics)
    assert [r["kl"] for r in rows(resumed / "metrics.jsonl")] == [r["kl"] for r in metrics]
    # The shorter run was evaluated at its own last step, too.
    (resumed / "evaluations.jsonl").write_bytes((whole / "evaluations.jsonl").read_bytes())
    assert_same_run(resumed, whole)

    replay = f"rollout.replay={whole}"
    again = tmp_path / "again"
    done = train(base, again, *words, "trainer.steps=2", replay)
    assert done.returncode == 0, done.stderr
    replayed = rows(again / "metrics.jsonl")
    assert [r["loss"] for r in replayed] == [r["loss"] for r in metrics]

    other = tmp_path / "other"
    done = train(base, other, *SMALL, "objective.name=sapo", "trainer.steps=2", replay, KEPT)
    assert done.returncode == 0, done.stderr
    sapo = rows(other / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 for row in sapo)
    assert [r["reward_mean"] for r in sapo] == [r["reward_mean"] for r in metrics]
    assert [r["loss"] for r in sapo] != [r["loss"] for r in metrics]
    assert_tokens_add_up(other)

    real = tmp_path / "real"
    done = train(base, real, *SMALL, "trainer.steps=1", replay, KEPT, "trainer.export=false")
    assert done.returncode == 0, done.stderr
    assert_tokens_add_up(real)
    assert "token_weights" not in rows(whole / "rollouts/step-00001.parquet")[0]


def assert_tokens_add_up(run_dir: Path) -> None:
    """A rollout's weight is the sum of its tokens' weights, and its score the
    mean of their log-ratios.
    """
    saved = rows(run_dir / "rollouts/step-00001.parquet")
    trained = [row for row in saved if row["weight"]]
    assert trained
    for row in trained:
        length = len(row["token_ids"])
        assert len(row["token_weights"]) == len(row["log_ratios"]) == length
        assert sum(row["token_weights"]) == pytest.approx(row["weight"], rel=1e-4)
        assert sum(row["log_ratios"]) / length == pytest.approx(row["score"], abs=1e-5)

    # The weights have moved between the first update and later ones.
    later = [row for row in trained if row["minibatch"] > 1]
    assert any(abs(ratio) > 1e-6 for row in later for ratio in row["log_ratios"])
