"""The printed formulas of all objectives, written over lists of sequences, and nothing of ours.

Each takes the sequences of a minibatch one by one and is differentiated directly, by autograd
through the whole model.

    s.logprob, s.old, s.reference    [n] log-probs of a sequence's response tokens
    s.reward, s.label, s.group       its reward and label by the verifier, and its group
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TAU = 0.5


@dataclass
class Sequence:
    """One labelled rollout."""

    logprob: Tensor
    old: Tensor
    reference: Tensor
    entropy: Tensor
    label: int
    group: int

    @property
    def reward(self) -> float:
        return float(self.label)

    @property
    def n(self) -> int:
        return len(self.logprob)

    @property
    def score(self) -> Tensor:
        return (self.logprob - self.old).mean()


Group = list[Sequence]


def groups_of(sequences: list[Sequence]) -> list[Group]:
    groups: dict[int, Group] = defaultdict(list)
    for s in sequences:
        groups[s.group].append(s)
    return list(groups.values())


def positives(group: Group) -> Group:
    return [s for s in group if s.label == 1]


def negatives(group: Group) -> Group:
    return [s for s in group if s.label == 0]


def advantages(group: Group, *, scaled: bool = True) -> list[float]:
    """Rewards less their mean; `scaled`: in units of their standard deviation (n - 1)."""
    rewards = [s.reward for s in group]
    mean = sum(rewards) / len(rewards)
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    scale = 1.0
    if scaled:
        scale = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / scale for r in rewards]


def ppo(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * advantage, torch.clamp(ratio, 1 - low, 1 + high) * advantage)


def mean_over_groups(per_group: Callable[[Group], Any], sequences: list[Sequence]) -> Any:
    groups = groups_of(sequences)
    return sum(per_group(group) for group in groups) / len(groups)


def real(sequences: list[Sequence], variant: str) -> Any:
    """Eq. 8, 2 and 11; groups of one class have no loss but count."""

    def loss(group: Group) -> Any:
        if not positives(group) or not negatives(group):
            return 0.0
        right = torch.stack([torch.exp(-s.score / TAU) for s in positives(group)]).sum()
        wrong = torch.stack([torch.exp(s.score / TAU) for s in negatives(group)]).sum()
        if variant == "anchored":
            return torch.log(1 + right) + torch.log(1 + wrong)
        if variant == "vanilla":
            return torch.log(1 + right * wrong)
        of_positives = sum(torch.log(torch.sigmoid(s.score / TAU)) for s in positives(group))
        of_negatives = sum(torch.log(1 - torch.sigmoid(s.score / TAU)) for s in negatives(group))
        return -of_positives - of_negatives

    return mean_over_groups(loss, sequences)


def bce_mean(sequences: list[Sequence]) -> Any:
    """The authors' mean over the sequences that train."""
    mixed = [g for g in groups_of(sequences) if positives(g) and negatives(g)]
    training = [s for group in mixed for s in group]
    terms = [torch.log(torch.sigmoid((2 * s.label - 1) * s.score / TAU)) for s in training]
    return -sum(terms) / len(terms)


def grpo(sequences: list[Sequence], low: float = 0.2, high: float = 0.2) -> Any:
    def loss(group: Group) -> Any:
        terms = [
            ppo(torch.exp(s.logprob - s.old), a, low, high).mean()
            for s, a in zip(group, advantages(group), strict=True)
        ]
        return sum(terms) / len(group)

    return mean_over_groups(loss, sequences)


def dr_grpo(sequences: list[Sequence], budget: float) -> Any:
    def loss(group: Group) -> Any:
        terms = [
            ppo(torch.exp(s.logprob - s.old), a, 0.2, 0.2).sum() / budget
            for s, a in zip(group, advantages(group, scaled=False), strict=True)
        ]
        return sum(terms) / len(group)

    return mean_over_groups(loss, sequences)


def dapo(sequences: list[Sequence], *, per_group: bool = False) -> Any:
    def summed(group: Group) -> Any:
        return sum(
            ppo(torch.exp(s.logprob - s.old), a, 0.2, 0.28).sum()
            for s, a in zip(group, advantages(group), strict=True)
        )

    if per_group:
        return mean_over_groups(lambda g: summed(g) / sum(s.n for s in g), sequences)
    return sum(summed(g) for g in groups_of(sequences)) / sum(s.n for s in sequences)


def gspo(sequences: list[Sequence], low: float, high: float) -> Any:
    def loss(group: Group) -> Any:
        terms = [
            ppo(torch.exp(s.score), a, low, high)
            for s, a in zip(group, advantages(group), strict=True)
        ]
        return sum(terms) / len(group)

    return mean_over_groups(loss, sequences)


def cispo(sequences: list[Sequence], low: float, high: float) -> Any:
    total = torch.zeros((), dtype=torch.float64)
    for group in groups_of(sequences):
        for s, a in zip(group, advantages(group), strict=True):
            weight = torch.clamp(torch.exp(s.logprob - s.old), low, high).detach()
            total = total - (weight * a * s.logprob).sum()
    return total / sum(s.n for s in sequences)


def sapo(sequences: list[Sequence]) -> Any:
    def loss(group: Group) -> Any:
        terms = []
        for s, a in zip(group, advantages(group), strict=True):
            tau = 1.05
            if a > 0:
                tau = 1.0
            gate = torch.sigmoid(tau * (torch.exp(s.logprob - s.old) - 1)) * 4 / tau
            terms.append(-(gate * a).mean())
        return sum(terms) / len(group)

    return mean_over_groups(loss, sequences)


