"""What an objective knows of a minibatch before any forward pass.

That is labels, rewards and lengths, and what follows from them.

    rollouts --table--> RolloutTable --Objective.facts--> Facts --batching--> packed micro-batches

Denominators are fixed here, over the whole minibatch, whatever the packing and the data-parallel
layout make of it. Everything is computed in float64 on the CPU, from the same rollouts on every
rank, so all ranks agree to the bit.

Legend: R rollouts of a minibatch, G groups.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_real.records import EXCLUDED, NEGATIVE, POSITIVE, Rollout


@dataclass(frozen=True)
class RolloutTable:
    """The rollouts of one minibatch as an objective may see them: whole groups, in order."""

    label_R: Tensor
    """[R] int64: 1 verified correct, 0 verified wrong, -1 excluded. An empty response is
    excluded."""
    group_R: Tensor
    """[R] int64: equal values form a group."""
    reward_R: Tensor
    """[R] float64: the verifier's reward; the label where no verifier gave one. Meaningless where
    excluded."""
    num_tokens_R: Tensor
    """[R] int64 trained response tokens, n_k."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> RolloutTable:
        """Reads the table from labelled rollouts."""
        labels: list[int] = []
        rewards: list[float] = []
        lengths: list[int] = []
        for rollout in rollouts:
            length = rollout.completion.num_trained
            lengths.append(length)
            # An empty response has no log-prob: it is excluded whatever its label.
            labels.append(int(rollout.label) if length > 0 else EXCLUDED)

            reward = rollout.verdict.reward
            if reward is None:
                # Labels are rewards of 1 and 0; the -1 of an excluded rollout is never read.
                reward = float(rollout.label)
            rewards.append(float(reward))

        return cls(
            label_R=torch.tensor(labels, dtype=torch.int64),
            group_R=torch.tensor([rollout.group for rollout in rollouts], dtype=torch.int64),
            reward_R=torch.tensor(rewards, dtype=torch.float64),
            num_tokens_R=torch.tensor(lengths, dtype=torch.int64),
        )

    def __post_init__(self) -> None:
        # Checked here and not by each objective: a table of the wrong shape would broadcast
        # silently.
        shapes = {tuple(t.shape) for t in vars(self).values()}
        if len(shapes) != 1 or self.label_R.dim() != 1:
            raise ValueError(
                "label, group, reward and num_tokens must all be [R], got "
                f"{[list(t.shape) for t in vars(self).values()]}."
            )

        if self.group_R.is_floating_point():
            raise ValueError(f"group must hold integers, got {self.group_R.dtype}.")

        known_R = (
            (self.label_R == POSITIVE) | (self.label_R == NEGATIVE) | (self.label_R == EXCLUDED)
        )
        if not bool(known_R.all()):
            k = int((~known_R).nonzero()[0])
            raise ValueError(
                "label must hold 1 (correct), 0 (wrong) or -1 (excluded), got "
                f"{self.label_R[k].item()} at index {k}."
            )

    @property
    def labelled_R(self) -> Tensor:
        """[R] bool: whether a rollout was verified, right or wrong, and has at least one token.

        The others are in no mean and no count.
        """
        return (self.label_R != EXCLUDED) & (self.num_tokens_R > 0)


@dataclass(frozen=True)
class Facts:
    """What follows from a minibatch's table under one objective."""

    label_R: Tensor
    """[R] int64; -1 for every rollout whose gradient is 0 whatever its log-probs."""
    group_R: Tensor
    """[R] int64 group of each rollout."""
    num_tokens_R: Tensor
    """[R] response tokens, in the floating dtype of the others."""
    learns_R: Tensor
    """[R] bool: the objective itself, without KL and entropy, may give it a gradient."""
    trains_R: Tensor
    """[R] bool: it has a gradient at all. Only these are packed and computed."""
    advantage_R: Tensor
    """[R] factor of a rollout's terms in a policy-gradient loss, 0 where it does not learn.
    Objectives of labels alone leave it 0; LPO keeps its log target here."""
    token_weight_R: Tensor
    """[R] weight of each token of a rollout in the objective's mean over tokens; 0 where
    excluded."""
    denominator: float
    """What the sum over groups (or rollouts) of the score part is divided by; at least 1."""
    num_groups: int
    """Groups with a labelled rollout."""
    num_equal_groups: int = 0
    """Groups of two or more labelled rollouts with one and the same reward: their advantage is
    0."""

    def to(self, *, device: torch.device | int | str, dtype: torch.dtype) -> Facts:
        """Returns the same facts on a device, floating values in `dtype`."""

        def move(value: Tensor) -> Tensor:
            if value.is_floating_point():
                return value.to(device, dtype)
            return value.to(device)

        return self.map(move)

    def map(self, change: Callable[[Tensor], Tensor]) -> Facts:
        """Returns the facts with `change` applied to each of their tensors."""
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return dataclasses.replace(self, **changed)

    def of(self, present_R: Tensor) -> Facts:
        """Returns the facts with every rollout but the present ones excluded; denominators stay."""
        return dataclasses.replace(
            self,
            label_R=torch.where(present_R, self.label_R, EXCLUDED),
            learns_R=self.learns_R & present_R,
            advantage_R=torch.where(present_R, self.advantage_R, 0.0),
        )


def group_index(table: RolloutTable) -> tuple[Tensor, Tensor]:
    """Returns [R] int64 groups renumbered from 0, and [G] float64 labelled rollouts of each."""
    unique_G, index_R = torch.unique(table.group_R, return_inverse=True)
    # Groups of which nothing is labelled keep their number, with a count of 0.
    count_G = torch.zeros(len(unique_G), dtype=torch.float64)
    # On the CPU, where facts are computed, index_add adds in the order of the rollouts: the sums
    # are equal to the bit on all ranks.
    count_G = count_G.index_add(0, index_R, table.labelled_R.double())
    return index_R, count_G


