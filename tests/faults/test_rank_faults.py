"""A table of faults: a rank that sleeps, freezes, dies or errs at a named point of a run, and how
every rank must end.

A fault is POINT:RANK:KIND, and happens in tests/faults/jobs.py. Every rank must end by itself, with
a message that names the cause.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests import zygote
from tests.ports import free_port

HOST = socket.gethostname()
SECONDS = 240
"""By then every rank has ended; the slowest rows take 5 s on a machine of their own. A collective
without a lifeline would wait for 300 s.
"""
FROZEN = "frozen"


@dataclass(frozen=True)
class Row:
    """One fault, and how each rank must end."""

    case: str
    fault: str
    words: tuple[str, ...]
    """What each rank's output must have in it, in order of ranks;
    FROZEN for one that never wakes up.
    """
    code: int = 1
    """The exit code of the ranks that end by themselves."""


NAMED = f"on {HOST}"
TABLE = {
    "asleep in a stage, rank 1": Row(
        "steps",
        "update2:1:sleep",
        (f"rank 1 {NAMED} hangs: it has been in stage update for",) * 2,
    ),
    "asleep in a stage, rank 0": Row(
        "steps",
        "update2:0:sleep",
        (f"rank 0 {NAMED} hangs: it has been in stage update for",) * 2,
    ),
    "asleep between stages": Row(
        "steps", "between2:0:sleep", (f"rank 0 {NAMED} hangs: it has been after its stage 5",) * 2
    ),
    "frozen, rank 0": Row(
        "steps", "rollout2:0:freeze", (FROZEN, f"rank 0 {NAMED} has given no sign of life for")
    ),
    "frozen, rank 1": Row(
        "steps", "rollout2:1:freeze", (f"rank 1 {NAMED} has given no sign of life for", FROZEN)
    ),
    "killed, rank 0": Row("steps", "update1:0:kill", ("", f"rank 0 {NAMED} ended without a word")),
    "killed, rank 1": Row("steps", "update1:1:kill", (f"rank 1 {NAMED} ended without a word", "")),
    "an error in a stage": Row(
        "steps",
        "rollout2:1:error",
        (f"rank 1 {NAMED} ended first: OSError: [Errno 5]", "OSError: [Errno 5]"),
    ),
    "an error in what all gather": Row(
        "steps", "gathered2:1:error", ("rank 1: OSError: [Errno 5]",) * 2
    ),
    "an error in a thread's collective": Row(
        "thread", "digests:1:error", ("heard ['rank 1: OSError: [Errno 5]",) * 2, code=0
    ),
    "a sync that waits in the store": Row(
        "store",
        "",
        (
            "weight sync 1 did not finish in 2 s (rollout.sync.timeout_seconds): rank 0, 1 waits "
            "for a key",
            f"rank 0 {NAMED} ended without a word",
        ),
    ),
    "nothing": Row("steps", "", ("finished", "finished"), code=0),
}


@dataclass(frozen=True)
class End:
    """How a rank ended."""

    code: int | None
    """None: it had to be killed."""
    text: str


def ends(row: Row) -> list[End]:
    """Runs two ranks under a fault."""
    port = str(free_port())
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            zygote.Popen(
                [sys.executable, "-m", "tests.faults.jobs", row.case, str(rank), "2", port, folder],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "FAULT": row.fault},
            )
            for rank in range(2)
        ]

        ends_of_ranks = []
        for process, words in zip(processes, row.words, strict=True):
            if words == FROZEN:
                ends_of_ranks.append(End(None, ""))
                continue
            try:
                text, _ = process.communicate(timeout=SECONDS)
                ends_of_ranks.append(End(process.returncode, text))
            except subprocess.TimeoutExpired:
                ends_of_ranks.append(End(None, ""))

        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    return ends_of_ranks


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Future[list[End]]]:
    """Three rows at a time: most of them wait for most of their time."""
    with ThreadPoolExecutor(3) as pool:
        return {name: pool.submit(ends, row) for name, row in TABLE.items()}


@pytest.mark.parametrize("name", TABLE)
def test_every_rank_ends_with_a_message_that_names_the_cause(
    outcomes: dict[str, Future[list[End]]], name: str
) -> None:
    row = TABLE[name]
    for end, words in zip(outcomes[name].result(), row.words, strict=True):
        if words == FROZEN:
            continue
        assert words in end.text, end.text
        # The killed rank itself has no words, and the exit code of its signal.
        if "kill" not in row.fault or words:
            assert end.code == row.code, end.text
