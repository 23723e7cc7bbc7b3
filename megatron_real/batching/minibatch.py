"""Rollouts -> minibatches, with the denominators of the loss fixed before anything is packed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_real.objective import Objective
from megatron_real.objective.facts import Facts, RolloutTable
from megatron_real.records import Rollout


@dataclass(frozen=True)
class Minibatch:
    """The rollouts of one optimizer update.

    Example: 2 prompts x 4 rollouts, the second group wholly excluded -> at most 4 rollouts kept.
    """

    rollouts: tuple[Rollout, ...]
    """[R] every rollout of the minibatch's groups, in order; completions may be absent."""
    kept: tuple[int, ...]
    """Positions in `rollouts` that can have a gradient: only these are packed and computed."""
    facts: Facts
    """[R] what the objective knows of them all: who trains, advantages, denominators."""

    @property
    def num_groups(self) -> int:
        """Groups with a labelled rollout, whatever becomes of them."""
        return self.facts.num_groups

    @property
    def num_response_tokens(self) -> int:
        """Response tokens of all rollouts."""
        return sum(rollout.completion.num_tokens for rollout in self.rollouts)


def minibatches(
    rollouts: Sequence[Rollout], objective: Objective, *, groups_per_minibatch: int
) -> list[Minibatch]:
    """Cuts a step's rollouts into minibatches of `groups_per_minibatch` groups.

    Groups keep the order of their first rollout; the last minibatch takes what is left. The
    objective decides which rollouts train (objective/objective.py).
    """
    members: dict[int, list[Rollout]] = defaultdict(list)
    for rollout in rollouts:
        members[rollout.group].append(rollout)
    groups = list(members.values())

    cut = []
    for start in range(0, len(groups), groups_per_minibatch):
        # Whole groups, flat: the facts of a group need all of its rollouts, the excluded ones too.
        in_minibatch = []
        for group in groups[start : start + groups_per_minibatch]:
            in_minibatch.extend(group)

        facts = objective.facts(RolloutTable.of(in_minibatch))
        kept = facts.trains_R.nonzero().squeeze(1).tolist()
        cut.append(Minibatch(tuple(in_minibatch), tuple(kept), facts))
    return cut
