"""Dynamic sampling: groups that teach nothing are replaced by groups of fresh prompts.

This is DAPO's (arXiv:2503.14476, section 3.2). A group whose labels are all equal has no loss. The
group of the next prompt in order takes its place, for a limited number of rounds. Every rank sees
the same rollouts and the same order of prompts, so all ranks decide alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from megatron_real.objective import Objective
from megatron_real.objective.facts import RolloutTable
from megatron_real.records import Rollout


def refill(
    rollouts: list[Rollout],
    objective: Objective,
    *,
    rounds: int,
    draw: Callable[[int, int], list[Rollout]],
) -> list[Rollout]:
    """Returns the rollouts with the groups replaced that teach nothing, within `rounds` rounds.

    Args:
        rollouts: the labelled rollouts of a whole step.
        objective: says which rollouts learn; for REAL, those of groups with both labels.
        rounds: how often groups are replaced at most.
        draw: takes a number of fresh prompts and the number of the round, from 1, and returns
            labelled rollouts of that many prompts.
    """
    for number in range(1, rounds + 1):
        # A group teaches if the objective itself gives one of its rollouts a gradient; the KL and
        # entropy terms, which are the same for right and wrong, do not count.
        learns = objective.facts(RolloutTable.of(rollouts)).learns_R.tolist()
        teaching = {r.group for r, learning in zip(rollouts, learns, strict=True) if learning}
        # Without repeats, in the order of the rollouts: the same on every rank.
        groups = dict.fromkeys(r.group for r in rollouts)
        useless = [group for group in groups if group not in teaching]

        if not useless:
            break

        # Fresh group i takes the place, and so the number, of the i-th useless one.
        fresh = draw(len(useless), number)
        refills = {r.group: r.refills + 1 for r in rollouts}
        kept = [r for r in rollouts if r.group in teaching]
        for rollout in fresh:
            group = useless[rollout.group]
            kept.append(dataclasses.replace(rollout, group=group, refills=refills[group]))

        rollouts = sorted(kept, key=lambda r: (r.group, r.sample))
    return rollouts
