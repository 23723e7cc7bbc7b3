"""`sbatch examples/real_7b.sh`, on a real Slurm: from HF weights to HF weights,
through whatever happens on the way.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.conftest import train
from tests.integration.slurm.cluster import Cluster
from tests.integration.slurm.conftest import Run
from tests.integration.test_resume import assert_same_run


def test_a_run_that_is_asked_to_stop_saves_and_is_requeued(run: Run, undisturbed: Path) -> None:
    """From HF weights through conversion, two nodes and a stop in the middle to exported weights
    and curves.
    """
    job = run.submit()
    run.wait_for_row(2)
    run.ask_to_stop(job)
    run.wait_for_end(job)
    assert run.restarts(job) == 1
    output = run.output()
    assert "the run has stopped early, everything is saved; requeueing" in output
    assert "resuming after step" in output
    assert output.count("converting ") == 1
    assert "Traceback" not in output and "User defined signal" not in output
    assert_same_run(run.directory, undisturbed)
    assert (run.directory / "curves.png").stat().st_size > 10_000
    logs = {
        file.relative_to(run.directory / "logs/ranks").parts[:2]
        for file in run.directory.rglob("stderr.log")
    }
    assert logs == {(f"{job}.{life}", node) for life in (0, 1) for node in ("n1", "n2")}


def test_a_cancelled_run_saves_and_is_not_requeued(
    cluster: Cluster, base: Path, tmp_path: Path
) -> None:
    """While the job runs, nobody else gets its directory."""
    run = Run(cluster, base, tmp_path / "run", "trainer.steps=1000")
    job = run.submit("--nodes=1")
    run.wait_for_row(1)
    second = train(base, run.directory, processes=1)
    assert second.returncode == 2
    assert f"{run.directory} is in use by process" in second.stderr
    assert f"(Slurm job {job})" in second.stderr
    run.cluster.run("scancel", job)
    run.wait_for_end(job, "CANCELLED")
    assert '"stopped"' in run.status() and run.restarts(job) == 0
    assert "Slurm ends this job" in run.output()


@pytest.mark.grid
def test_two_jobs_on_one_run_directory(cluster: Cluster, base: Path, tmp_path: Path) -> None:
    """The second one ends with the reason, and the first one runs on."""
    run = Run(cluster, base, tmp_path / "run", "trainer.steps=1000")
    first = run.submit("--nodes=1", "--nodelist=n1")
    run.wait_for_row(1)
    second = run.submit("--nodes=1", "--nodelist=n2")
    run.wait_for_end(second, "FAILED")
    assert f"{run.directory} is in use by process" in run.output()
    assert f"(Slurm job {first})" in run.output()
    assert run.cluster.fields(first)["JobState"] == "RUNNING" and '"running"' in run.status()
    run.cluster.run("scancel", first)
    run.wait_for_end(first, "CANCELLED")
