"""The one way to let every rank do what may fail: each reports, and then all go on or all stop.

A rank that fails between two collectives, and reports nothing, leaves the others in the second one
until its timeout. So whatever may fail on one rank alone (a file, a server, a verifier) runs in
here, and the collective always comes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class RankFailed(RuntimeError):
    """What a rank was to do has failed there. Every rank raises this, with that rank's error."""


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What became of the action on one rank."""

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
        action: what may fail on one rank alone. It must not call collectives: a rank that fails
            leaves them early.
        group: the ranks that do it together; None where this process is alone.
        expected: errors whose sentence is meant for the user.
        raises: makes the error for such a sentence.

    Returns:
        [rank] what the action returned there.

    Raises:
        RankFailed: the action failed on some rank by another error, which is named with its rank.
        Exception: that of `raises`, where all failures are expected ones; the sentence is the first
            rank's.
    """
    outcome: _Outcome[T]
    cause: Exception | None = None
    try:
        outcome = _Outcome(action())
    except expected as error:
        cause = error
        outcome = _Outcome(None, str(error) or type(error).__name__, expected=True)
    except Exception as error:  # of whatever kind: the other ranks wait for this rank's report
        cause = error
        outcome = _Outcome(None, f"{type(error).__name__}: {error}")

    outcomes = [outcome]
    if group is not None:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, outcome, group=group)
        outcomes = gathered

    failures = [(rank, one) for rank, one in enumerate(outcomes) if one.error]
    # Unexpected ones first: the others may have failed because of them.
    for rank, failure in failures:
        if not failure.expected:
            raise RankFailed(f"rank {rank}: {failure.error}") from cause
    if failures:
        _, first = failures[0]
        raise raises(first.error) from cause
    return [one.value for one in outcomes]  # type: ignore[misc]  # none has failed
