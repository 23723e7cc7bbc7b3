"""Rollouts on disk that were drawn under other settings or for other answers are not trained on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests import zygote
from tests.integration.conftest import ROOT, command, rows, train

WORDS = (
    "trainer.steps=1", "rollout.num_prompts=16", "rollout.chunk_prompts=8",
    "batch.minibatch_prompts=8", "data.heldout=", "trainer.export=false",
)  # fmt: skip


def test_rollouts_of_other_settings_and_answers_are_drawn_again(base: Path, tmp_path: Path) -> None:
    """The run is stopped after one of the first step's two chunks; then comes an attempt that is
    refused, an edit of the data, and another attempt.

    The refused attempt once hid the change: the run's configuration was that of the last attempt.
    """
    run_dir = tmp_path / "run"
    data = tmp_path / "train.jsonl"
    data.write_bytes((base / "train.jsonl").read_bytes())
    words = [*WORDS, f"data.train={data}"]
    run = command(base, run_dir, *words, processes=1)
    stopped = [
        sys.executable, "-m", "tests.integration.stopped_job", "SIGUSR1", "label", "1",
        *run[run.index("train") :],
    ]  # fmt: skip
    done = zygote.run(stopped, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 75, done.stderr
    assert len(list((run_dir / "rollouts").glob("chunk-*"))) == 1

    refused = train(base, run_dir, *words, "trainer.seed=2", "rollout.temperature=0.3", processes=1)
    assert refused.returncode == 2, refused.stderr

    edited = rows(data)
    for row in edited:
        row["reward_model"]["ground_truth"] = "0"
    data.write_text("".join(json.dumps(row) + "\n" for row in edited))
    done = train(base, run_dir, *words, "rollout.temperature=0.3", processes=1)
    assert done.returncode == 0, done.stderr
    number = len(edited)
    assert f"the gold answers of {number} of {number} prompts" in done.stdout
    assert "step 1: 64 rollouts on disk were drawn otherwise, and are drawn again" in done.stdout
    assert "gold answers have changed; rollout.temperature was 1.0 and is 0.3" in done.stdout

    saved = rows(run_dir / "rollouts/step-00001.parquet")
    assert len(saved) == 128 and {tuple(row["answers"]) for row in saved} == {("0",)}
    assert {row["label"] for row in saved} == {0}, "no label is of the old answers"
    # The engine's log-probs are of the temperature that is trained at.
    (row,) = rows(run_dir / "metrics.jsonl")
    assert row["mismatch_max_abs"] < 1e-4
