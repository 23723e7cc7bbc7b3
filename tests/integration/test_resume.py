"""A run that is killed, stopped or moved, and started again by the same command,
ends as if nothing had happened.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_real.runs.rollouts import read_rows
from tests import zygote
from tests.integration.conftest import ROOT, command, num_rows, rows, train
from tests.ports import free_port

STEPS = 8
WORDS = (
    f"trainer.steps={STEPS}", "rollout.num_prompts=16", "rollout.chunk_prompts=8",
    "batch.minibatch_prompts=4", "evaluation.every=5", "evaluation.max_problems=20",
    "checkpoint.every=3", "optimizer.schedule=cosine",
)  # fmt: skip
DEADLINE = 400.0


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
    """Starts a run in a session of its own, so that `kill` reaches all its processes."""
    return zygote.Popen(
        command(base, run_dir, *WORDS, *words, processes=processes),
        cwd=ROOT,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_row(process: subprocess.Popen[str], run_dir: Path, number: int) -> None:
    """Until the run has written its `number`-th row of metrics, or has ended."""
    ends = time.monotonic() + DEADLINE
    while process.poll() is None:
        if num_rows(run_dir / "metrics.jsonl") >= number:
            return
        assert time.monotonic() < ends, f"no row {number} of metrics in {DEADLINE} s"
        time.sleep(0.01)


def kill(process: subprocess.Popen[str]) -> None:
    """Kills the whole job at once, so that no process of it can write anything more."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=DEADLINE)


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the metrics that do not depend on the machine's speed."""
    timed = (
        "seconds",
        "memory",
        "tokens_per_second",
        "tflops",
        "checked_early_share",
        "engine/",
    )
    return {name: value for name, value in row.items() if not any(word in name for word in timed)}


