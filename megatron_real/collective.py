"""The one way to let every rank do what may fail: each says how it went, and then all go on or all stop.

A rank that fails between two collectives, and says nothing, leaves the others in the second one until its timeout. So
whatever may fail on one rank alone (a file, a server, a verifier) runs in here, and the collective always comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class RankFailed(RuntimeError):
    """What a rank was to do has failed there; every rank raises this, with the rank and its error."""


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """How it went on one rank."""

    value: T | None
    """What the action returned; None where it failed."""
    error: str = ""
    """Why it failed; empty where it did not."""
    expected: bool = False
    """The failure is of the kind that the caller expects."""


def on_every_rank(
    action: Callable[[], T],
    *,
    group: dist.ProcessGroup | None,
    expected: type[Exception] = ValueError,
    raises: Callable[[str], Exception] = ValueError,
) -> list[T]:
    """Runs `action` on every rank and gives each rank all results. Collective over `group`.

    Args:
        action: what may fail on one rank alone. It must not call collectives: a rank that fails leaves them early.
        group: the ranks that do it together; None where this process is alone.
        expected: errors whose sentence is meant for the user.
        raises: makes the error for such a sentence.

    Returns:
        [rank] what the action returned there.

    Raises:
        RankFailed: the action failed on some rank by another error, which is named with its rank.
        Exception: that of `raises`, where all failures are expected ones; the sentence is the first rank's.
    """
    outcome: _Outcome[T]
    cause: Exception | None = None
    try:
        outcome = _Outcome(action())
    except Exception as error:  # of whatever kind: the other ranks wait for this rank's word
        cause = error
        outcome = _failed(error, expected)

    outcomes = _gathered(outcome, group)
    failures = [(rank, one) for rank, one in enumerate(outcomes) if one.error]
    for rank, one in failures:
        if not one.expected:
            raise RankFailed(f"rank {rank}: {one.error}") from cause
    if failures:
        raise raises(failures[0][1].error) from cause
    return [one.value for one in outcomes]  # type: ignore[misc]  # none has failed


def _failed(error: Exception, expected: type[Exception]) -> _Outcome[Any]:
    if isinstance(error, expected):
        return _Outcome(None, str(error) or type(error).__name__, expected=True)
    return _Outcome(None, f"{type(error).__name__}: {error}")


def _gathered(outcome: _Outcome[T], group: dist.ProcessGroup | None) -> list[_Outcome[T]]:
    if group is None:
        return [outcome]
    outcomes: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(outcomes, outcome, group=group)
    return outcomes
