"""The train step: REAL against supervised fine-tuning (SFT) by cross-entropy on
the same packed batches.

    python tools/bench_train_step.py                                  # one process
    torchrun --nproc-per-node 2 tools/bench_train_step.py             # data parallel

A small Qwen2 (6 layers, hidden 384, vocabulary 32768) with random weights takes optimizer updates
through the real Policy on megatron-core. The SFT step is the same update, optimizer included, on
the same micro-batches and through the same log-prob path; only its loss is the mean of -log pi.
Rollouts have random lengths and both labels in every group, so that REAL has nothing to leave out.

    SFT             one update: the baseline of the minibatch rows
    first           first minibatch after a rollout: no old log-probs, no scoring pass
    later, split    a later minibatch, its old log-probs computed before: a scoring pass, then the
                    update
    later, dp       the scores are gathered within the loss: one pass
    later, intact   the same, without communication
    SFT x 4         packing and four updates: the baseline of the rollout rows
    rollout, ...    packing, old log-probs of minibatches 2 to 4, then four updates, by placement
    NAME, first     another objective's first minibatch, and
    NAME, later     a later one: one pass where its reach is a token or a sequence, two where it is
                    more

Times are the fastest of several rounds, each of which times all in turn. Where neighbours share the
cores, add --cpu-time: processor time of one thread (a single process only).

To reach: first at most 1.05 times SFT, later at most 1.45, rollout at most 1.6. By counted work (a
forward pass 1, a backward pass 2) they are 1, 1.33 for split and 1 for the others, and 1.5 for
split and 1.25 for the others.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from bench_machine import add_options, apply_options, interleaved, show
from bench_policy import new_policy, rollouts

from megatron_real.batching import Minibatch, minibatches
from megatron_real.config import BatchConfig, Config, ModelConfig, RolloutConfig
from megatron_real.objective import Objective, make_objective
from megatron_real.objective.registry import OBJECTIVES
from megatron_real.policy.policy import Policy
from megatron_real.policy.train_step import Batch, TrainStep
from megatron_real.records import Rollout

NUM_MINIBATCHES = 4
PLACEMENTS = ("split", "dp", "intact")


class Trial:
    """One objective over the policy's model: what a loop would do with it, each part by itself."""

    def __init__(self, policy: Policy, objective: Objective, placement: Any = "split") -> None:
        self.policy = policy
        self.objective = objective
        self.step = TrainStep(
            policy.passes, policy.groups, objective, mismatch_bound=policy.settings.mismatch_bound
        )
        packer = dataclasses.replace(policy.packer, objective=objective)
        self.packer = packer.with_placement(placement)

    def cut(self, made: list[Rollout]) -> list[Minibatch]:
        """The step's minibatches under this objective."""
        size = self.policy.settings.batch.minibatch_prompts
        return minibatches(made, self.objective, groups_per_minibatch=size)

    def batch(self, minibatch: Minibatch, *, off_policy: bool) -> Batch:
        """The minibatch packed, with old log-probs where a loop would have computed them before."""
        batch = self.packer.pack(minibatch, off_policy=off_policy)
        # A first minibatch has none: its gradient's own forward pass gives them.
        if off_policy:
            self.step.old_logprobs(batch)
        return batch

    def update(self, batch: Batch) -> None:
        """Gradient and optimizer step."""
        self.policy.zero_gradients()
        loss = self.step.gradient(batch).loss
        self.policy.apply_gradients(finite=math.isfinite(loss))

    def rollout(self, made: list[Rollout]) -> None:
        """All of a step: packing, old log-probs, and its updates."""
        minibatches = self.cut(made)
        batches = [self.packer.pack(m, off_policy=i > 0) for i, m in enumerate(minibatches)]
        for batch in batches[1:]:
            self.step.old_logprobs(batch)
        for batch in batches:
            self.update(batch)


