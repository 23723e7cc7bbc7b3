"""`sbatch --array examples/compare.sh`, on a real Slurm: a sweep whose runs are jobs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import ROOT
from tests.integration.slurm.cluster import Cluster
from tests.integration.slurm.conftest import ENDS, RUN_SECONDS
from tests.integration.test_compare import command, finish, write_sweep

BUDGET = 1536  # 24 steps, so that a run is cancelled long before its end
WILD = {"optimizer": {"lr": 1e30, "clip_grad": 0.0}, "trainer": {"max_skipped_updates": 1}}
VARIANTS = {"real": {}, "grpo": {"objective": {"name": "grpo"}}, "wild": WILD}


def submit(cluster: Cluster, sweep: Path) -> str:
    """Submits all runs of a sweep as they are in VARIANTS; returns the array's number."""
    words = ["sbatch", "--parsable", f"--array=0-{len(VARIANTS) - 1}", "examples/compare.sh"]
    settings = {
        "SWEEP": str(sweep),
        "VENV": sys.prefix,
        "OMP_NUM_THREADS": "1",
        "SBATCH_PARTITION": "main",
        "SBATCH_GPUS_PER_NODE": "1",
        "SBATCH_OUTPUT": str(sweep.parent / "job-%A_%a.log"),
    }
    return cluster.run(*words, environment=settings).strip()


def wait_for_ends(cluster: Cluster, array: str) -> dict[int, str]:
    """Waits for all jobs of an array; returns how each ended."""
    # Slurm forgets a job some minutes after its end: what was seen once is not asked again.
    ends: dict[int, str] = {}

    def have_ended() -> bool:
        for number in range(len(VARIANTS)):
            if number not in ends:
                state = cluster.fields(f"{array}_{number}")["JobState"]
                if state in ENDS:
                    ends[number] = state
        return len(ends) == len(VARIANTS)

    cluster.wait_for(have_ended, f"end of the array {array}", seconds=RUN_SECONDS)
    return ends


def log(sweep: Path, array: str, number: int) -> str:
    return (sweep.parent / f"job-{array}_{number}.log").read_text()


def table(sweep: Path) -> dict[str, Any]:
    """Returns the content of `compare --table`, without wall clock."""
    done = subprocess.run(
        command(sweep, "--table", "--json"), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    for row in (*content["variants"], *content["runs"]):
        del row["seconds"]
    return content


@pytest.mark.grid
def test_a_sweep_as_an_array_goes_on_by_the_same_command(
    cluster: Cluster, base: Path, tmp_path: Path
) -> None:
    """One run is cancelled on its way and one diverges; the other ends, and the next array goes on.

    In the end the table is that of a sweep whose runs were made one after the other.
    """
    sweep = write_sweep(base, tmp_path / "array", seeds=[1], budget=BUDGET, variants=VARIANTS)
    first = submit(cluster, sweep)
    metrics = tmp_path / "array/out/grpo/seed-1/metrics.jsonl"
    cluster.wait_for(metrics.exists, "first step of the run", seconds=RUN_SECONDS)
    cluster.run("scancel", f"{first}_1")
    assert wait_for_ends(cluster, first) == {0: "COMPLETED", 1: "CANCELLED", 2: "FAILED"}

    second = submit(cluster, sweep)
    assert wait_for_ends(cluster, second) == {0: "COMPLETED", 1: "COMPLETED", 2: "FAILED"}
    assert "run 0 has finished" in log(sweep, second, 0)
    assert "resuming after step" in log(sweep, second, 1)
    assert "run 2 has diverged" in log(sweep, second, 2)

    expected = finish(
        write_sweep(base, tmp_path / "one", seeds=[1], budget=BUDGET, variants=VARIANTS), code=1
    )
    assert [row["outcome"] for row in expected["runs"]] == ["finished", "finished", "diverged"]
    resumed = table(sweep)
    for content, folder in ((expected, "one"), (resumed, "array")):
        for row in content["runs"]:
            # A run that has diverged names the directory of its dumps.
            row["reason"] = row["reason"].replace(str(tmp_path / folder), "")
    assert resumed == expected
