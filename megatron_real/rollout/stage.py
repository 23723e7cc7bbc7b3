"""The rollout stage: prompts spread over ranks, completions sampled and labelled there, rollouts known everywhere."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from megatron_real.records import EXCLUDED, Completion, Prompt, Rollout, Sampling, Verdict
from megatron_real.rollout.engine import Engine
from megatron_real.rollout.spread import ExpectedLengths, prompt_seed, spread

Labeller = Callable[[Sequence[tuple[Prompt, Completion]]], list[Verdict]]
"""Verdicts on completions, in order."""


class RolloutStage:
    """Prompts -> labelled rollouts, the same list on every rank.

    Every rank samples, whatever its place in the training layout: `engine.tp` neighbouring ranks are one engine with a
    whole copy of the model, so no rank idles while others generate.
    """

    def __init__(self, engine: Engine, labeller: Labeller, *, rank: int, world: int) -> None:
        self.engine, self.labeller, self.world = engine, labeller, world
        self.index, self.member = divmod(rank, engine.tp)
        self.lengths = ExpectedLengths()

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int
    ) -> list[tuple[int, list[Completion]]]:
        """This rank's engine's share: (index of the prompt, its completions)."""
        costs = self.lengths.costs(prompts, sampling.num_samples)
        mine = spread(costs, self.world // self.engine.tp)[self.index]
        seeds = [prompt_seed(seed, i, prompts[i]) for i in mine]
        return list(zip(mine, self.engine.generate([prompts[i] for i in mine], sampling, seeds=seeds), strict=True))

    def label(self, prompts: Sequence[Prompt], sampled: Sequence[tuple[int, list[Completion]]]) -> list[Rollout]:
        """Verifies the engine's share on all its ranks and gathers every engine's. Collective over all ranks."""
        share = [(i, k, c) for i, completions in sampled for k, c in enumerate(completions)]
        keys = share[self.member :: self.engine.tp]
        verdicts = self.labeller([(prompts[i], c) for i, _, c in keys])
        mine = [(i, k, c, v) for (i, k, c), v in zip(keys, verdicts, strict=True)]
        shares: list[Any] = [None] * self.world
        dist.all_gather_object(shares, mine)
        everything = sorted((row for share in shares for row in share), key=lambda row: row[:2])
        rollouts = [Rollout(prompts[i], group=i, sample=k, completion=c, verdict=v) for i, k, c, v in everything]
        self.lengths.learn(rollouts)
        return rollouts


def permuted_labels(rollouts: Sequence[Rollout], *, seed: int) -> list[Rollout]:
    """The control experiment: the same verdicts, dealt to other rollouts, so that there is nothing to learn."""
    verdicts = [r.verdict for r in rollouts]
    random.Random(seed).shuffle(verdicts)
    return [dataclasses.replace(r, verdict=v) for r, v in zip(rollouts, verdicts, strict=True)]


def without_mismatch(rollouts: Sequence[Rollout], mismatch: Sequence[float], *, bound: float) -> list[Rollout]:
    """Excludes the rollouts whose mean |log-prob difference| of trainer and engine (nats) is beyond the bound."""
    return [
        dataclasses.replace(r, verdict=dataclasses.replace(r.verdict, status="mismatch", label=EXCLUDED))
        if r.label != EXCLUDED and not m <= bound
        else r
        for r, m in zip(rollouts, mismatch, strict=True)
    ]
