"""Whole runs under other objectives: a reference survives a resume, and saved rollouts train another objective."""

from __future__ import annotations

from pathlib import Path

from tests.integration.conftest import rows, train
from tests.integration.test_resume import assert_same_run

SMALL = (
    "rollout.num_prompts=16", "batch.minibatch_prompts=4", "evaluation.max_problems=20", "checkpoint.every=1",
)  # fmt: skip
WITH_REFERENCE = (
    "objective.name=grpo", "objective.kl.to=reference", "objective.kl.coefficient=0.1", "optimizer.lr=1e-4",
    "objective.entropy_bonus=0.001",
)  # fmt: skip


def test_a_reference_is_the_same_after_a_resume_and_a_replay_needs_none_of_it(
    base: Path, tmp_path: Path
) -> None:
    """The reference is the starting weights, not those that a checkpoint brings back. Bit for bit.

    The saved rollouts carry its log-probs. A replay by the same objective computes the same losses from them, and a
    replay by another objective trains.
    """
    words = (*SMALL, *WITH_REFERENCE)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
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

    again, other = tmp_path / "again", tmp_path / "other"
    replay = f"rollout.replay={whole}"
    done = train(base, again, *words, "trainer.steps=2", replay)
    assert done.returncode == 0, done.stderr
    replayed = rows(again / "metrics.jsonl")
    assert [r["loss"] for r in replayed] == [r["loss"] for r in metrics]

    done = train(base, other, *SMALL, "objective.name=sapo", "trainer.steps=2", replay)
    assert done.returncode == 0, done.stderr
    sapo = rows(other / "metrics.jsonl")
    assert all(row["grad_norm"] > 0 for row in sapo)
    assert [r["reward_mean"] for r in sapo] == [r["reward_mean"] for r in metrics]
    assert [r["loss"] for r in sapo] != [r["loss"] for r in metrics]
