"""Rollouts -> minibatches, with the denominator of the loss fixed before anything is packed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_real.records import EXCLUDED, Rollout


@dataclass(frozen=True)
class Minibatch:
    """The rollouts of one optimizer update.

    Example: 2 prompts x 4 rollouts, the second group wholly excluded -> num_groups = 1 and at most 4 rollouts kept.
    """

    rollouts: tuple[Rollout, ...]
    """[R] every rollout of the minibatch's groups, in order."""
    kept: tuple[int, ...]
    """Positions in `rollouts` that can have a weight other than 0: only these are computed."""
    num_groups: int
    """N, the loss's denominator: groups with a labelled rollout, whatever becomes of them."""

    @property
    def num_response_tokens(self) -> int:
        """Response tokens of all rollouts."""
        return sum(len(rollout.completion.token_ids) for rollout in self.rollouts)


def minibatches(
    rollouts: Sequence[Rollout], *, groups_per_minibatch: int, one_class_groups: Literal["skip", "keep"]
) -> list[Minibatch]:
    """Cuts a step's rollouts into minibatches of `groups_per_minibatch` groups, in the order of first appearance."""
    members: dict[int, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        members[rollout.group].append(rollout)
    groups = list(members.values())
    return [
        _minibatch(groups[start : start + groups_per_minibatch], one_class_groups)
        for start in range(0, len(groups), groups_per_minibatch)
    ]


def _minibatch(groups: Sequence[list[Rollout]], one_class_groups: str) -> Minibatch:
    rollouts: list[Rollout] = []
    kept: list[int] = []
    num_groups = 0
    for group in groups:
        labels = {r.label for r in group if _counts(r)}
        num_groups += bool(labels)
        if len(labels) == 2 or (labels and one_class_groups == "keep"):
            kept += [len(rollouts) + i for i, rollout in enumerate(group) if _counts(rollout)]
        rollouts += group
    return Minibatch(tuple(rollouts), tuple(kept), num_groups)


def _counts(rollout: Rollout) -> bool:
    """An empty response cannot have a score: it is excluded whatever its label."""
    return rollout.label != EXCLUDED and len(rollout.completion.token_ids) > 0
