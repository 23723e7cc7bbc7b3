"""Every benchmark in its smallest form: the tools keep pace with what they measure."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests import zygote
from tests.integration.conftest import ROOT
from tests.integration.test_vllm import _missing

needs_vllm = pytest.mark.skipif(bool(_missing()), reason=_missing())
SMALLEST = {
    "bookkeeping": "--prompts 100 --steps 10 --rounds 1",
    "checkpoint": "--parameters 20 --saves 1",
    "collective": "--ranks 2 --rounds 1",
    "convert": "--shape tiny --rounds 1",
    "data_plane": "--processes 2 --rollouts 8 --tokens 16 --ranks 4 --worst-rollouts 16 "
    "--worst-tokens 32 --rounds 1 --threads 1",
    "labels": "--checks 32 --rounds 1",
    "lifeline": "--ranks 2 --killed 1",
    "logprobs": "--tokens 64 --vocab 512 --hidden 64 --rounds 1",
    "placement": "--rounds 1 --threads 1",
    "report": "--steps 20 --rollouts 8 --tokens 16 --runs 1",
    "rollout": "--prompts 1 --samples 1 --tokens 4 --rounds 1 --threads 1",
    "train_step": "--groups 1 --group-size 2 --max-response 16 --rounds 1 --threads 1",
    "weight_sync": "--rounds 1 --threads 1",
}


def test_no_benchmark_is_left_out() -> None:
    shared = {"engine", "machine", "model", "policy"}
    names = {tool.stem.removeprefix("bench_") for tool in ROOT.glob("tools/bench_*.py")}
    assert names == SMALLEST.keys() | shared


@pytest.mark.grid
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=needs_vllm) if n in ("rollout", "weight_sync") else n for n in SMALLEST],
)
def test_every_benchmark_runs(name: str, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    run = [sys.executable, "-W", "ignore", f"tools/bench_{name}.py", *SMALLEST[name].split()]
    run += ["--json", str(results)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    done = zygote.run(
        run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    tables = json.loads(results.read_text())["tables"]
    assert tables and all(table["rows"] for table in tables)