def group_advantages(table: RolloutTable, reward_R: Tensor, *, scale: bool) -> tuple[Tensor, int]:
    """Returns rewards minus the mean of their group, divided by its standard deviation if asked.

    The mean and the standard deviation (of the sample: divisor n - 1) are over the labelled
    rollouts of a group. A group whose rewards are all equal has advantage 0 for all, never NaN.

    Args:
        table: of the minibatch.
        reward_R: [R] float64 rewards; anything where excluded, NaN included.
        scale: divide by the standard deviation (GRPO) or not (Dr. GRPO).

    Returns:
        [R] float64 advantages, 0 where excluded; and the number of groups of at least two with
        equal rewards.
    """
    index_R, count_G = group_index(table)
    # where, not multiplication: an excluded reward may be NaN.
    reward_R = torch.where(table.labelled_R, reward_R.double(), 0.0)
    mean_G = torch.zeros_like(count_G).index_add(0, index_R, reward_R) / count_G.clamp(min=1)
    centred_R = torch.where(table.labelled_R, reward_R - mean_G[index_R], 0.0)

    # Compared, not computed: the rounding of a mean would leave equal rewards a tiny deviation to
    # divide by.
    below_all_R = torch.where(table.labelled_R, reward_R, -math.inf)
    above_all_R = torch.where(table.labelled_R, reward_R, math.inf)
    high_G = torch.full_like(count_G, -math.inf).scatter_reduce(0, index_R, below_all_R, "amax")
    low_G = torch.full_like(count_G, math.inf).scatter_reduce(0, index_R, above_all_R, "amin")
    varied_G = high_G > low_G

    if scale:
        square_G = torch.zeros_like(count_G).index_add(0, index_R, centred_R.square())
        # A group of one has the divisor 0, and is not varied: whatever stands here is not used.
        deviation_G = (square_G / (count_G - 1).clamp(min=1)).sqrt()
        centred_R = centred_R / torch.where(varied_G, deviation_G, 1.0)[index_R]

    # Exactly 0, so that such rollouts are known not to learn and are never computed.
    advantage_R = torch.where(varied_G[index_R], centred_R, 0.0)
    equal_G = ~varied_G & (count_G >= 2)
    return advantage_R, int(equal_G.sum())


def mean_over_samples(table: RolloutTable) -> Tensor:
    """Returns [R] each token's weight in the mean over tokens, then rollouts, then groups.

    The weight is 1 / (groups * rollouts of the group * tokens of the rollout), over labelled
    rollouts.
    """
    index_R, count_G = group_index(table)
    num_groups = max(int((count_G > 0).sum()), 1)
    # Division by 0 where nothing is labelled gives inf, which is replaced below and never
    # multiplied.
    weight_R = 1.0 / (num_groups * count_G[index_R] * table.num_tokens_R)
    return torch.where(table.labelled_R, weight_R, 0.0)


def mean_over_tokens(table: RolloutTable) -> Tensor:
    """Returns [R] each token's weight in the mean over all labelled tokens of the minibatch."""
    total = (table.num_tokens_R * table.labelled_R).sum().clamp(min=1)
    return torch.where(table.labelled_R, 1.0 / total.double(), 0.0)


def mean_over_tokens_of_groups(table: RolloutTable) -> Tensor:
    """Returns [R] each token's weight in the mean over tokens of a group, then over groups."""
    index_R, count_G = group_index(table)
    tokens_G = torch.zeros_like(count_G)
    tokens_G = tokens_G.index_add(0, index_R, (table.num_tokens_R * table.labelled_R).double())
    num_groups = max(int((count_G > 0).sum()), 1)
    weight_R = 1.0 / (num_groups * tokens_G.clamp(min=1)[index_R])
    return torch.where(table.labelled_R, weight_R, 0.0)


def make_facts(
    table: RolloutTable,
    *,
    learns_R: Tensor,
    token_weight_R: Tensor,
    regularises: bool,
    advantage_R: Tensor | None = None,
    denominator: float = 1.0,
    num_equal_groups: int = 0,
) -> Facts:
    """Returns the facts of a minibatch, from what an objective has worked out of its table.

    Args:
        table: of the minibatch.
        learns_R: [R] bool: the objective may give the rollout a gradient. Excluded ones never
            learn.
        token_weight_R: [R] float64 weight of each token in the objective's mean over tokens.
        regularises: a KL penalty or an entropy bonus is on, so every labelled rollout trains.
        advantage_R: [R] float64; default: 0.
        denominator: of the score part of the loss; raised to 1 where it is less.
        num_equal_groups: groups whose rewards are all equal.
    """
    learns_R = learns_R & table.labelled_R
    _, count_G = group_index(table)
    if advantage_R is None:
        advantage_R = torch.zeros(len(table.label_R), dtype=torch.float64)

    # Labels of rollouts that do not learn are hidden, so that no objective can count them by
    # mistake.
    return Facts(
        label_R=torch.where(learns_R, table.label_R, EXCLUDED),
        group_R=table.group_R,
        num_tokens_R=table.num_tokens_R.double(),
        learns_R=learns_R,
        trains_R=table.labelled_R if regularises else learns_R,
        advantage_R=advantage_R,
        token_weight_R=token_weight_R,
        # At least 1: a minibatch of which no group counts has the loss 0, and not 0 / 0.
        denominator=max(denominator, 1.0),
        num_groups=int((count_G > 0).sum()),
        num_equal_groups=num_equal_groups,
    )
