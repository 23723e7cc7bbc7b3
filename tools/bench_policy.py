"""What the benchmarks of the train step share: a small Qwen2 policy with random weights,
and random rollouts for it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence

from bench_model import shared_directory, write_model

from megatron_real.config import Config
from megatron_real.parallel.groups import set_up
from megatron_real.policy.policy import Policy, PolicySettings
from megatron_real.records import Completion, Label, Prompt, Rollout, Status, Verdict
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.hf import HfWeights

VOCAB = 32768
SHAPE = {
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 32768,
}


def new_policy(config: Config, shape: Mapping[str, int] = SHAPE) -> Policy:
    """Joins the world and builds the policy, through an HF directory that rank 0 writes."""
    with shared_directory() as directory:
        write_model(directory, **shape)
        path = str(directory)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, path=path))
        return Policy(
            PolicySettings.of(config),
            Architecture.read(path),
            HfWeights(path),
            set_up(config.parallel),
            num_updates=1000,
        )


def rollouts(
    groups: Sequence[Sequence[int]], prompt_tokens: int, *, seed: int = 0, vocab: int = VOCAB
) -> list[Rollout]:
    """Rollouts of the given response lengths, one list a group.

    Every group has both labels, so none is dropped.
    """
    draw = random.Random(seed)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocab) for _ in range(n))

    made: list[Rollout] = []
    for g, lengths in enumerate(groups):
        prompt = Prompt(uid=str(g), text="", token_ids=tokens(prompt_tokens), answers=("",))
        for i, length in enumerate(lengths):
            completion = Completion(tokens(length), (-10.0,) * length, "", True)
            label = Label(i % 2)
            status = Status.OK if label else Status.WRONG
            made.append(Rollout(prompt, g, i, completion, Verdict(status, label, float(label))))
    return made
