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
        waits = report.place.waits
        return cls(
            longest=report.seconds if report.stage else 0.0,
            longest_stage=report.stage,
            begun=report.begun,
            between=not report.stage,
            stage=report.stage,
            latest=report.seconds if report.stage else math.inf,
            num_working=int(not waits),
            working=() if waits else named,
            num_waiting=int(waits),
            waiting=named if waits else (),
        )


def merged(standings: Sequence[Standing]) -> Standing:
    """Returns the standing of the ranks of all `standings`, of which there is at least one."""
    longest = max(standings, key=lambda one: one.longest)
    least = min((one.begun, one.between) for one in standings)
    behind = [one for one in standings if (one.begun, one.between) == least]

    working = [name for one in behind for name in one.working]
    waiting = [name for one in behind for name in one.waiting]
    return Standing(
        longest=longest.longest,
        longest_stage=longest.longest_stage,
        begun=behind[0].begun,
        between=behind[0].between,
        stage=behind[0].stage,
        latest=min(one.latest for one in behind),
        num_working=sum(one.num_working for one in behind),
        working=tuple(working[:MOST_NAMED]),
        num_waiting=sum(one.num_waiting for one in behind),
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
    count, culprits = standing.num_working, standing.working
    if not count:
        count, culprits = standing.num_waiting, standing.waiting
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