def disco(sequences: list[Sequence], tau: float, beta: float, delta: float) -> Any:
    def gap(group: Group) -> Any:
        if not positives(group) or not negatives(group):
            return 0.0
        wrong = torch.stack([torch.exp(s.logprob.mean() / tau) for s in negatives(group)])
        right = torch.stack([s.logprob.mean() for s in positives(group)])
        return right.mean() - tau * torch.log(wrong.mean())

    divergence = torch.cat([s.old - s.logprob for s in sequences]).mean()
    penalty = beta / 2 * torch.clamp(divergence - delta, min=0) ** 2
    return penalty - mean_over_groups(gap, sequences)


def lpo(sequences: list[Sequence], *, reverse: bool = False) -> Any:
    def divergence(group: Group) -> Any:
        rewards = torch.tensor([s.reward for s in group], dtype=torch.float64)
        if rewards.max() == rewards.min():
            return 0.0
        target = torch.softmax(rewards / rewards.std(), 0)
        policy = torch.softmax(torch.stack([(s.logprob - s.old).sum() for s in group]), 0)
        if reverse:
            return (policy * (policy / target).log()).sum()
        return (target * (target / policy).log()).sum()

    return mean_over_groups(divergence, sequences)


def conspo(sequences: list[Sequence], margin: float) -> Any:
    def contrast(group: Group) -> Any:
        if not positives(group) or not negatives(group):
            return 0.0
        terms = []
        for right in positives(group):
            wrong = [
                torch.exp((s.logprob.mean() - right.logprob.mean() + margin) / TAU)
                for s in negatives(group)
            ]
            terms.append(torch.log(1 + torch.stack(wrong).sum()))
        return sum(terms) / len(terms)

    return mean_over_groups(contrast, sequences)


def kl(sequences: list[Sequence], estimator: str, *, to_reference: bool, per_token: bool) -> Any:
    """Averaged over tokens, rollouts of a group and groups; or over all tokens."""

    def estimate(s: Sequence) -> Tensor:
        other = s.old
        if to_reference:
            other = s.reference
        d = s.logprob - other
        return {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}[estimator]

    if per_token:
        return sum(estimate(s).sum() for s in sequences) / sum(s.n for s in sequences)
    return mean_over_groups(lambda g: sum(estimate(s).mean() for s in g) / len(g), sequences)


def entropy(sequences: list[Sequence]) -> Any:
    return mean_over_groups(lambda g: sum(s.entropy.mean() for s in g) / len(g), sequences)


@dataclass(frozen=True)
class Case:
    """One row of the matrix: an objective with settings, and the formula that it must equal."""

    name: str
    settings: Mapping[str, Any]
    formula: Callable[[list[Sequence]], Any]
    kl: Mapping[str, Any] | None = None


CASES = {
    "real": Case("real", {}, lambda s: real(s, "anchored")),
    "vanilla": Case("real", {"variant": "vanilla"}, lambda s: real(s, "vanilla")),
    "bce": Case("real", {"variant": "bce"}, lambda s: real(s, "bce")),
    "bce-mean": Case("real", {"variant": "bce", "bce_reduction": "mean"}, bce_mean),
    "real-kl-old": Case(
        "real",
        {},
        lambda s: real(s, "anchored") + 0.3 * kl(s, "k2", to_reference=False, per_token=False),
        {"to": "old", "estimator": "k2", "coefficient": 0.3},
    ),
    "real-entropy": Case(
        "real",
        {"entropy_bonus": 0.1},
        lambda s: real(s, "anchored") - 0.1 * entropy(s),
    ),
    "grpo": Case("grpo", {}, grpo),
    "grpo-kl-reference": Case(
        "grpo",
        {},
        lambda s: grpo(s) + 0.5 * kl(s, "k3", to_reference=True, per_token=False),
        {"to": "reference", "estimator": "k3", "coefficient": 0.5},
    ),
    "dr_grpo": Case("dr_grpo", {"max_tokens": 16.0}, lambda s: dr_grpo(s, 16.0)),
    "dapo": Case("dapo", {}, dapo),
    "dapo-group": Case("dapo", {"token_mean": "group"}, lambda s: dapo(s, per_group=True)),
    "dapo-kl-k1": Case(
        "dapo",
        {},
        lambda s: dapo(s) + 0.2 * kl(s, "k1", to_reference=True, per_token=True),
        {"to": "reference", "estimator": "k1", "coefficient": 0.2},
    ),
    "gspo": Case("gspo", {"clip_low": 0.02, "clip_high": 0.03}, lambda s: gspo(s, 0.02, 0.03)),
    "cispo": Case("cispo", {"clip_high": 0.1}, lambda s: cispo(s, 0.0, 1.1)),
    "cispo-two-sided": Case(
        "cispo",
        {"bounds": "two_sided", "clip_low": 0.1, "clip_high": 0.1},
        lambda s: cispo(s, 0.9, 1.1),
    ),
    "sapo": Case("sapo", {}, sapo),
    "disco": Case(
        "disco",
        {"tau": 2.0, "beta": 10.0, "delta": 1e-4},
        lambda s: disco(s, 2.0, 10.0, 1e-4),
    ),
    "lpo": Case("lpo", {}, lpo),
    "lpo-reverse": Case("lpo", {"divergence": "reverse"}, lambda s: lpo(s, reverse=True)),
    "conspo": Case("conspo", {"margin": 0.1}, lambda s: conspo(s, 0.1)),
}
"""Name -> case. Every objective of the registry has one; the settings make clips
bite on both sides.
"""
