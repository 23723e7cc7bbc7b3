"""What takes jobs away on a cluster: the run goes on by itself and ends as the undisturbed one,
bit for bit.
"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.integration.slurm.cluster import Cluster
from tests.integration.slurm.conftest import Run
from tests.integration.test_resume import assert_same_run

pytestmark = pytest.mark.grid


def test_requeued_by_hand(run: Run, undisturbed: Path) -> None:
    job = run.submit()
    run.wait_for_row(5)
    run.cluster.run("scontrol", "requeue", job)
    run.wait_for_end(job)
    assert run.restarts(job) == 1 and "resuming after step" in run.output()
    assert_same_run(run.directory, undisturbed)


def test_the_warning_before_the_time_limit(run: Run, undisturbed: Path) -> None:
    """Slurm sends it to the job's script alone."""
    job = run.submit()
    run.wait_for_row(5)
    run.ask_to_stop(job, "--batch")
    run.wait_for_end(job)
    assert run.restarts(job) == 1
    assert "Slurm asks for the end: the ranks save and stop" in run.output()
    assert "the run has stopped early, everything is saved; requeueing" in run.output()
    assert_same_run(run.directory, undisturbed)


def test_preempted_by_a_higher_partition(run: Run, undisturbed: Path) -> None:
    """The night's job takes both nodes; within the grace time the run saves,
    and it goes on when the nodes are free.
    """
    job = run.submit()
    run.wait_for_row(5)
    night = run.cluster.run(
        "sbatch", "--parsable", "--partition=night", "--nodes=2", "--exclusive", "--wrap=sleep 5"
    )
    run.wait_for_end(night.strip())
    run.wait_for_end(job)
    assert run.restarts(job) == 1
    assert "the run has stopped early, everything is saved" in run.output()
    assert_same_run(run.directory, undisturbed)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank(run: Run, undisturbed: Path, rank: int) -> None:
    """The other rank ends within seconds, the log names the dead one, and the job is requeued."""
    job = run.submit()
    run.wait_for_row(5)
    os.kill(run.ranks()[rank], signal.SIGKILL)
    run.cluster.wait_for(lambda: not run.ranks(), "end of the other rank", seconds=60)
    run.wait_for_end(job)
    assert run.restarts(job) == 1
    assert f"rank {rank}" in run.output() and "ended without a word" in run.output()
    assert "a fault ended the run; requeueing" in run.output()
    assert_same_run(run.directory, undisturbed)


def test_a_rank_that_gives_no_sign_of_life(run: Run, undisturbed: Path) -> None:
    """Stopped, not dead, as on a machine that hangs: found by its silence, and ended by srun."""
    job = run.submit()
    run.wait_for_row(5)
    os.kill(run.ranks()[1], signal.SIGSTOP)
    run.wait_for_restart(job, 1, seconds=300)
    run.wait_for_end(job)
    assert "has given no sign of life for" in run.output()
    assert "a fault ended the run; requeueing" in run.output()
    assert_same_run(run.directory, undisturbed)


def test_all_ranks_and_launchers_killed(run: Run, undisturbed: Path) -> None:
    """Only the job's script is left, and has the job requeued."""
    job = run.submit()
    run.wait_for_row(5)
    run.kill(script=False)
    run.wait_for_end(job)
    assert run.restarts(job) == 1 and "a fault ended the run; requeueing" in run.output()
    assert_same_run(run.directory, undisturbed)


def test_the_next_job_of_a_chain_takes_over_from_a_killed_one(run: Run, undisturbed: Path) -> None:
    """Nothing of the first job is left, its script neither;
    the second one was waiting for its end.
    """
    first, second = (run.submit("--dependency=singleton") for _ in range(2))
    run.wait_for_row(5)
    assert run.cluster.fields(second)["JobState"] == "PENDING"
    run.kill(script=True)
    run.wait_for_end(second)
    assert run.cluster.fields(first)["JobState"] != "COMPLETED"
    assert "resuming after step" in run.output()
    assert_same_run(run.directory, undisturbed)


def test_three_faults_without_progress_end_the_chain(
    cluster: Cluster, base: Path, tmp_path: Path
) -> None:
    """A fault that comes again and again at the same place does not hold nodes for ever."""
    run = Run(cluster, base, tmp_path / "run", "checkpoint.every=1000", "trainer.steps=1000")
    job = run.submit()
    for life in range(3):
        run.wait_for_life(f"{job}.{life}")
        os.kill(run.ranks()[1], signal.SIGKILL)
    run.wait_for_end(job, "FAILED")
    assert "3 last faults came without a new checkpoint" in run.output()


def test_slurmd_killed_while_a_checkpoint_is_written(
    cluster: Cluster, base: Path, tmp_path: Path
) -> None:
    """Slurm gives the node up and takes the job away from the other one;
    when slurmd is back the run goes on.
    """
    words = ("rollout.num_prompts=64", "checkpoint.every=2")
    whole, run = (Run(cluster, base, tmp_path / name, *words) for name in ("undisturbed", "run"))
    whole.wait_for_end(whole.submit())
    job = run.submit()
    run.wait_for_row(3)
    checkpoints = run.directory / "checkpoints"
    run.watch_for(lambda: list(checkpoints.glob("*.partial")), "checkpoint that is being written")
    cluster.kill("n2")
    try:
        # What Slurm does itself after SlurmdTimeout and some retries, which are longer than this
        # run.
        cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=slurmd is gone")
        run.wait_for_restart(job, 1)
    finally:
        cluster.start_node("n2")
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    run.wait_for_end(job)
    assert "resuming after step" in run.output()
    assert_same_run(run.directory, whole.directory)


def test_a_port_that_is_taken_is_a_fault_that_passes(run: Run, undisturbed: Path) -> None:
    """torchrun cannot listen; its reason is shown, and the requeued job starts."""
    job = run.submit("--hold")
    with socket.socket() as taken:
        # Bound but not listening: nothing answers there, so that the job takes the port for a free
        # one.
        taken.bind(("127.0.0.1", 20_000 + int(job)))
        run.cluster.run("scontrol", "release", job)
        run.wait_for_restart(job, 1)
    run.wait_for_end(job)
    assert "address already in use" in run.output()
    assert "a fault ended the run; requeueing" in run.output()
    assert_same_run(run.directory, undisturbed)
