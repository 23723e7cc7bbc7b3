"""Dynamic sampling: groups that teach nothing are drawn again with fresh prompts (DAPO, arXiv:2503.14476, section 3.2).

A group whose labels are all equal has no loss. In place of it, up to a number of rounds, stands the group of the next
prompt in order. Every rank sees the same rollouts and the same order of prompts, so all of them decide alike.
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
    """`rollouts` with the groups that teach nothing replaced, as far as `rounds` rounds go.

    Args:
        rollouts: labelled, of a whole step.
        objective: it says which rollouts learn; for REAL, those of groups with both labels.
        rounds: how often groups are replaced at the most.
        draw: labelled rollouts of so many fresh prompts, and the round (from 1) that they are for.
    """
    for number in range(1, rounds + 1):
        useless = _teaching_nothing(rollouts, objective)
        if not useless:
            break
        rollouts = _replaced(rollouts, useless, draw(len(useless), number))
    return rollouts


def _teaching_nothing(rollouts: Sequence[Rollout], objective: Objective) -> list[int]:
    """Returns the groups none of whose rollouts has a gradient of the objective itself, KL and entropy aside."""
    learns = objective.facts(RolloutTable.of(rollouts)).learns_R.tolist()
    teaching = {r.group for r, learning in zip(rollouts, learns, strict=True) if learning}
    groups = dict.fromkeys(r.group for r in rollouts)
    return [group for group in groups if group not in teaching]


def _replaced(
    rollouts: Sequence[Rollout], groups: Sequence[int], fresh: Sequence[Rollout]
) -> list[Rollout]:
    """Fresh group i takes the place of groups[i]."""
    refills = {r.group: r.refills + 1 for r in rollouts}
    kept = [r for r in rollouts if r.group not in set(groups)]
    new = [
        dataclasses.replace(r, group=groups[r.group], refills=refills[groups[r.group]])
        for r in fresh
    ]
    return sorted(kept + new, key=lambda r: (r.group, r.sample))
