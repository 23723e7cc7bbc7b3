"""The one way for all ranks to do what may fail, and to tell each other small values.

A rank that fails between two collectives, and reports nothing, leaves the others in the second one
until its timeout. So whatever may fail on one rank alone (a file, a server, a verifier) runs in
here, and the collective always comes.

    all_well            every rank acts; each keeps its own result       8 bytes where all goes well
    on_every_rank       every rank acts; each gets all results           s W bytes to every rank
    on_first            the first rank acts; each gets its result        s bytes to every rank
    gathered            a value of every rank, for all                   s W bytes to every rank
    gathered_if_any     the same, for what nearly always is nothing      8 bytes where it is nothing
    gathered_by_first   a value of every rank, for the first             s W bytes to the first rank
    shared              the first rank's value, for all                  s bytes to every rank

W are the ranks of the group, s the bytes of a pickled value. These are the only callers of
torch.distributed's collectives of Python objects. `group` is the ranks that act together; None
where this process is alone.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_real.parallel.cpu import CPU, device

T = TypeVar("T")


class RankFailed(RuntimeError):
    """What a rank was to do has failed there. Every rank raises this, with that rank's error."""


@dataclass(frozen=True)
class _Outcome:
    """What became of the action on one rank, as others are told it."""

    value: bytes = b""
    """What the action returned, pickled where others want it."""
    error: str = ""
    """Why it failed; empty where it did not."""
    expected: bool = False
    """The failure is of the kind that the caller expects."""


class _Attempt:
    """One call of an action on this rank."""

    def __init__(self, action: Callable[[], Any], expected: type[Exception], *, pickled: bool):
        """Calls the action.

        Args:
            action: what may fail.
            expected: errors whose sentence is meant for the user.
            pickled: others want the result, so that it fails here if it cannot be pickled: within
                the collective that would leave them waiting.
        """
        self.value: Any = None
        self.cause: Exception | None = None
        try:
            self.value = action()
            self.outcome = _Outcome(pickle.dumps(self.value) if pickled else b"")
        except expected as error:
            self.cause = error
            # Never empty: an outcome without a sentence counts as a success.
            self.outcome = _Outcome(error=str(error) or type(error).__name__, expected=True)
        except Exception as error:  # of whatever kind: the other ranks wait for this rank's report
            self.cause = error
            self.outcome = _Outcome(error=f"{type(error).__name__}: {error}")

    def raise_first(
        self, outcomes: list[_Outcome], raises: Callable[[str], Exception] = ValueError
    ) -> None:
        """Raises the error that all ranks raise, where some rank of `outcomes` has failed."""
        failures = [(rank, outcome) for rank, outcome in enumerate(outcomes) if outcome.error]
        # Unexpected ones first: the others may have failed because of them.
        for rank, failure in failures:
            if not failure.expected:
                raise RankFailed(f"rank {rank}: {failure.error}") from self.cause
        if failures:
            _, first = failures[0]
            raise raises(first.error) from self.cause


def all_well(
    action: Callable[[], T],
    *,
    group: dist.ProcessGroup | None,
    expected: type[Exception] = ValueError,
    raises: Callable[[str], Exception] = ValueError,
) -> T:
    """Runs `action` on every rank; returns its result on this rank once it has gone well on all.

    Collective over `group`, whatever happens in `action`. What it returns stays on this rank, so it
    may hold what cannot be sent to others, such as a process group.

    Args:
        action: what may fail on one rank alone. It must not call collectives: a rank that fails
            leaves them early.
        group: the ranks that do it together.
        expected: errors whose sentence is meant for the user.
        raises: makes the error for such a sentence.

    Raises:
        RankFailed: the action failed on some rank by another error, which is named with its rank.
        Exception: that of `raises`, where all failures are expected ones; the sentence is the first
            rank's.
    """
    attempt = _Attempt(action, expected, pickled=False)
    _all_without_error(attempt, group, raises)
    result: T = attempt.value
    return result


