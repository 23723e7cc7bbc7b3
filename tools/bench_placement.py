"""Placement of groups: what `auto` chooses against the fastest fixed placement,
on batches unlike each other.

    torchrun --nproc-per-node 2 tools/bench_placement.py

Data parallelism of 2 over a small Qwen2 on megatron-core. For each batch, every placement's
gradient (a later minibatch: scores are needed; the optimizer, alike for all, is left out) is timed,
the fastest of several rounds, each of which times all placements in turn. The time under `auto` is
that of the plan it chose, which is one of these.

    uniform         many short groups of equal length
    long tail       every group has one response many times as long as the others
    big groups      two groups, each larger than a micro-batch: `intact` has no plan

To reach: `auto` within 5 % of the best. The estimates behind the choice are given for comparison,
as ratios to the best estimate.

Where neighbours share the cores, add --cpu-time. Each rank's processor time (of one thread) is
taken between the points where ranks wait for each other, the all-reduces; the slowest rank's time,
summed over these intervals, is what an undisturbed machine would take, communication aside.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from bench_machine import add_options, apply_options, show
from bench_policy import new_policy, rollouts

from megatron_real.batching import Minibatch, minibatches
from megatron_real.config import BatchConfig, Config, DataConfig, ModelConfig, RolloutConfig
from megatron_real.policy.policy import Policy
from megatron_real.policy.train_step import Batch

PLACEMENTS = ("split", "dp", "intact")


def lengths_of_batches() -> dict[str, list[list[int]]]:
    """Response lengths by group, by the name of the batch."""
    draw = random.Random(0)
    return {
        "uniform": [[draw.randint(40, 56) for _ in range(4)] for _ in range(24)],
        "long tail": [
            [draw.randint(24, 64) for _ in range(5)] + [draw.randint(600, 1200)] for _ in range(5)
        ],
        "big groups": [[draw.randint(100, 260) for _ in range(12)] for _ in range(2)],
    }


def wall_time(run: Callable[[], Any]) -> float:
    # From barrier to barrier: the seconds of the slowest rank, on every rank.
    dist.barrier()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()  # nothing to wait for on a CPU (megatron_real.parallel.cpu)
    dist.barrier()
    return time.perf_counter() - start


def processor_time(run: Callable[[], Any]) -> float:
    """The slowest rank's processor time between all-reduces, summed over these intervals."""
    all_reduce = dist.all_reduce
    marks = [time.process_time()]

    def noted(*args: Any, **kwargs: Any) -> Any:
        # Ranks wait for each other here, so that the slowest one's time up to it counts.
        marks.append(time.process_time())
        return all_reduce(*args, **kwargs)

    dist.all_reduce = noted
    run()
    dist.all_reduce = all_reduce
    intervals = torch.tensor([*marks, time.process_time()], dtype=torch.float64).diff()
    dist.all_reduce(intervals, op=dist.ReduceOp.MAX)
    return float(intervals.sum())


def planned(policy: Policy, minibatch: Minibatch, placement: Any) -> Batch | None:
    """The batch as a later minibatch, its old log-probs not yet computed;
    None where a group does not fit.
    """
    try:
        return policy.packer.with_placement(placement).pack(minibatch, off_policy=True)
    except ValueError:  # `intact` has no plan for a group larger than a micro-batch
        return None


def measure(policy: Policy, minibatch: Minibatch, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the gradient by placement, the fastest of the rounds after one that warms up."""
    clock = wall_time
    if options.cpu_time:
        clock = processor_time
    # All placements in turn within a round: a disturbance then meets each of them alike.
    seconds: dict[str, list[float]] = {}
    for _ in range(1 + options.rounds):
        for placement in PLACEMENTS:
            batch = planned(policy, minibatch, placement)
            if batch is not None:
                policy.step.old_logprobs(batch)
                run = partial(policy.gradient, batch)
                seconds.setdefault(placement, []).append(clock(run))
    return {placement: min(values[1:]) for placement, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--max-tokens", type=int, default=1536, help="token budget of a micro-batch"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    add_options(parser, rounds=4)
    options = parser.parse_args()
    apply_options(options)
    config = Config(
        model=ModelConfig(dtype=options.dtype),
        data=DataConfig(max_prompt_tokens=32),
        rollout=RolloutConfig(max_response_tokens=options.max_tokens - 32),
        batch=BatchConfig(max_tokens=options.max_tokens),
    )
    policy = new_policy(config)
    rows = []
    for name, lengths in lengths_of_batches().items():
        (minibatch,) = minibatches(
            rollouts(lengths, prompt_tokens=config.data.max_prompt_tokens),
            policy.settings.objective,
            groups_per_minibatch=len(lengths),
        )
        seconds = measure(policy, minibatch, options)
        rows.append({"batch": name, **_row(policy, minibatch, seconds)})
    if dist.get_rank() == 0:
        size = f"{options.dtype}, DP {dist.get_world_size()}"
        show(f"Placement: seconds of a later minibatch's gradient, {size}", rows, options)


def _row(policy: Policy, minibatch: Minibatch, seconds: dict[str, float]) -> dict[str, float | str]:
    plans = {}
    for placement in ("auto", *seconds):
        batch = planned(policy, minibatch, placement)
        assert batch is not None, "what was measured had a plan"
        plans[placement] = batch.plan

    choice = plans["auto"].placement
    estimate = plans["auto"].seconds
    best = min(seconds.values())
    return {
        **{placement: seconds.get(placement, "no plan") for placement in PLACEMENTS},
        "auto": seconds[choice],
        "choice": choice,
        "x best": seconds[choice] / best,
        "measured x best": "\n".join(f"{p} {seconds[p] / best:.2f}" for p in seconds),
        "estimated x best": "\n".join(f"{p} {plans[p].seconds / estimate:.2f}" for p in seconds),
        "micro-batches": "\n".join(f"{p} {len(plans[p].micro_batches[0])}" for p in seconds),
    }


if __name__ == "__main__":
    main()
