"""tools/gpu_day.py on a CPU: its rehearsal, and what it says where it cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import ROOT

pytest.importorskip("triton")


def run(out: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], Any]:
    command = [sys.executable, "tools/gpu_day.py", "--out", str(out), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    results = out / "gpu-day.json"
    if not results.exists():
        return done, None
    return done, json.loads(results.read_text())


def test_rehearsal_runs_the_kernels_the_step_and_a_benchmark(tmp_path: Path) -> None:
    words = ("--rehearse", "--only", "kernels", "step-1.5b", "head", "--minutes", "10")

    done, results = run(tmp_path, *words)

    assert done.returncode == 0, done.stdout + json.dumps(results, indent=1)
    assert results["rehearsed_on_a_cpu"]
    assert len(results["stages"]["kernels"]["rows"]) == 9, "three outputs of three kinds of logits"
    (row,) = results["stages"]["step-1.5b"]["rows"]
    assert row["layers"] == 2 and row["seconds"] > 0
    # Its benchmark is a process, whose results come back as a file.
    assert all(row["table"] and row["path"] for row in results["stages"]["head"]["rows"])
    text = (tmp_path / "gpu-day.md").read_text()
    assert "no figure here says anything" in text and "| shape | layers |" in text


def test_a_stage_that_does_not_fit_the_time_is_left_out(tmp_path: Path) -> None:
    done, results = run(tmp_path, "--rehearse", "--only", "save", "--minutes", "0.001")
    assert done.returncode == 0, done.stderr
    assert results["stages"]["save"]["status"] == "left out"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_refuses_and_names_the_rehearsal(tmp_path: Path) -> None:
    done, results = run(tmp_path, "--only", "save")
    assert done.returncode == 1
    assert "--rehearse runs tiny sizes on the CPU" in results["stages"]["save"]["reason"]


@pytest.mark.grid
def test_every_stage_is_rehearsed(tmp_path: Path) -> None:
    done, results = run(tmp_path, "--rehearse", "--minutes", "14")
    assert done.returncode == 0, done.stdout + json.dumps(results, indent=1)
    assert {stage["status"] for stage in results["stages"].values()} <= {"done", "skipped"}
