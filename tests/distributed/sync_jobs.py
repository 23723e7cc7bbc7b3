"""What the tests of the weight sync run on every rank: real engines, real policies,
and ways to damage what passes.
"""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_real.config import (
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    SyncConfig,
)
from megatron_real.records import POSITIVE, Completion, Prompt, Rollout, Sampling, Verdict

TEMPERATURE = 0.8
VOCAB = 101
Stream = Iterator[tuple[str, Tensor]]


def config_of(
    path: Path,
    *,
    sync: dict[str, Any] | None = None,
    rollout: dict[str, Any] | None = None,
    **parallel: Any,
):
    """fp32, with sharp bounds and a checksum at every sync."""
    checks = {"checksum_every": 1, "probe_bound": 1e-4, "probe_tokens": 12, "timeout_seconds": 60.0}
    return Config(
        model=ModelConfig(path=str(path), dtype="fp32"),
        data=DataConfig(max_prompt_tokens=208),
        rollout=RolloutConfig(
            max_response_tokens=16,
            temperature=TEMPERATURE,
            num_prompts=4,
            group_size=2,
            kv_cache_mib=64,
            sync=SyncConfig(**checks | (sync or {})),
            **{"engine": "transformers", **(rollout or {})},
        ),
        batch=BatchConfig(max_tokens=1024, minibatch_prompts=4),
        parallel=ParallelConfig(**parallel),
    )


def complete(path: Path) -> Path:
    """Gives a model directory the tokenizer and the end-of-sequence token that engines need."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
    import make_tiny_model

    make_tiny_model.new_tokenizer().save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    return path


def prompts(number: int, *, tokens: int = 6) -> list[Prompt]:
    draw = random.Random(tokens)
    return [
        Prompt(f"p/{i}", "", tuple(draw.randrange(2, VOCAB) for _ in range(tokens + i)), ("",))
        for i in range(number)
    ]


class Pair:
    """A policy, an engine and the sync between them."""

    def __init__(self, config: Config) -> None:
        from megatron_real.rollout import build_engine
        from megatron_real.rollout.sync import WeightSync
        from tests.distributed.jobs import new_policy

        self.policy = new_policy(config, config.model.path)
        self.engine: Any = build_engine(config, say=lambda _: None)
        tied = self.policy.architecture.tied
        self.sync = WeightSync(
            self.engine,
            config.rollout.sync,
            tied=tied,
            probe=prompts(1)[0],
            temperature=TEMPERATURE,
        )
        self._moves = 0

    def move(self) -> None:
        """Other weights, as an update would make them, only more so;
        replicated parameters move alike.
        """
        self._moves += 1
        draw = torch.Generator().manual_seed(self._moves)
        for chunk in self.policy.chunks:
            for parameter in chunk.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
        tied_over_stages = self.policy.architecture.tied and self.policy.groups.pp.size() > 1
        assert not tied_over_stages, "the last stage's copy of the embedding would not move alike"

    def synced(self, stream: Iterable[tuple[str, Tensor]] | None = None) -> str:
        """Syncs and probes; what went wrong, or nothing."""
        from megatron_real.rollout.sync import SyncError

        try:
            self.sync.run(self.policy.stream() if stream is None else stream, self.policy.mismatch)
        except SyncError as error:
            return str(error)
        return ""

    def rollouts(self, asked: list[Prompt], *, seed: int = 5) -> list[Rollout]:
        """Two answers to each prompt, the same on every rank."""
        sampling = Sampling(2, TEMPERATURE, 16)
        from megatron_real.rollout.engines.engine import completed

        seeds = [seed + 10 * i for i in range(len(asked))]
        shared = [completed(self.engine, asked, sampling, seeds=seeds)]
        dist.broadcast_object_list(shared, src=0)
        return [
            Rollout(asked[i], i, k, completion, Verdict("ok", POSITIVE, 1.0))
            for i, row in enumerate(shared[0])
            for k, completion in enumerate(row)
        ]

    def largest(self, rollouts: list[Rollout]) -> float:
        """max |log-prob in trainer - in engine| over all tokens (nats)."""
        batch = self.policy.whole(rollouts)
        self.policy.step.old_logprobs(batch)
        return float(self.policy.token_stats([batch]).means()["mismatch_max_abs"])


def without(stream: Stream, left_out: str) -> Stream:
    return ((name, tensor) for name, tensor in stream if name != left_out)


def renamed(stream: Stream, name: str, other: str) -> Stream:
    return ((other if found == name else found, tensor) for found, tensor in stream)


def cut(stream: Stream, name: str) -> Stream:
    return ((found, tensor[1:] if found == name else tensor) for found, tensor in stream)


def doubled(stream: Stream, name: str) -> Stream:
    for found, tensor in stream:
        yield found, tensor
        if found == name:
            yield found, tensor


def damaged_on_the_way(
    pair: Pair, damage: Callable[[Stream], Stream], *, rank: int | None = None
) -> Any:
    """The engine's loading, except that on `rank` (None: on all) the tensors are
    damaged after they were sent.
    """
    load = pair.engine.prepare_for_inference
    here = rank is None or dist.get_rank() == rank
    return lambda weights: load(damage(iter(weights)) if here else weights)


def one_element(name: str, value: float = 1e-3) -> Callable[[Stream], Stream]:
    def damage(stream: Stream) -> Stream:
        for found, tensor in stream:
            if found == name:
                tensor = tensor.clone()
                tensor.view(-1)[-1] += value
            yield found, tensor

    return damage


def mismatch(
    config: Config, answers: list[tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]]
) -> list[float]:
    """The policy's mean |difference| to given log-probs."""
    from tests.distributed.jobs import new_policy

    rollouts = [
        Rollout(
            Prompt(str(i), "", prompt, ("",)),
            i,
            0,
            Completion(tokens, logprobs, "", True),
            Verdict("ok", 1, 1.0),
        )
        for i, (prompt, tokens, logprobs) in enumerate(answers)
    ]
    return new_policy(config, config.model.path).mismatch(rollouts)


