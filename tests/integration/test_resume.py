"""A run that is killed, stopped or moved, and started again by the same command, ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import ROOT, command, rows, train

WORDS = (
    "trainer.steps=12", "rollout.num_prompts=16", "rollout.chunk_prompts=8", "batch.minibatch_prompts=4",
    "evaluation.every=5", "evaluation.max_problems=20", "checkpoint.every=3", "optimizer.schedule=cosine",
)  # fmt: skip
DEADLINE = 120.0


@pytest.fixture(scope="session")
def undisturbed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The same run by one and by two processes."""
    runs = {}
    for processes in (1, 2):
        runs[processes] = tmp_path_factory.mktemp("undisturbed") / "run"
        done = train(base, runs[processes], *WORDS, processes=processes)
        assert done.returncode == 0, done.stderr
    return runs


def start(base: Path, run_dir: Path, *words: str, processes: int) -> subprocess.Popen[str]:
    run = command(base, run_dir, *WORDS, *words, processes=processes)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(run, cwd=ROOT, text=True, start_new_session=True, **streams)  # type: ignore[call-overload]


def wait_for_row(process: subprocess.Popen[str], run_dir: Path, number: int) -> None:
    """Until the run has written its `number`-th row of metrics, or has ended."""
    ends, metrics = time.monotonic() + DEADLINE, run_dir / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < number):
        assert time.monotonic() < ends, f"no row {number} of metrics in {DEADLINE} s"
        time.sleep(0.01)


def kill(process: subprocess.Popen[str]) -> None:
    """The whole job at once: nobody writes a last word."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE)


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    timed = ("seconds", "rank_seconds/", "tokens_per_second", "tflops")
    return {name: value for name, value in row.items() if not name.startswith(timed)}


def assert_same_run(found: Path, expected: Path) -> None:
    """Metrics, evaluations, rollouts and exported weights are equal, bit for bit."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        pairs = zip(rows(found / name), rows(expected / name), strict=True)
        for mine, theirs in pairs:
            assert without_times(mine) == without_times(theirs), name
    files = sorted(p.name for p in (expected / "rollouts").iterdir() if p.name.startswith("step"))
    assert files == sorted(p.name for p in (found / "rollouts").iterdir() if p.name.startswith("step"))
    for file in files:
        assert rows(found / "rollouts" / file) == rows(expected / "rollouts" / file), file
    weights = load_file(expected / "hf/model.safetensors")
    for name, tensor in load_file(found / "hf/model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_any_moment_the_run_is_the_same(
    base: Path, undisturbed: dict[int, Path], tmp_path: Path, processes: int
) -> None:
    """SIGKILL at seeded moments, the first before the first checkpoint."""
    draw, run_dir = random.Random(processes), tmp_path / "run"
    for row in (1, 5, 8, 11):
        process = start(base, run_dir, processes=processes)
        try:
            wait_for_row(process, run_dir, row)
            time.sleep(draw.uniform(0.0, 0.6))
        finally:
            kill(process)
    done = train(base, run_dir, *WORDS, processes=processes)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    assert_same_run(run_dir, undisturbed[processes])


def test_usr1_saves_within_a_step_and_exits_with_75(base: Path, undisturbed: dict[int, Path], tmp_path: Path) -> None:
    """The signal again and again: the run stops at seams of every kind, and within a step too."""
    run_dir, stopped_at, draw = tmp_path / "run", [], random.Random(7)
    code = 75
    while code == 75 and len(stopped_at) < 12:
        written = len(rows(run_dir / "metrics.jsonl")) if stopped_at else 0
        process = start(base, run_dir, processes=1)
        try:
            wait_for_row(process, run_dir, written + 1)
            time.sleep(draw.uniform(0.0, 0.3))
            process.send_signal(signal.SIGUSR1)
            output, _ = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
        code = process.returncode
        if code == 75:
            assert "stopping after step" in output and "SIGUSR1" in output and "Traceback" not in output
            stopped_at.append((run_dir / "checkpoints/latest").read_text().strip())
    assert code == 0 and len(stopped_at) >= 3
    assert any("update" in name for name in stopped_at), f"no stop fell within a step: {stopped_at}"
    assert_same_run(run_dir, undisturbed[1])
