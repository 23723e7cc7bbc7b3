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
from megatron_real.records import POSITIVE, Completion, Prompt, Rollout, Sampling, Status, Verdict

TEMPERATURE = 0.8
VOCAB = 101
Stream = Iterator[tuple[str, Tensor]]


def config_of(
    path: Path,
    *,
    sync: dict[str, Any] | None = None,
    rollout: dict[str, Any] | None = None,
    **parallel: Any,
) -> Config:
    """Returns an fp32 configuration with sharp bounds and a checksum at every sync."""
    checks: dict[str, Any] = {
        "checksum_every": 1,
        "probe_bound": 1e-4,
        "probe_tokens": 12,
        "timeout_seconds": 60.0,
    }
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
        """Adds noise to the weights, as an update would, only more; replicas move alike."""
        self._moves += 1
        draw = torch.Generator().manual_seed(self._moves)
        for chunk in self.policy.chunks:
            for parameter in chunk.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=draw)
        tied_over_stages = self.policy.architecture.tied and self.policy.groups.pp.size() > 1
        assert not tied_over_stages, "the last stage's copy of the embedding would not move alike"

    def synced(self, stream: Iterable[tuple[str, Tensor]] | None = None) -> str:
        """Syncs and probes; returns the error's message, or an empty string."""
        from megatron_real.rollout.sync import SyncError

        if stream is None:
            stream = self.policy.stream()
        try:
            self.sync.run(stream, self.policy.mismatch)
        except SyncError as error:
            return str(error)
        return ""

    def rollouts(self, asked: list[Prompt], *, seed: int = 5) -> list[Rollout]:
        """Returns two answers to each prompt, the same on every rank."""
        from megatron_real.rollout.engines.engine import completed

        sampling = Sampling(2, TEMPERATURE, 16)
        seeds = [seed + 10 * i for i in range(len(asked))]
        shared = [completed(self.engine, asked, sampling, seeds=seeds)]
        dist.broadcast_object_list(shared, src=0)

        rollouts = []
        for i, completions in enumerate(shared[0]):
            for k, completion in enumerate(completions):
                assert completion is not None, "the engine has lost it"
                verdict = Verdict(Status.OK, POSITIVE, 1.0)
                rollouts.append(Rollout(asked[i], i, k, completion, verdict))
        return rollouts

    def largest(self, rollouts: list[Rollout]) -> float:
        """Returns max |log-prob in trainer - in engine| over all tokens, in nats."""
        batch = self.policy.whole(rollouts)
        self.policy.step.old_logprobs(batch)
        return float(self.policy.token_stats([batch]).means()["mismatch_max_abs"])


def without(stream: Stream, left_out: str) -> Stream:
    return ((name, tensor) for name, tensor in stream if name != left_out)


def renamed(stream: Stream, target: str, new_name: str) -> Stream:
    for name, tensor in stream:
        if name == target:
            yield new_name, tensor
        else:
            yield name, tensor


def cut(stream: Stream, target: str) -> Stream:
    for name, tensor in stream:
        if name == target:
            yield name, tensor[1:]
        else:
            yield name, tensor


def doubled(stream: Stream, target: str) -> Stream:
    for name, tensor in stream:
        yield name, tensor
        if name == target:
            yield name, tensor


def damaged_on_the_way(
    pair: Pair, damage: Callable[[Stream], Stream], *, rank: int | None = None
) -> Any:
    """The engine's loading, except that on `rank` (None: on all) the tensors are
    damaged after they were sent.
    """
    load = pair.engine.prepare_for_inference
    if rank is not None and dist.get_rank() != rank:
        return load
    return lambda weights: load(damage(iter(weights)))


def one_element(target: str, value: float = 1e-3) -> Callable[[Stream], Stream]:
    """Adds `value` to the last element of the tensor `target`."""

    def damage(stream: Stream) -> Stream:
        for name, tensor in stream:
            if name == target:
                tensor = tensor.clone()
                tensor.view(-1)[-1] += value
            yield name, tensor

    return damage


def mismatch(
    config: Config, answers: list[tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]]
) -> list[float]:
    """Returns the policy's mean difference to given log-probs, in magnitude, for each rollout."""
    from tests.distributed.jobs import new_policy

    rollouts = [
        Rollout(
            Prompt(str(i), "", prompt, ("",)),
            group=i,
            sample=0,
            completion=Completion(tokens, logprobs, "", True),
            verdict=Verdict(Status.OK, POSITIVE, 1.0),
        )
        for i, (prompt, tokens, logprobs) in enumerate(answers)
    ]
    return new_policy(config, config.model.path).mismatch(rollouts)


def damages(config: Config, name: str) -> dict[str, str]:
    """Returns the error of a sync for each damage to the tensor `name`.

    `good` is a sync without damage before them all, `again` one after them all.
    """
    pair = Pair(config)
    errors = {"good": pair.synced()}
    load = pair.engine.prepare_for_inference
    last = dist.get_world_size() - 1
    for case, damage, rank in (
        ("element", one_element(name), None),
        ("element-on-one-rank", one_element(name), last),
        ("dropped", lambda stream: without(stream, name), last),
    ):
        pair.move()
        pair.engine.prepare_for_inference = damaged_on_the_way(pair, damage, rank=rank)
        errors[case] = pair.synced()
        pair.engine.prepare_for_inference = load

    stream = pair.policy.stream
    errors["missing"] = pair.synced(without(stream(), name))
    errors["unknown"] = pair.synced(renamed(stream(), name, "model.other.weight"))
    errors["shape"] = pair.synced(cut(stream(), name))
    errors["twice"] = pair.synced(doubled(stream(), name))

    # Without checksums the probe alone can see a damage, and does.
    pair.sync.config = dataclasses.replace(pair.sync.config, checksum_every=0)
    pair.move()
    pair.engine.prepare_for_inference = damaged_on_the_way(
        pair, one_element("model.norm.weight", 1.0), rank=last
    )
    errors["probe"] = pair.synced()
    pair.engine.prepare_for_inference = load

    errors["again"] = pair.synced()
    return errors


def hang(config: Config, name: str) -> None:
    """Runs a sync in which the last rank stops before it takes part in the tensor after `name`."""
    pair = Pair(config)
    assert not pair.synced()
    pair.sync.config = dataclasses.replace(pair.sync.config, timeout_seconds=8.0)

    def stopping(stream: Stream) -> Stream:
        for sent_name, tensor in stream:
            yield sent_name, tensor
            if sent_name == name and dist.get_rank() == dist.get_world_size() - 1:
                time.sleep(600)

    pair.sync.run(stopping(pair.policy.stream()))
