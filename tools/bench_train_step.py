"""The train step: REAL against supervised fine-tuning (SFT) by cross-entropy on the same packed batches.

    python tools/bench_train_step.py                                  # one process
    torchrun --nproc-per-node 2 tools/bench_train_step.py             # data parallel

A small Qwen2 (6 layers, hidden 384, vocabulary 32768) with random weights takes optimizer updates through the real
Policy on megatron-core. The SFT step is the same update, optimizer included, on the same micro-batches and
through the same log-prob path; only its loss is the mean of -log pi. Rollouts have random lengths and both labels in
every group, so that REAL has nothing to leave out.

    SFT             one update: the baseline of the minibatch rows
    first           first minibatch after a rollout: no old log-probs, no scoring pass
    later, split    a later minibatch, its old log-probs computed before: a scoring pass, then the update
    later, dp       the scores are gathered within the loss: one pass
    later, intact   the same, without communication
    SFT x 4         packing and four updates: the baseline of the rollout rows
    rollout, ...    Policy.prepare (packing, old log-probs of minibatches 2 to 4), then four updates, by placement

Times are the fastest of several rounds, each of which times all in turn. Where neighbours share the cores, add
--cpu-time: processor time of one thread (a single process only).

To reach: first at most 1.05 times SFT, later at most 1.45, rollout at most 1.6. By counted work (a forward pass 1, a
backward pass 2) they are 1, 1.33 for split and 1 for the others, and 1.5 for split and 1.25 for the others.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from bench_machine import add_options, apply_options, interleaved, show
from bench_policy import new_policy, rollouts, set_placement
from torch import Tensor

from megatron_real.batching import minibatches
from megatron_real.config import BatchConfig, Config, ModelConfig, RolloutConfig
from megatron_real.policy.microbatch import MicroBatch
from megatron_real.policy.policy import Policy
from megatron_real.policy.train_step import Batch, Gradient, TrainStep
from megatron_real.records import Rollout

NUM_MINIBATCHES = 4
PLACEMENTS = ("split", "dp", "intact")


class CrossEntropyStep(TrainStep):
    """SFT on the batch's responses in place of REAL: everything but the loss is the real step's."""

    def gradient(self, batch: Batch) -> Gradient:
        num_tokens = sum(len(rollout.completion.token_ids) for rollout in batch.minibatch.rollouts)

        def cross_entropy(micro: MicroBatch, logprob_T: Tensor) -> Tensor:
            return -logprob_T.sum() / num_tokens

        self._run(batch.micro_batches, cross_entropy, forward_only=False)
        return Gradient(0.0, torch.zeros(0), torch.zeros(0))


def paths(policy: Policy, made: list[Rollout]) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What is timed, by name: each prepares outside the clock and returns the timed part."""
    real, sft = (
        policy.step,
        CrossEntropyStep(policy.ddp, policy.groups, policy.config.objective, mismatch_bound=policy.step.mismatch_bound),
    )
    cut = minibatches(made, groups_per_minibatch=policy.config.batch.minibatch_prompts, one_class_groups="skip")

    def first(step: TrainStep) -> Callable[[], Any]:
        policy.step = step
        set_placement(policy, "split")
        batch = policy.pack(cut[0], needs_scores=False)
        return lambda: policy.update(batch)

    def later(placement: str) -> Callable[[], Any]:
        policy.step = real
        set_placement(policy, placement)
        batch = policy.pack(cut[0], needs_scores=True)
        real.old_logprobs(batch)
        return lambda: policy.update(batch)

    def all_sft() -> Callable[[], Any]:
        policy.step = sft
        set_placement(policy, "split")
        return lambda: [policy.update(policy.pack(minibatch, needs_scores=False)) for minibatch in cut]

    def rollout(placement: str) -> Callable[[], Any]:
        policy.step = real
        set_placement(policy, placement)
        return lambda: [policy.update(batch) for batch in policy.prepare(made)]

    return {
        "SFT": partial(first, sft),
        "first": partial(first, real),
        **{f"later, {placement}": partial(later, placement) for placement in PLACEMENTS},
        f"SFT x {NUM_MINIBATCHES}": all_sft,
        **{f"rollout, {placement}": partial(rollout, placement) for placement in PLACEMENTS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=8, help="groups of a minibatch")
    parser.add_argument("--group-size", type=int, default=4, help="rollouts of a group")
    parser.add_argument("--max-response", type=int, default=160, help="longest response; lengths are uniform up to it")
    parser.add_argument("--max-tokens", type=int, default=1024, help="token budget of a micro-batch")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    add_options(parser, rounds=4)
    options = parser.parse_args()
    apply_options(options)
    config = Config(
        model=ModelConfig(dtype=options.dtype),
        rollout=RolloutConfig(num_prompts=options.groups * NUM_MINIBATCHES, max_response_tokens=1),
        batch=BatchConfig(minibatch_prompts=options.groups, max_tokens=max(options.max_tokens, 1025)),
    )
    draw = random.Random(0)
    lengths = [
        [draw.randint(options.max_response // 8, options.max_response) for _ in range(options.group_size)]
        for _ in range(options.groups * NUM_MINIBATCHES)
    ]
    seconds = interleaved(paths(new_policy(config), rollouts(lengths, prompt_tokens=32)), options)
    four = f"SFT x {NUM_MINIBATCHES}"
    rows = [
        {
            "step": name,
            "seconds": value,
            "x SFT": value / seconds[four if name == four or name.startswith("rollout") else "SFT"],
        }
        for name, value in seconds.items()
    ]
    tokens = sum(map(sum, lengths)) // NUM_MINIBATCHES
    title = f"Train step: {options.dtype}, DP {dist.get_world_size()}, {options.groups} groups of {options.group_size}"
    if dist.get_rank() == 0:
        show(f"{title}, about {tokens} response tokens a minibatch", rows, options)


if __name__ == "__main__":
    main()
