"""Dynamic sampling: groups that teach nothing are drawn again with fresh prompts (DAPO, arXiv:2503.14476, section 3.2).

A group whose labels are all equal has no loss. In place of it, up to a number of rounds, stands the group of the next
prompt in order. Every rank sees the same rollouts and the same order of prompts, so all of them decide alike.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence

from megatron_real.records import EXCLUDED, Rollout


def refill(rollouts: list[Rollout], *, rounds: int, draw: Callable[[int, int], list[Rollout]]) -> list[Rollout]:
    """`rollouts` with groups of one class (or of no label at all) replaced, as far as `rounds` rounds go.

    Args:
        draw: labelled rollouts of so many fresh prompts, and the round (from 1) that they are for.
    """
    for number in range(1, rounds + 1):
        useless = _one_class(rollouts)
        if not useless:
            break
        rollouts = _replaced(rollouts, useless, draw(len(useless), number))
    return rollouts


def _one_class(rollouts: Sequence[Rollout]) -> list[int]:
    labels: dict[int, set[int]] = defaultdict(set)
    for r in rollouts:
        labels[r.group] |= {r.label} - {EXCLUDED}
    return [group for group, found in labels.items() if len(found) < 2]


def _replaced(rollouts: Sequence[Rollout], groups: Sequence[int], fresh: Sequence[Rollout]) -> list[Rollout]:
    """Fresh group i takes the place of groups[i]."""
    refills = {r.group: r.refills + 1 for r in rollouts}
    kept = [r for r in rollouts if r.group not in set(groups)]
    new = [dataclasses.replace(r, group=groups[r.group], refills=refills[groups[r.group]]) for r in fresh]
    return sorted(kept + new, key=lambda r: (r.group, r.sample))