def sft_update(policy: Policy, batch: Batch) -> None:
    """Supervised fine-tuning on the batch's responses:
    everything but the loss is the real step's.
    """
    num_tokens = batch.minibatch.num_response_tokens
    policy.zero_gradients()
    policy.passes.forward_backward(
        batch.micro_batches, lambda _, outputs: -outputs.logprob_T.sum() / num_tokens
    )
    policy.apply_gradients(finite=True)


def paths(policy: Policy, made: list[Rollout]) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What is timed, by name: each prepares outside the clock and returns the timed part."""
    # Each preparation packs anew: a batch carries what the passes over it have computed.
    real = make_objective("real")

    def sft() -> Callable[[], Any]:
        trial = Trial(policy, real)
        batch = trial.batch(trial.cut(made)[0], off_policy=False)
        return lambda: sft_update(policy, batch)

    def sft_rollout() -> Callable[[], Any]:
        trial = Trial(policy, real)
        packed = [trial.batch(m, off_policy=False) for m in trial.cut(made)]

        def update_by_each() -> None:
            for batch in packed:
                sft_update(policy, batch)

        return update_by_each

    def first(objective: Objective) -> Callable[[], Any]:
        trial = Trial(policy, objective)
        batch = trial.batch(trial.cut(made)[0], off_policy=False)
        return lambda: trial.update(batch)

    def later(objective: Objective, placement: str) -> Callable[[], Any]:
        trial = Trial(policy, objective, placement)
        batch = trial.batch(trial.cut(made)[0], off_policy=True)
        return lambda: trial.update(batch)

    def rollout(placement: str) -> Callable[[], Any]:
        trial = Trial(policy, real, placement)
        return lambda: trial.rollout(made)

    others = [name for name in OBJECTIVES if name != "real"]
    return {
        "SFT": sft,
        "first": partial(first, real),
        **{f"later, {placement}": partial(later, real, placement) for placement in PLACEMENTS},
        f"SFT x {NUM_MINIBATCHES}": sft_rollout,
        **{f"rollout, {placement}": partial(rollout, placement) for placement in PLACEMENTS},
        **{f"{name}, first": partial(first, make_objective(name)) for name in others},
        **{f"{name}, later": partial(later, make_objective(name), "split") for name in others},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", type=int, default=8, help="groups of a minibatch")
    parser.add_argument("--group-size", type=int, default=4, help="rollouts of a group")
    parser.add_argument(
        "--max-response",
        type=int,
        default=160,
        help="longest response; lengths are uniform up to it",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=1024, help="token budget of a micro-batch"
    )
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
    add_options(parser, rounds=4)
    options = parser.parse_args()
    apply_options(options)
    config = Config(
        model=ModelConfig(dtype=options.dtype),
        rollout=RolloutConfig(num_prompts=options.groups * NUM_MINIBATCHES, max_response_tokens=1),
        batch=BatchConfig(
            minibatch_prompts=options.groups,
            # The configuration refuses less: a prompt of its default 1,024 tokens must fit.
            max_tokens=max(options.max_tokens, 1025),
        ),
    )
    draw = random.Random(0)
    lengths = [
        [
            draw.randint(options.max_response // 8, options.max_response)
            for _ in range(options.group_size)
        ]
        for _ in range(options.groups * NUM_MINIBATCHES)
    ]
    seconds = interleaved(paths(new_policy(config), rollouts(lengths, prompt_tokens=32)), options)
    # A whole step of rollouts has several minibatches: it is compared with as many updates of SFT.
    whole_step = f"SFT x {NUM_MINIBATCHES}"
    rows = []
    for name, value in seconds.items():
        baseline = "SFT"
        if name == whole_step or name.startswith("rollout"):
            baseline = whole_step
        rows.append({"step": name, "seconds": value, "x SFT": value / seconds[baseline]})
    tokens = sum(map(sum, lengths)) // NUM_MINIBATCHES
    if dist.get_rank() == 0:
        title = (
            f"Train step: {options.dtype}, DP {dist.get_world_size()}, "
            f"{options.groups} groups of {options.group_size}, "
            f"about {tokens} response tokens a minibatch"
        )
        show(title, rows, options)


if __name__ == "__main__":
    main()
