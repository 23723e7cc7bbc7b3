"""The memory of a run does not grow with its steps."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

from tests.integration.conftest import rows, train

pytest.importorskip("vllm")

WARM = 100
"""Steps until caches and allocators have what they need."""
WINDOW = 50
STEPS = 300
MAY_GROW_MIB = 8.0
"""Over the last 200 steps. What leaked one rollout's tokens, 64 KiB a step, would pass it."""


@pytest.mark.grid
def test_three_hundred_steps_with_the_engine_on_need_no_more_memory(
    base: Path, tmp_path: Path
) -> None:
    words = [
        f"trainer.steps={STEPS}", "rollout.engine=vllm", "rollout.num_prompts=4",
        "rollout.group_size=4", "batch.minibatch_prompts=4", "data.heldout=",
        "checkpoint.every=100", "objective.one_class_groups=keep",
    ]  # fmt: skip
    done = train(base, tmp_path / "run", *words, processes=1)
    assert done.returncode == 0, done.stderr[-3000:]

    resident = [
        row["memory/resident_gib_max"] * 1024 for row in rows(tmp_path / "run/metrics.jsonl")
    ]
    assert len(resident) == STEPS
    growth = median(resident[-WINDOW:]) - median(resident[WARM : WARM + WINDOW])
    assert growth < MAY_GROW_MIB, f"resident memory grew by {growth:.1f} MiB"
