"""Which rank hangs: told from where all of them are, gathered in a tree.

A rank knows its own `Report`. What a rank and all below it have to say is a `Standing`, which two
of them make one of (`merged`), in whatever order. Its size does not grow with the ranks, so that
neither does what a rank hears every few seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_real.supervision.places import Place

MOST_NAMED = 8
"""Ranks that one sentence names."""


@dataclass(frozen=True)
class Report:
    """Where a rank is, by its own report."""

    rank: str
    """The rank and its machine: "rank 3 on n1"."""
    begun: int = 0
    """Stages begun."""
    stage: str = ""
    """The present one; "" between two stages."""
    seconds: float = 0.0
    """Time in that stage."""
    place: Place = field(default_factory=Place)
    """Where its main thread stands."""


@dataclass(frozen=True)
class Standing:
    """Where some ranks are, as far as it takes to say which of them hangs.

    All fields but the first two are of those of the ranks that are furthest behind.
    """

    longest: float
    """Seconds of the rank that has been in its stage for longest; 0 where none is in a stage."""
    longest_stage: str
    """That stage."""
    begun: int
    """Stages that they have begun."""
    between: bool
    """Whether they have ended the last of them, which is further than being in it."""
    stage: str
    """The stage in which they are; "" between two stages."""
    latest: float
    """Seconds of the one that has come into that stage last; infinite between two stages."""
    num_working: int
    """How many do not wait for other ranks."""
    working: tuple[tuple[str, str], ...]
    """(rank, place) of the first of those."""
    num_waiting: int
    """How many wait for other ranks."""
    waiting: tuple[tuple[str, str], ...]
    """(rank, place) of the first of those."""

    @classmethod
    def of(cls, report: Report) -> Standing:
        """Returns the standing of one rank."""
        named = ((report.rank, str(report.place)),)
        working: tuple[tuple[str, str], ...] = named
        waiting: tuple[tuple[str, str], ...] = ()
        if report.place.waits:
            working = ()
            waiting = named

        # Between two stages it hangs in none: neither the longest, nor one that came late.
        longest = 0.0
        latest = math.inf
        if report.stage:
            longest = report.seconds
            latest = report.seconds
        return cls(
            longest=longest,
            longest_stage=report.stage,
            begun=report.begun,
            between=not report.stage,
            stage=report.stage,
            latest=latest,
            num_working=len(working),
            working=working,
            num_waiting=len(waiting),
            waiting=waiting,
        )


def merged(standings: Sequence[Standing]) -> Standing:
    """Returns the standing of the ranks of all `standings`, of which there is at least one."""
    longest = max(standings, key=lambda standing: standing.longest)
    # False comes before True: who is in a stage is behind who has ended it.
    least = min((standing.begun, standing.between) for standing in standings)
    behind = [standing for standing in standings if (standing.begun, standing.between) == least]

    # Counted all, named a few: a report must not grow with the ranks on its way to the first.
    working = [name for standing in behind for name in standing.working]
    waiting = [name for standing in behind for name in standing.waiting]
    return Standing(
        longest=longest.longest,
        longest_stage=longest.longest_stage,
        begun=behind[0].begun,
        between=behind[0].between,
        stage=behind[0].stage,
        latest=min(standing.latest for standing in behind),
        num_working=sum(standing.num_working for standing in behind),
        working=tuple(working[:MOST_NAMED]),
        num_waiting=sum(standing.num_waiting for standing in behind),
        waiting=tuple(waiting[:MOST_NAMED]),
    )


def hanging(standing: Standing, limit: float) -> str:
    """Returns the sentence that names the rank which keeps the others waiting.

    Args:
        standing: of all ranks that run. Their reports are of one kind, each rank's own from its
            last sign of life: a fresh one of the judge's beside older ones of the others would
            always make the judge look slowest.
        limit: seconds in one stage.

    Returns:
        "" while nobody has waited for `limit` seconds.
    """
    if standing.longest <= limit:
        return ""
    if standing.latest <= limit:
        # They have come late, and have their own time.
        return ""

    # Who waits in a collective waits for somebody else, as long as there is somebody else.
    count = standing.num_working
    culprits = standing.working
    if not count:
        count = standing.num_waiting
        culprits = standing.waiting
    if count == 1:
        ((rank, place),) = culprits
        where = f"after its stage {standing.begun}"
        if standing.stage:
            where = f"in stage {standing.stage}"
        return (
            f"{rank} hangs: it has been {where} for {standing.longest:.0f} s, "
            f"the others wait for it; it is at {place}"
        )

    named = [f"{rank} at {place}" for rank, place in culprits]
    if count > len(named):
        named.append(f"and {count - len(named)} more")
    return (
        f"the run hangs: for {standing.longest:.0f} s nobody has come out of stage "
        f"{standing.longest_stage}, and who keeps the others waiting cannot be told: "
        f"{'; '.join(named)}"
    )
