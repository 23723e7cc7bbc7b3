"""One rank's end, seen by the others: real processes, no collectives."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

RANK = """
import sys, time
from megatron_real.runs.lifeline import Lifeline
rank, world, port, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
address = sys.argv[5]

def share(mine):
    from pathlib import Path
    file = Path(address)
    if mine is not None:
        file.with_suffix(".new").write_text(f"{mine[0]} {mine[1]}")
        file.with_suffix(".new").rename(file)
    while not file.exists():
        time.sleep(0.01)
    host, port = file.read_text().split()
    return host, int(port)

began = time.monotonic()
def stage():
    if what == "hang" and rank == 1:
        return 3, "rollout", time.monotonic() - began
    return 4, "label", time.monotonic() - began

limits = {"hang_seconds": 1.0 if what == "hang" else 600.0, "silent_seconds": 4.0 if what == "silence" else 600.0}
line = Lifeline(rank, world, share=share, stage=stage, beat_seconds=0.1, **limits)
print("ready", flush=True)
if what == "raise" and rank == 1:
    time.sleep(0.5)
    line.say_end("ValueError: no good")
    sys.exit(1)
if what == "good":
    time.sleep(0.3 * rank)
    line.close()
    sys.exit(0)
time.sleep(600)
"""


@pytest.fixture
def ranks(request, tmp_path):  # type: ignore[no-untyped-def]
    """Three ranks that do what the test says."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), "3", "0", request.param, str(tmp_path / "address")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in range(3)
    ]  # fmt: skip
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield started
    for process in started:
        process.kill()


def ends(processes: list[subprocess.Popen[str]], within: float) -> list[str]:
    """What each wrote to its end."""
    started = time.monotonic()
    return [p.communicate(timeout=max(within - (time.monotonic() - started), 0.1))[1] for p in processes]


@pytest.mark.parametrize("ranks", ["wait"], indirect=True)
@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_takes_the_others_down(ranks: list[subprocess.Popen[str]], victim: int) -> None:
    ranks[victim].send_signal(signal.SIGKILL)
    others = [p for i, p in enumerate(ranks) if i != victim]
    for said in ends(others, within=5.0):
        name = "rank 0" if victim == 0 else f"rank {victim} on {socket.gethostname()}"
        assert f"{name} ended without a word" in said
    assert [p.returncode for p in others] == [1, 1]


@pytest.mark.parametrize("ranks", ["raise"], indirect=True)
def test_an_error_is_named_as_the_first_cause(ranks: list[subprocess.Popen[str]]) -> None:
    for said in ends([ranks[0], ranks[2]], within=5.0):
        assert "rank 1 on" in said and "ended first: ValueError: no good" in said


@pytest.mark.parametrize("ranks", ["hang"], indirect=True)
def test_a_rank_that_hangs_is_named(ranks: list[subprocess.Popen[str]]) -> None:
    for said in ends(ranks, within=8.0):
        assert "rank 1 on" in said and "hangs: it has been in stage rollout" in said


@pytest.mark.parametrize("ranks", ["silence"], indirect=True)
def test_a_rank_without_a_sign_of_life_is_named(ranks: list[subprocess.Popen[str]]) -> None:
    """A stopped process keeps its socket open, as a machine that vanished does."""
    ranks[2].send_signal(signal.SIGSTOP)
    for said in ends(ranks[:2], within=8.0):
        assert "rank 2 on" in said and "has given no sign of life" in said


@pytest.mark.parametrize("ranks", ["good"], indirect=True)
def test_a_good_end_takes_nobody_down(ranks: list[subprocess.Popen[str]]) -> None:
    assert ends(ranks, within=10.0) == ["", "", ""]
    assert [p.returncode for p in ranks] == [0, 0, 0]
