"""The end of one rank as the others see it, with real processes in a chain and no collectives."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_real import challenge
from megatron_real.supervision.hanging import Report, Standing, hanging, merged
from megatron_real.supervision.lifeline import FAN_OUT, MOST_SOCKETS, _Line, tree
from megatron_real.supervision.places import Place, place_of
from tests.faults.lifeline import start, wait_until_ready

HOST = socket.gethostname()


@pytest.fixture
def ranks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    started = [start(rank, request.param, tmp_path) for rank in range(3)]
    try:
        wait_until_ready(started)
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def ends(processes: list[subprocess.Popen[str]], within: float) -> list[str]:
    """Returns what each rank wrote when it ended."""
    started = time.monotonic()
    return [
        p.communicate(timeout=max(within - (time.monotonic() - started), 0.1))[1] for p in processes
    ]


@pytest.mark.parametrize("ranks", ["wait"], indirect=True)
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_takes_the_others_down(
    ranks: list[subprocess.Popen[str]], victim: int
) -> None:
    ranks[victim].send_signal(signal.SIGKILL)
    others = [p for i, p in enumerate(ranks) if i != victim]
    for message in ends(others, within=120.0):
        assert f"rank {victim} on {HOST} ended without a word" in message
    assert [p.returncode for p in others] == [1, 1]


def test_ranks_pass_on_what_they_do_not_see_themselves(tmp_path: Path) -> None:
    """In a chain of four, the last one hears of the first one's end over two others."""
    started = [start(rank, "wait", tmp_path, world=4) for rank in range(4)]
    try:
        wait_until_ready(started)
        started[0].send_signal(signal.SIGKILL)
        for message in ends(started[1:], within=120.0):
            assert f"rank 0 on {HOST} ended without a word" in message
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("ranks", ["raise"], indirect=True)
def test_an_error_is_named_as_the_first_cause(ranks: list[subprocess.Popen[str]]) -> None:
    for message in ends([ranks[0], ranks[2]], within=120.0):
        assert "rank 1 on" in message and "ended first: ValueError: no good" in message


@pytest.mark.parametrize("ranks", ["hang"], indirect=True)
def test_a_rank_that_hangs_is_named(ranks: list[subprocess.Popen[str]]) -> None:
    for message in ends(ranks, within=120.0):
        assert f"rank 1 on {HOST} hangs: it has been in stage rollout for" in message
        assert "it is at <string>:" in message


@pytest.mark.parametrize("ranks", ["silence"], indirect=True)
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_without_a_sign_of_life_is_named(
    ranks: list[subprocess.Popen[str]], victim: int
) -> None:
    """A suspended process keeps its socket open, like a machine that vanished.

    The others see it from both of its sides.
    """
    ranks[victim].send_signal(signal.SIGSTOP)
    others = [p for i, p in enumerate(ranks) if i != victim]
    for message in ends(others, within=120.0):
        assert f"rank {victim} on {HOST} has given no sign of life for" in message
    ranks[victim].send_signal(signal.SIGCONT)
    (message,) = ends([ranks[victim]], within=120.0)
    assert f"rank {victim} on {HOST} has given no sign of life" in message, "it hears why"


@pytest.mark.parametrize("ranks", ["silence"], indirect=True)
def test_a_job_that_was_suspended_goes_on(ranks: list[subprocess.Popen[str]]) -> None:
    """Slurm suspends all processes of a job, so nobody spoke and nobody listened."""
    for process in ranks:
        process.send_signal(signal.SIGSTOP)
    time.sleep(6.0)
    for process in ranks:
        process.send_signal(signal.SIGCONT)
    time.sleep(1.0)
    assert [process.poll() for process in ranks] == [None] * 3


@pytest.mark.parametrize("ranks", ["good"], indirect=True)
def test_a_rank_that_ends_well_ends_no_other(ranks: list[subprocess.Popen[str]]) -> None:
    assert ends(ranks, within=120.0) == ["", "", ""]
    assert [p.returncode for p in ranks] == [0, 0, 0]


