"""30 kills over one run, at seeded random moments of every stage: nothing is lost,
nothing comes twice.
"""

from __future__ import annotations

import collections
import json
import random
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import zygote
from tests.integration.conftest import ROOT, command, rows, train
from tests.integration.killed_job import WRITING
from tests.integration.test_resume import DEADLINE, WORDS, assert_same_run

STAGES = ("sync", "rollout", "label", "old_logprobs", "update", "evaluation", "checkpoint", WRITING)
KILLS = 30
LEAST = 3
"""Kills of each stage, at least."""
STORM = (
    *WORDS,
    "trainer.steps=60",
    "evaluation.every=2",
    "checkpoint.every=2",
    "checkpoint.keep=1",
)


@pytest.mark.grid
def test_thirty_kills_lose_nothing_and_repeat_nothing(base: Path, tmp_path: Path) -> None:
    done = train(base, tmp_path / "whole", *STORM, processes=1)
    assert done.returncode == 0, done.stderr
    steps = rows(tmp_path / "whole/metrics.jsonl")

    run_dir = tmp_path / "run"
    draw = random.Random(3)
    stages = [*STAGES * LEAST, *draw.choices(STAGES, k=KILLS - LEAST * len(STAGES))]
    draw.shuffle(stages)
    hits: collections.Counter[str] = collections.Counter()
    for stage in stages:
        seconds = draw.uniform(0.0, max(row.get(f"seconds/{stage}", 0.1) for row in steps))
        plan = {"stage": stage, "steps": draw.choice((0, 0, 1, 2)), "seconds": seconds}
        hits[killed(base, run_dir, tmp_path, plan)] += 1
        latest = run_dir / "checkpoints/latest"
        newest = latest.read_text().strip() if latest.exists() else "none"
        print(f"{stage} hit; newest checkpoint {newest}", flush=True)
    assert sum(hits.values()) == KILLS and all(hits[stage] >= LEAST for stage in STAGES), hits

    done = train(base, run_dir, *STORM, processes=1)
    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, tmp_path / "whole")
    assert [row["step"] for row in rows(run_dir / "metrics.jsonl")] == list(range(1, 61))


def killed(base: Path, run_dir: Path, tmp_path: Path, plan: Mapping[str, object]) -> str:
    """Starts the run and lets it kill itself; returns the stage that was hit."""
    hit = tmp_path / "hit"
    hit.unlink(missing_ok=True)
    places = {"hit": str(hit), "checkpoints": str(run_dir / "checkpoints")}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({**plan, **places}))

    train_words = command(base, run_dir, *STORM, processes=1)
    words = [sys.executable, "-m", "tests.integration.killed_job", str(file)]
    words += train_words[train_words.index("train") :]
    done = zygote.run(words, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)

    assert done.returncode == -signal.SIGKILL, f"{plan}: {done.stdout}{done.stderr}"
    assert hit.exists(), f"{plan}: {done.stdout}{done.stderr}"
    return hit.read_text()