def on_every_rank(
    action: Callable[[], T],
    *,
    group: dist.ProcessGroup | None,
    expected: type[Exception] = ValueError,
    raises: Callable[[str], Exception] = ValueError,
) -> list[T]:
    """Runs `action` on every rank, and returns [rank] what it returned there, on every rank.

    Collective, with the arguments and errors of `all_well`, which suffices where nobody needs the
    others' results.
    """
    # Pickled within the attempt: what cannot be pickled is then a failure like any other.
    attempt = _Attempt(action, expected, pickled=group is not None)
    _all_without_error(attempt, group, raises)
    if group is None:
        return [attempt.value]
    return [pickle.loads(value) for value in gathered(attempt.outcome.value, group=group)]


def _all_without_error(
    attempt: _Attempt, group: dist.ProcessGroup | None, raises: Callable[[str], Exception]
) -> None:
    """Raises on every rank what some rank's attempt has raised. Collective."""
    failed = bool(attempt.outcome.error)
    # Values are not sent along: where one rank has failed nobody wants them.
    own = attempt.outcome if failed else _Outcome()
    if _any(failed, group):
        attempt.raise_first(gathered(own, group=group), raises)


def on_first(
    action: Callable[[], T],
    *,
    group: dist.ProcessGroup | None,
    expected: type[Exception] = ValueError,
    raises: Callable[[str], Exception] = ValueError,
) -> T:
    """Returns on every rank what `action` returned on the first one, while the others waited.

    Collective, with the arguments and errors of `all_well`. Only the first rank can fail, so its
    outcome is all that is sent, once and by a broadcast. It may be large.
    """
    # The others attempt nothing and cannot fail.
    is_first = group is None or dist.get_rank(group) == 0
    attempt = _Attempt(
        action if is_first else lambda: None, expected, pickled=is_first and group is not None
    )

    outcome = shared(attempt.outcome, group=group)
    attempt.raise_first([outcome], raises)

    if is_first:
        result: T = attempt.value
        return result
    result = pickle.loads(outcome.value)
    return result


def gathered(value: T, *, group: dist.ProcessGroup | None) -> list[T]:
    """Returns [rank] every rank's value, on every rank. Collective."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gathered_if_any(value: T, *, group: dist.ProcessGroup | None) -> list[T]:
    """Returns [rank] every rank's value where some rank has one that counts as true, else [].

    Collective. It is for complaints, of which there are none nearly always.
    """
    if not _any(bool(value), group):
        return []
    return gathered(value, group=group)


def gathered_by_first(value: T, *, group: dist.ProcessGroup | None) -> list[T]:
    """Returns [rank] every rank's value on the first rank, [] on the others. Collective.

    What one rank writes or shows goes there alone: `gathered` would send it to all, by the square
    of the ranks.
    """
    if group is None:
        return [value]

    # torch insists on None where nothing is received.
    values: list[Any] | None = None
    if dist.get_rank(group) == 0:
        values = [None] * dist.get_world_size(group)
    # torch wants the destination's rank in the world, not in the group.
    dist.gather_object(value, values, dst=dist.get_global_rank(group, 0), group=group)
    return values or []


def shared(value: T, *, group: dist.ProcessGroup | None) -> T:
    """Returns the first rank's value, on every rank. Collective."""
    if group is None:
        return value
    # On the other ranks the broadcast puts the first rank's value in its place.
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_global_rank(group, 0), group=group)
    return values[0]


def _any(flag: bool, group: dist.ProcessGroup | None) -> bool:
    """Returns whether the flag is set on some rank; the same on each. Collective."""
    if group is None:
        return flag
    # NCCL reduces tensors of the device only, gloo those of the host.
    place = CPU
    if dist.get_backend(group) == "nccl":
        place = device()
    is_set = torch.tensor([int(flag)], device=place)
    dist.all_reduce(is_set, op=dist.ReduceOp.MAX, group=group)
    return bool(is_set.item())
