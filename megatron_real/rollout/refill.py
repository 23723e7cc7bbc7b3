"""Dynamic sampling: groups that teach nothing are replaced by groups of fresh prompts.

This is DAPO's (arXiv:2503.14476, section 3.2). A group whose labels are all equal has no loss. The
group of the next prompt in order takes its place, for a limited number of rounds. Every rank sees
the same rollouts and the same order of prompts, so all ranks decide alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

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
        useless = _teaching_nothing(rollouts, objective)
        if not useless:
            break
        fresh = draw(len(useless), number)
        rollouts = _replaced(rollouts, useless, fresh)
    return rollouts


def _teaching_nothing(rollouts: Sequence[Rollout], objective: Objective) -> list[int]:
    """Returns the groups none of whose rollouts has a gradient of the objective itself.

    Gradients of the KL and entropy terms do not count.
    """
    learns = objective.facts(RolloutTable.of(rollouts)).learns_R.tolist()
    teaching = {r.group for r, learning in zip(rollouts, learns, strict=True) if learning}
    groups = dict.fromkeys(r.group for r in rollouts)
    return [group for group in groups if group not in teaching]


def _replaced(
    rollouts: Sequence[Rollout], groups: Sequence[int], fresh: Sequence[Rollout]
) -> list[Rollout]:
    """Returns the rollouts with fresh group i in the place of groups[i]."""
    refills = {r.group: r.refills + 1 for r in rollouts}
    kept = [r for r in rollouts if r.group not in set(groups)]

    new = []
    for rollout in fresh:
        group = groups[rollout.group]
        new.append(dataclasses.replace(rollout, group=group, refills=refills[group]))
    return sorted(kept + new, key=lambda r: (r.group, r.sample))
