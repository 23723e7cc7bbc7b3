"""`megatron-real compare` with real training: a sweep that is killed and started
again ends with the same table.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from megatron_real.runs.rows import read_rows
from tests.integration.conftest import CONFIG, ROOT

DEADLINE = 400.0


def write_sweep(base: Path, folder: Path, **changes: Any) -> Path:
    """Two variants and two seeds, of four steps each, with a checkpoint after every step."""
    folder.mkdir()
    ours = {
        "base": str(CONFIG),
        "model": {"path": str(base)},
        "data": {"train": f"{base}/train.jsonl", "heldout": f"{base}/heldout.jsonl"},
        "trainer": {"tensorboard": False},
        "rollout": {"num_prompts": 8},
        "batch": {"minibatch_prompts": 4},
        "evaluation": {"every": 0, "max_problems": 20},
        "checkpoint": {"every": 1},
    }
    OmegaConf.save(OmegaConf.create(ours), folder / "base.yaml")
    sweep = {
        "base": "base.yaml",
        "out": str(folder / "out"),
        "seeds": [1, 2],
        "budget": 256,
        "variants": {"real": {}, "grpo": {"objective": {"name": "grpo"}}},
    }
    OmegaConf.save(OmegaConf.create(sweep | changes), folder / "sweep.yaml")
    return folder / "sweep.yaml"


def command(sweep: Path, *options: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "megatron_real", "compare", str(sweep), *options]


def finish(sweep: Path, code: int = 0) -> dict[str, Any]:
    """Runs a sweep to its end; returns its table without wall clock."""
    done = subprocess.run(
        command(sweep, "--json"), cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == code, done.stderr[-5000:]
    table: dict[str, Any] = json.loads(done.stdout)
    for row in (*table["variants"], *table["runs"]):
        del row["seconds"]
    return table


def kill_at(sweep: Path, run: str, row: int, *, whole: bool) -> None:
    """Starts a sweep and kills it when a run has written its `row`-th row.

    With `whole` the run that is at work is killed too.
    """
    process = subprocess.Popen(
        command(sweep),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics = sweep.parent / "out" / run / "metrics.jsonl"
    ends = time.monotonic() + DEADLINE
    while process.poll() is None and len(read_rows(metrics)[0]) < row:
        assert time.monotonic() < ends, f"no row {row} of {run}"
        time.sleep(0.02)
    assert process.poll() is None, "the sweep ended before it was killed"
    if whole:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


@pytest.mark.grid
def test_a_killed_sweep_ends_with_the_same_table(base: Path, tmp_path: Path) -> None:
    """The second time the run is left behind: it hears of the sweep's end, saves,
    and the next start waits for it.
    """
    expected = finish(write_sweep(base, tmp_path / "undisturbed"))
    assert [row["counts"]["finished"] for row in expected["variants"]] == [2, 2]
    assert expected["variants"][1]["differences"]["accuracy"]["count"] == 2

    # First with the run that is at work, then the sweep alone, then both again in the last run.
    killed = write_sweep(base, tmp_path / "killed")
    kill_at(killed, "real/seed-1", 2, whole=True)
    kill_at(killed, "grpo/seed-1", 1, whole=False)
    kill_at(killed, "grpo/seed-2", 3, whole=True)
    assert finish(killed) == expected


@pytest.mark.grid
def test_a_variant_that_diverges_is_shown_as_such(base: Path, tmp_path: Path) -> None:
    wild = {"optimizer": {"lr": 1e30, "clip_grad": 0.0}, "trainer": {"max_skipped_updates": 1}}
    sweep = write_sweep(base, tmp_path / "wild", seeds=[1], variants={"real": {}, "wild": wild})

    table = finish(sweep, code=1)

    real, diverged = table["variants"]
    assert real["counts"]["finished"] == 1 and diverged["counts"]["diverged"] == 1
    assert diverged["means"]["accuracy"]["value"] is None
    assert "not finite" in table["runs"][1]["reason"]
    assert finish(sweep, code=1) == table