def assert_same_run(run_dir: Path, expected: Path) -> None:
    """Asserts that metrics, evaluations, rollouts and exported weights are equal, bit for bit."""
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        pairs = zip(rows(run_dir / name), rows(expected / name), strict=True)
        for row, expected_row in pairs:
            assert without_times(row) == without_times(expected_row), name

    files = sorted(p.name for p in (expected / "rollouts").iterdir())
    assert files == sorted(p.name for p in (run_dir / "rollouts").iterdir())
    whole = [f"step-{row['step']:05d}.parquet" for row in rows(expected / "metrics.jsonl")]
    assert files == whole, "whole steps, and no chunk of one"
    for file in files:
        rollouts = list(read_rows(run_dir / "rollouts" / file))
        assert rollouts == list(read_rows(expected / "rollouts" / file)), file

    weights = load_file(expected / "hf/model.safetensors")
    for name, tensor in load_file(run_dir / "hf/model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.grid), 2])
def test_killed_at_any_moment_the_run_is_the_same(
    base: Path, undisturbed: dict[int, Path], tmp_path: Path, processes: int
) -> None:
    """SIGKILL at seeded moments, the first before the first checkpoint."""
    draw = random.Random(processes)
    run_dir = tmp_path / "run"
    for row in (1, 5):
        process = start(base, run_dir, processes=processes)
        try:
            wait_for_row(process, run_dir, row)
            # Into whatever stage of the next step it is by then, and not beyond: on a fast machine
            # the run would have ended.
            ends = time.monotonic() + draw.uniform(0.0, 0.6)
            while time.monotonic() < ends and num_rows(run_dir / "metrics.jsonl") == row:
                time.sleep(0.01)
        finally:
            kill(process)

    done = train(base, run_dir, *WORDS, processes=processes)

    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    assert_same_run(run_dir, undisturbed[processes])


STOPS = (
    ("SIGUSR1", "update", 6, "step_1_update_2"),
    ("SIGUSR1", "label", 1, "step_2"),  # after one of the third step's two chunks
    ("SIGUSR1", "update", 4, "step_3"),
    ("SIGUSR1", "evaluation", 1, "step_5"),
    ("SIGTERM", "update", 3, "step_5_update_3"),
)
"""Signal, stage and its number since the process began, and the position that the run stops at."""


def test_a_signal_saves_at_the_next_seam_and_exits_with_75(
    base: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = command(base, run_dir, *WORDS, processes=1)
    words = words[words.index("train") :]
    for name, stage, number, position in STOPS:
        stop = ["tests.integration.stopped_job", name, stage, str(number)]
        run = [sys.executable, "-m", *stop, *words]
        done = zygote.run(run, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)

        assert done.returncode == 75, done.stderr
        assert f"for the signal {name}" in done.stderr and "Traceback" not in done.stderr
        assert json.loads((run_dir / "status.json").read_text())["state"] == "stopped"
        *_, last = sorted((run_dir / "owners").iterdir(), key=lambda file: int(file.name))
        assert json.loads(last.read_text())["ended"], "the directory is given back"
        assert (run_dir / "checkpoints/latest").read_text().strip() == position
        # One chunk is drawn when a label stage ends; both are kept while a step is trained on.
        chunks = len(list((run_dir / "rollouts").glob("chunk-*")))
        assert chunks == {"label": 1, "update": 2 * ("update" in position)}.get(stage, 0)

    done = train(base, run_dir, *WORDS, processes=1)

    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, undisturbed[1])
    assert json.loads((run_dir / "status.json").read_text())["state"] == "finished"


def test_a_killed_rank_ends_the_job_in_seconds_and_it_resumes(
    base: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    """Ranks without a launcher that would end them: only the lifeline does."""
    run_dir = tmp_path / "run"
    port = free_port()
    processes = []
    for rank in range(2):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment = {**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        run = command(base, run_dir, *WORDS, processes=1)
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        processes.append(zygote.Popen(run, cwd=ROOT, text=True, env=environment, **streams))
    first, second = processes

    try:
        wait_for_row(first, run_dir, 4)
        second.kill()
        killed_at = time.monotonic()
        output, _ = first.communicate(timeout=DEADLINE)
        # Without the lifeline it would wait for the timeout of a collective, many minutes.
        assert time.monotonic() - killed_at < 60
    finally:
        first.kill()
        second.kill()

    assert first.returncode == 1
    assert "rank 1 on" in output and "ended without a word" in output

    done = train(base, run_dir, *WORDS)
    assert done.returncode == 0, done.stderr
    assert_same_run(run_dir, undisturbed[2])


def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    base: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    run_dir = copied(undisturbed[1], tmp_path)
    shard = run_dir / "checkpoints/step_8/__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    done = train(base, run_dir, *WORDS, processes=1)
    assert done.returncode == 0, done.stderr
    assert "checkpoint step_8 is damaged: __0_0.distcp has" in done.stderr
    assert "resuming after step 6" in done.stdout.replace("step_6", "step 6")
    assert_same_run(run_dir, undisturbed[1])


def test_changed_settings_are_reported_and_forbidden_ones_are_refused(
    base: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    run_dir = copied(undisturbed[1], tmp_path)
    done = train(base, run_dir, *WORDS, "trainer.seed=2", processes=1)
    assert done.returncode == 2
    assert "trainer.seed was 1 and is now 2" in done.stderr and "Traceback" not in done.stderr

    before = rows(run_dir / "metrics.jsonl")
    done = train(base, run_dir, *WORDS, f"trainer.steps={STEPS + 1}", "optimizer.lr=1e-5")
    assert done.returncode == 0, done.stderr
    assert "trainer.steps: 8 -> 9" in done.stdout
    assert "optimizer.lr: 5e-05 -> 1e-05" in done.stdout
    assert "layout" in done.stdout and "training agrees to rounding" in done.stdout

    metrics = rows(run_dir / "metrics.jsonl")
    assert metrics[:STEPS] == before
    assert [row["step"] for row in metrics] == list(range(1, STEPS + 2))


def test_two_runs_do_not_share_a_directory(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(base, run_dir, "trainer.steps=1000", processes=1)
    try:
        wait_for_row(process, run_dir, 1)
        done = train(base, run_dir, *WORDS, processes=1)
        assert done.returncode == 2
        assert f"{run_dir} is in use by process {process.pid}" in done.stderr
        assert "Traceback" not in done.stderr
        assert process.poll() is None
    finally:
        kill(process)


def test_a_full_disk_costs_a_warning_or_the_run(base: Path, tmp_path: Path) -> None:
    """A file size limit stands in for the disk: the checkpoint's shards break it,
    the rows and rollouts do not.
    """
    for choice, code in (("go_on", 0), ("stop", 1)):
        run_dir = tmp_path / choice
        words = [
            *WORDS,
            "trainer.steps=4",
            "trainer.export=false",
            f"checkpoint.on_failure={choice}",
        ]
        run = command(base, run_dir, *words, processes=1)
        run = [sys.executable, "-m", "tests.integration.limited_job", *run[run.index("train") :]]
        done = zygote.run(run, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE)
        assert done.returncode == code, done.stderr
        assert "WARNING: checkpoint step_3 could not be saved" in done.stdout
        assert "File too large" in done.stdout
        assert "Traceback" not in done.stderr
        assert not list((run_dir / "checkpoints").glob("step_*"))
        assert ("start the same command again" in done.stderr) == (choice == "stop")


def test_a_time_budget_stops_the_run(base: Path, tmp_path: Path) -> None:
    done = train(
        base,
        tmp_path / "run",
        *WORDS,
        "trainer.steps=100000",
        f"trainer.max_hours={2 / 3600}",
        processes=1,
    )
    assert done.returncode == 75, done.stderr
    assert "for trainer.max_hours is over" in done.stderr


def copied(run_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(run_dir, tmp_path / "run")
    return tmp_path / "run"