@pytest.mark.parametrize("ranks", ["leave"], indirect=True)
def test_an_error_that_not_every_rank_has_ends_the_others_later(
    ranks: list[subprocess.Popen[str]],
) -> None:
    """Otherwise they would wait for that rank in a collective."""
    for message in ends([ranks[0], ranks[2]], within=120.0):
        assert f"rank 1 on {HOST} ended first: the engine is lost" in message
    assert ranks[1].wait(120) == 3


def test_foreign_connections_do_not_disturb_the_ranks(tmp_path: Path) -> None:
    """A scanner, connections that close or stay silent, and a forged rank all come before the ranks
    do.
    """
    # The first rank gathers machines and its secret from these files; the others start later.
    for rank in (1, 2):
        (tmp_path / f"1-{rank}").write_text(json.dumps([HOST, ""]))
    first = start(0, "good", tmp_path)
    while not (tmp_path / "2-0").exists():
        time.sleep(0.01)
    _, secret = json.loads((tmp_path / "1-0").read_text())
    (host, port), _ = json.loads((tmp_path / "2-0").read_text())
    strays = [socket.create_connection((host, port)) for _ in range(5)]
    strays[0].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 3)
    strays[1].close()
    strays[2].sendall(b"\0")
    strays[3].sendall(bytes(64) + b'{"rank": 1, "host": "evil"}\n')

    # It knows the secret and forges a rank that does not exist, so it is not let in either.
    known = challenge.connect((host, port), secret, purpose="lifeline")
    known.sendall(b'{"rank": 7, "host": "evil"}\n')

    started = [first, *(start(rank, "good", tmp_path) for rank in (1, 2))]
    try:
        wait_until_ready(started)
        assert ends(started, within=120.0) == ["", "", ""]
        assert strays[3].recv(1024)[32:] == b"", "nothing but the challenge"
    finally:
        for process in started:
            process.kill()
        for stray in [*strays, known]:
            stray.close()


def test_what_follows_the_first_word_stays_to_be_read() -> None:
    """A rank may join and announce its end before the first rank has read a word of it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b'{"rank": 1}\n{"leaving": "the engine is lost"}\n')
        line = _Line(ours)
        assert line.first_word(5.0) == {"rank": 1}
        assert line.words() == [{"leaving": "the engine is lost"}]


ORPHAN = """
import time
from megatron_real.supervision.stop import SIGTERM, StopRequest
stop = StopRequest()
print("ready", flush=True)
while not stop._wish:
    time.sleep(0.02)
print("asked by SIGTERM" if stop._wish == SIGTERM else "asked otherwise", flush=True)
"""


def test_a_rank_whose_launcher_was_killed_is_asked_to_stop() -> None:
    """torchrun starts ranks in sessions of their own, which no signal to its process
    group reaches.
    """
    launch = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]], "
        "start_new_session=True); time.sleep(600)"
    )
    launcher = subprocess.Popen(
        [sys.executable, "-c", launch, ORPHAN],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "none"},
    )
    assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"

    launcher.kill()
    output, _ = launcher.communicate(timeout=120.0)
    assert output == "asked by SIGTERM\n"


ENDING = """
import os, signal
from megatron_real.supervision.stop import StopRequest

class Last:
    def __del__(self):  # Python has given signals their defaults back by then
        for number in signal_numbers:
            os.kill(os.getpid(), number)
        os.write(1, b"ended by itself")

