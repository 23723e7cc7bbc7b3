"""The rollout stage: prompts spread over ranks, completions sampled and labelled there, rollouts known everywhere."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_real.records import Completion, Prompt, Rollout, Sampling, Verdict
from megatron_real.rollout.engine import Engine

Labeller = Callable[[Sequence[tuple[Prompt, Completion]]], list[Verdict]]
"""Verdicts on completions, in order."""


class RolloutStage:
    """Prompts -> labelled rollouts, the same list on every rank.

    Every rank samples for its share of the prompts, whatever its place in the training layout: the engines are whole
    copies of the model, so no rank idles while others generate.
    """

    def __init__(self, engine: Engine, labeller: Labeller, *, rank: int, world: int) -> None:
        self.engine, self.labeller, self.rank, self.world = engine, labeller, rank, world

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int
    ) -> list[tuple[int, list[Completion]]]:
        """This rank's share: (index of the prompt, its completions)."""
        mine = range(self.rank, len(prompts), self.world)
        completions = self.engine.generate([prompts[i] for i in mine], sampling, seed=seed * self.world + self.rank)
        return list(zip(mine, completions, strict=True))

    def label(self, prompts: Sequence[Prompt], sampled: Sequence[tuple[int, list[Completion]]]) -> list[Rollout]:
        """Verifies this rank's share and gathers every rank's. Collective over all ranks."""
        keys = [(i, k, c) for i, completions in sampled for k, c in enumerate(completions)]
        verdicts = self.labeller([(prompts[i], c) for i, _, c in keys])
        mine = [(i, k, c, v) for (i, k, c), v in zip(keys, verdicts, strict=True)]
        shares: list[Any] = [None] * self.world
        dist.all_gather_object(shares, mine)
        everything = sorted((row for share in shares for row in share), key=lambda row: row[:2])
        return [Rollout(prompts[i], group=i, sample=k, completion=c, verdict=v) for i, k, c, v in everything]


def permuted_labels(rollouts: Sequence[Rollout], *, seed: int) -> list[Rollout]:
    """The control experiment: the same verdicts, dealt to other rollouts, so that there is nothing to learn."""
    verdicts = [r.verdict for r in rollouts]
    random.Random(seed).shuffle(verdicts)
    return [dataclasses.replace(r, verdict=v) for r, v in zip(rollouts, verdicts, strict=True)]
