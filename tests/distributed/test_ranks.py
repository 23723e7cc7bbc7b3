"""An error on one rank is raised on all of them at once, whichever method runs into it."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.world import World

pytestmark = pytest.mark.one_version

# method -> (error on one rank, class of the error on every rank, a part of its message)
CASES = {
    "every": (OSError(5, "Input/output error"), "RankFailed", "rank 1: OSError: [Errno 5]"),
    "together": (ValueError("the file is empty"), "EveryRankError", "the file is empty"),
    "on_first": (ValueError("it is in use"), "EveryRankError", "it is in use"),
}


def attempts() -> dict[str, tuple[str, str, float]]:
    """Returns for each method the error that this rank raises when one rank alone fails,
    as its class and message, and the seconds that it took.
    """
    from megatron_real.parallel.ranks import Ranks

    ranks = Ranks.of_all(timedelta(seconds=240))
    errors = {}
    for method, (error, _, _) in CASES.items():
        # `on_first` calls the function on the first rank alone.
        culprit = 1
        if method == "on_first":
            culprit = 0

        def fail(error: Exception = error, culprit: int = culprit) -> None:
            if ranks.rank == culprit:
                raise error

        started = time.monotonic()
        run: Callable[..., Any] = getattr(ranks, method)
        try:
            run(fail)
        except Exception as raised:
            seconds = time.monotonic() - started
            errors[method] = (type(raised).__name__, str(raised), seconds)
        # The next collective is the same on every rank: nobody is still in the last one.
        assert ranks.gathered(method) == [method] * ranks.world

    assert ranks.every(lambda: ranks.rank) == [0, 1, 2]
    assert ranks.gathered_by_first(ranks.rank) == [0, 1, 2] * ranks.first
    assert ranks.on_first(lambda: f"rank {ranks.rank}") == "rank 0"
    return errors


@pytest.fixture(scope="module")
def answers(world: World) -> list[dict[str, tuple[str, str, float]]]:
    return world.run(attempts, 3)


@pytest.mark.parametrize("method", CASES)
def test_one_ranks_error_is_raised_on_every_rank(
    answers: list[dict[str, tuple[str, str, float]]], method: str
) -> None:
    _, expected_class, sentence = CASES[method]
    for answer in answers:
        error_class, message, seconds = answer[method]
        assert error_class == expected_class and sentence in message
        assert seconds < 120, "half the group's timeout: nobody waited for it"


def exchanged() -> dict[str, Any]:
    """What ranks tell each other, what each of them got, and how often objects were gathered."""
    import torch.distributed as dist

    from megatron_real.parallel.ranks import Ranks

    ranks = Ranks.of_all(timedelta(seconds=240))
    gatherings = []
    gather = dist.all_gather_object

    def counted(*words: Any, **options: Any) -> None:
        gatherings.append(1)
        gather(*words, **options)

    dist.all_gather_object = counted
    found: dict[str, Any] = {
        "large": ranks.on_first(lambda: b"x" * (1 << 20) if ranks.first else b"another's"),
        "kept": ranks.together(lambda: ranks.group) is ranks.group,
        "no complaint": ranks.gathered_if_any(""),
    }
    found["gatherings when all goes well"] = len(gatherings)
    found["one complaint"] = ranks.gathered_if_any("rank 1 is full" if ranks.rank == 1 else "")

    def fail() -> None:
        if ranks.rank == 0:
            raise ValueError("the others have failed")
        if ranks.rank == 2:
            raise OSError("the disk is lost")

    for case, action in {
        "an unexpected error first": fail,
        "a value that cannot be pickled": lambda: ranks.group if ranks.rank == 1 else None,
        "the first one's cannot be pickled": lambda: ranks.group,
    }.items():
        call = ranks.on_first if case.startswith("the first") else ranks.every
        try:
            call(action)
        except Exception as error:
            found[case] = f"{type(error).__name__}: {error}"
    return found


def test_what_ranks_tell_each_other(world: World) -> None:
    for found in world.run(exchanged, 3):
        assert found["large"] == b"x" * (1 << 20)
        assert found["kept"], "a group cannot be sent, and is not"
        assert found["no complaint"] == []
        assert found["gatherings when all goes well"] == 0
        assert found["one complaint"] == ["", "rank 1 is full", ""]
        assert found["an unexpected error first"] == "RankFailed: rank 2: OSError: the disk is lost"
        assert found["a value that cannot be pickled"].startswith("RankFailed: rank 1: TypeError:")
        assert found["the first one's cannot be pickled"].startswith("RankFailed: rank 0: TypeErr")


def threads_of_runs() -> list[int]:
    """Threads of this process in each of four runs that follow each other in it."""
    import os

    import torch.distributed as dist

    from megatron_real.parallel.groups import join_world, leave_world

    leave_world()
    del os.environ["MASTER_PORT"]  # a process of its own: nobody else to meet
    found = []
    for _ in range(4):
        join_world(5.0)
        groups = [dist.new_group(backend="gloo") for _ in range(2)]
        found.append(len(list(Path("/proc/self/task").iterdir())))
        del groups
        leave_world()
    return found


def test_groups_of_earlier_runs_in_a_process_are_let_go(world: World) -> None:
    """Each of them has threads, which poll."""
    (found,) = world.run(threads_of_runs, 1)
    assert len(set(found[1:])) == 1, found


def surveyed(folder: str, fault: str) -> tuple[str, float]:
    """Returns the name of the checkpoint that a survey finds under a fault on the last rank,
    or the error that it raises; and the seconds that it took.
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
        listdir = os.listdir
        scandir = os.scandir
        checksum = saved.checksum

        def failing_once(file: Path) -> str:
            saved.checksum = checksum
            raise OSError(5, "Input/output error")

        if fault == "fails once":
            saved.checksum = failing_once
        if fault == "listing":
            os.listdir = lambda path=".": [n for n in listdir(path) if n != "step_4"]  # type: ignore[assignment]
            os.scandir = lambda path=".": [e for e in scandir(path) if e.name != "step_4"]  # type: ignore[assignment]

    started = time.monotonic()
    try:
        newest = saver.survey(directory, ranks).newest
        outcome = "none"
        if newest is not None:
            outcome = newest.path.name
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return outcome, time.monotonic() - started


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
    assert len({outcome for outcome, _ in answers}) == 1
    for outcome, seconds in answers:
        assert outcome.startswith(expected), outcome
        assert seconds < 120, "half the group's timeout: nobody waited for it"