signal_numbers = [signal.SIGUSR1, signal.SIGTERM]
stop = StopRequest()
last = Last()
"""


@pytest.mark.parametrize(
    "ending, output, code",
    [(ENDING + "stop.ignore()", "ended by itself", 0), (ENDING, "", -signal.SIGUSR1)],
    ids=["ignored", "negative control"],
)
def test_a_signal_does_not_kill_a_process_whose_run_is_over(
    ending: str, output: str, code: int
) -> None:
    ended = subprocess.run([sys.executable, "-c", ending], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == (output, code)


WORKS = Place("worker.py:7 in work")
WAITS = Place("c10d.py:9 in all_reduce", waits=True)
HANGS = {
    "nobody yet": (
        [Report("rank 0", 5, "update", 59.0, WAITS), Report("rank 1", 5, "update", 59.0, WORKS)],
        "",
    ),
    "in the same stage, who does not wait": (
        [Report("rank 0", 5, "update", 99.0, WAITS), Report("rank 1", 5, "update", 98.0, WORKS)],
        "rank 1 hangs: it has been in stage update for 99 s",
    ),
    "the last one is the judge": (
        [Report("rank 0", 5, "update", 98.0, WORKS), Report("rank 1", 5, "update", 99.0, WAITS)],
        "rank 0 hangs: it has been in stage update for 99 s",
    ),
    "in an earlier stage": (
        [Report("rank 0", 5, "update", 70.0, WAITS), Report("rank 1", 4, "label", 90.0, WAITS)],
        "rank 1 hangs: it has been in stage label for 90 s",
    ),
    "between two stages": (
        [Report("rank 0", 4, "", 0.0, WORKS), Report("rank 1", 5, "sync", 90.0, WAITS)],
        "rank 0 hangs: it has been after its stage 4 for 90 s",
    ),
    "late, not hanging": (
        [Report("rank 0", 5, "update", 90.0, WAITS), Report("rank 1", 4, "label", 5.0, WORKS)],
        "",
    ),
    "one report is older": (
        [Report("rank 0", 5, "update", 61.0, WAITS), Report("rank 1", 5, "update", 58.0, WORKS)],
        "",
    ),
    "all wait": (
        [Report("rank 0", 5, "update", 90.0, WAITS), Report("rank 1", 5, "update", 90.0, WAITS)],
        "who keeps the others waiting cannot be told: rank 0 at c10d.py:9 in all_reduce, in a "
        "collective; rank 1 at",
    ),
    "starting": ([Report("rank 0"), Report("rank 1")], ""),
}


@pytest.mark.parametrize("case", HANGS)
def test_the_rank_that_keeps_the_others_waiting_is_named(case: str) -> None:
    reports, sentence = HANGS[case]
    message = hanging(merged([Standing.of(report) for report in reports]), 60.0)
    assert sentence in message and bool(sentence) == bool(message)


def test_who_hangs_is_the_same_in_any_tree() -> None:
    draw = random.Random(0)
    reports = [
        Report(f"rank {i}", draw.choice([5, 6]), draw.choice(["", "update"]), draw.uniform(50, 90))
        for i in range(40)
    ]
    # One at a time, and in subtrees: what goes up the tree says all that the judge needs.
    each = [Standing.of(report) for report in reports]
    in_subtrees = [merged(each[i : i + 7]) for i in range(0, 40, 7)]
    assert merged(in_subtrees) == merged(each)
    assert merged(each).num_working == sum(r.begun == 5 and bool(r.stage) for r in reports)
    assert len(merged(each).working) == 8


@pytest.mark.parametrize(("machines", "ranks_each"), [(512, 8), (1, 512), (4096, 1), (1, 2)])
def test_the_tree_has_few_connections_of_a_rank_and_few_steps(
    machines: int, ranks_each: int
) -> None:
    hosts = [f"n{i}" for i in range(machines) for _ in range(ranks_each)]
    above = tree(hosts)
    sockets = Counter(above) + Counter(range(1, len(hosts)))
    assert max(sockets[rank] for rank in range(len(hosts))) <= MOST_SOCKETS

    depth = [0] * len(hosts)
    for rank in range(1, len(hosts)):
        assert above[rank] < rank, "every rank leads to the first one"
        depth[rank] = depth[above[rank]] + 1
    assert max(depth) <= math.log(len(hosts), FAN_OUT) + 2
    between_machines = sum(hosts[rank] != hosts[above[rank]] for rank in range(1, len(hosts)))
    assert between_machines == machines - 1


def test_a_place_is_a_line_of_code() -> None:
    import threading

    def waiting() -> None:
        event.wait()

    event = threading.Event()
    thread = threading.Thread(target=waiting)
    thread.start()
    try:
        assert thread.ident is not None
        place = place_of(thread.ident)
        while "in wait" not in place.where:
            place = place_of(thread.ident)
    finally:
        event.set()
        thread.join()

    assert place.where.startswith("threading.py:")
    assert place_of(0) == Place()
