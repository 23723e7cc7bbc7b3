"""What fails on one rank is heard by all of them, at once, however it fails."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.world import World

pytestmark = pytest.mark.one_version

CASES = {
    "every": (OSError(5, "Input/output error"), "RankFailed", "rank 1: OSError: [Errno 5]"),
    "together": (ValueError("the file is empty"), "EveryRankError", "the file is empty"),
    "on_first": (ValueError("it is in use"), "EveryRankError", "it is in use"),
}


def attempts() -> dict[str, tuple[str, str, float]]:
    """By method: the error that this rank raises when one rank alone fails, and the seconds."""
    from megatron_real.parallel.ranks import Ranks

    ranks = Ranks.of_all(timedelta(seconds=240))
    found = {}
    for method, (error, _, _) in CASES.items():
        culprit = 0 if method == "on_first" else 1

        def fail(error: Exception = error, culprit: int = culprit) -> None:
            if ranks.rank == culprit:
                raise error

        started = time.monotonic()
        run: Callable[..., Any] = getattr(ranks, method)
        try:
            run(fail)
        except Exception as raised:
            seconds = time.monotonic() - started
            found[method] = (type(raised).__name__, str(raised), seconds)
        # The next collective is the same on every rank: nobody is still in the last one.
        assert ranks.gathered(method) == [method] * ranks.world
    assert ranks.every(lambda: ranks.rank) == [0, 1, 2]
    everybody = [0, 1, 2] if ranks.first else []
    assert ranks.gathered_by_first(ranks.rank) == everybody
    assert ranks.on_first(lambda: f"rank {ranks.rank}") == "rank 0"
    return found


@pytest.fixture(scope="module")
def answers(world: World) -> list[dict[str, tuple[str, str, float]]]:
    return world.run(attempts, 3)


@pytest.mark.parametrize("method", CASES)
def test_one_ranks_error_is_every_ranks(
    answers: list[dict[str, tuple[str, str, float]]], method: str
) -> None:
    _, kind, sentence = CASES[method]
    for answer in answers:
        name, text, seconds = answer[method]
        assert name == kind and sentence in text
        assert seconds < 120, "half the group's timeout: nobody waited for it"


def kept() -> bool:
    """Whether each rank has its own group back, which cannot be sent to another one."""
    from megatron_real.parallel.ranks import Ranks

    ranks = Ranks.of_all(timedelta(seconds=240))
    return ranks.together(lambda: ranks.group) is ranks.group


def test_what_ranks_make_together_stays_on_each(world: World) -> None:
    assert world.run(kept, 2) == [True, True]


def surveyed(folder: str, fault: str) -> tuple[str, float]:
    """The checkpoint that a survey finds, or why it finds none, and the seconds,
    under a fault on the last rank.
    """
    import os

    from megatron_real.checkpoint import saver
    from megatron_real.parallel.ranks import Ranks
    from megatron_real.runs import saved
    from megatron_real.runs.directory import RunDirectory

    ranks = Ranks.of_all(timedelta(seconds=240))
    directory = RunDirectory(folder)

    def write() -> None:
        for step in (2, 4):
            position = saved.Position(step)
            partial = saved.temporary(directory.checkpoints, position)
            partial.mkdir(parents=True)
            digests = {}
            for name in ("one", "two", "three"):
                file = partial / name
                file.write_text(f"{name} after {step}")
                digests[name] = (file.stat().st_size, saved.checksum(file))
            saved.commit(directory.checkpoints, position, digests, {})

    ranks.on_first(write)
    if ranks.rank == ranks.world - 1:
        listdir, scandir, read = os.listdir, os.scandir, saved.checksum

        def failing(file: Path) -> str:
            if fault == "fails once":
                saved.checksum = read
                raise OSError(5, "Input/output error")
            return read(file)

        saved.checksum = failing
        if fault == "listing":
            os.listdir = lambda path=".": [n for n in listdir(path) if n != "step_4"]  # type: ignore[assignment]
            os.scandir = lambda path=".": [e for e in scandir(path) if e.name != "step_4"]  # type: ignore[assignment]
    started = time.monotonic()
    try:
        newest = saver.survey(directory, ranks).newest
        found = newest.path.name if newest else "none"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return found, time.monotonic() - started


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        pytest.param("listing", "step_4", id="a listing that lacks the newest"),
        pytest.param("fails once", "EveryRankError: ", id="a read that fails once"),
    ],
)
def test_ranks_agree_on_a_checkpoint_whatever_one_of_them_sees(
    world: World, tmp_path: Path, fault: str, expected: str
) -> None:
    answers = world.run(surveyed, 2, folder=str(tmp_path / "run"), fault=fault)
    assert len({found for found, _ in answers}) == 1
    for found, seconds in answers:
        assert found.startswith(expected), found
        assert seconds < 120, "half the group's timeout: nobody waited for it"
