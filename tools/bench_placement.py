"""Placement of groups: what `auto` chooses against the fastest fixed placement, on batches unlike each other.

    torchrun --nproc-per-node 2 tools/bench_placement.py

Data parallelism of 2 over a small Qwen2 on megatron-core. For each batch, every placement's gradient (a later
minibatch: scores are needed; the optimizer, alike for all, is left out) is timed, the fastest of several rounds, each
of which times all placements in turn. The time under `auto` is that of the plan it chose, which is one of these.

    uniform         many short groups of equal length
    long tail       every group has one response many times as long as the others
    big groups      two groups, each larger than a micro-batch: `intact` has no plan

To reach: `auto` within 5 % of the best. The estimates behind the choice are given for comparison, as ratios to the best
estimate.

Where neighbours share the cores, add --cpu-time. Each rank's processor time (of one thread) is taken between the points
where ranks wait for each other: the scores' reductions and the end. The sum of the slowest rank's time over these
intervals is what an undisturbed machine would take, communication aside.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from bench_machine import add_options, apply_options, show
from bench_policy import new_policy, rollouts, set_placement

from megatron_real.batching import minibatches
from megatron_real.config import BatchConfig, Config, DataConfig, ModelConfig, RolloutConfig
from megatron_real.policy.policy import Policy
from megatron_real.policy.train_step import Batch

PLACEMENTS = ("split", "dp", "intact")
MAX_TOKENS = 1536
PROMPT_TOKENS = 32


def batches() -> dict[str, list[list[int]]]:
    """Response lengths by group, by the name of the batch."""
    draw = random.Random(0)
    return {
        "uniform": [[draw.randint(40, 56) for _ in range(4)] for _ in range(24)],
        "long tail": [[draw.randint(24, 64) for _ in range(5)] + [draw.randint(600, 1200)] for _ in range(5)],
        "big groups": [[draw.randint(100, 260) for _ in range(12)] for _ in range(2)],
    }


@contextmanager
def waits(marks: list[float]) -> Iterator[None]:
    """Notes this process's processor time at every all-reduce over data-parallel scores."""
    real = dist.all_reduce

    def noting(*args: object, **kwargs: object) -> object:
        marks.append(time.process_time())
        result = real(*args, **kwargs)
        marks[-1] = time.process_time() - (time.process_time() - marks[-1])
        return result

    dist.all_reduce = noting
    try:
        yield
    finally:
        dist.all_reduce = real


if __name__ == "__main__":
    pass