def damages(config: Config, name: str) -> dict[str, str]:
    """What each damage to the tensor `name` is answered with; `good` before and after them all."""
    pair = Pair(config)
    found = {"good": pair.synced()}
    load = pair.engine.prepare_for_inference
    last = dist.get_world_size() - 1
    for case, damage, rank in (
        ("element", one_element(name), None),
        ("element-on-one-rank", one_element(name), last),
        ("dropped", lambda stream: without(stream, name), last),
    ):
        pair.move()
        pair.engine.prepare_for_inference = damaged_on_the_way(pair, damage, rank=rank)
        found[case] = pair.synced()
        pair.engine.prepare_for_inference = load
    stream = pair.policy.stream
    found["missing"] = pair.synced(without(stream(), name))
    found["unknown"] = pair.synced(renamed(stream(), name, "model.other.weight"))
    found["shape"] = pair.synced(cut(stream(), name))
    found["twice"] = pair.synced(doubled(stream(), name))
    pair.sync.config = dataclasses.replace(pair.sync.config, checksum_every=0)
    pair.move()
    pair.engine.prepare_for_inference = damaged_on_the_way(
        pair, one_element("model.norm.weight", 1.0), rank=last
    )
    found["probe"] = pair.synced()
    pair.engine.prepare_for_inference = load
    found["again"] = pair.synced()
    return found


def hang(config: Config, name: str) -> None:
    """A sync in which the last rank stops before it takes part in the tensor after `name`."""
    pair = Pair(config)
    assert not pair.synced()
    pair.sync.config = dataclasses.replace(pair.sync.config, timeout_seconds=8.0)

    def stopping(stream: Stream) -> Stream:
        for found, tensor in stream:
            yield found, tensor
            if found == name and dist.get_rank() == dist.get_world_size() - 1:
                time.sleep(600)

    pair.sync.run(stopping(pair.policy.stream()))
