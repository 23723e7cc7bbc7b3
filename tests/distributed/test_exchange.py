"""Rollouts travel between ranks: facts to all, tokens to those that want them, bit for bit,
and to nobody else.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import pyarrow.parquet
import pytest
import torch
import torch.distributed as dist

from megatron_real.config import Config
from megatron_real.parallel.collective import RankFailed
from megatron_real.parallel.exchange import Exchange
from megatron_real.parallel.ranks import EveryRankError, Ranks
from megatron_real.records import (
    EXCLUDED,
    NEGATIVE,
    POSITIVE,
    Absent,
    Completion,
    Prompt,
    Rollout,
    Status,
    Verdict,
)
from megatron_real.runs import columns
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.parts import Part, name_parts, part_files
from megatron_real.runs.rollouts import read_rollouts, read_rows, write_rollouts
from megatron_real.runs.saved_steps import SavedSteps
from tests.distributed import jobs, reference
from tests.distributed.reference import Sample
from tests.distributed.test_policy import LAYOUTS, config_of
from tests.distributed.world import World
from tests.unit.test_runs_reporter import ROLLOUTS, TRAINING
from tests.unit.test_runs_reporter import config_of as reporter_config

pytestmark = pytest.mark.one_version

PROMPTS = [Prompt(f"p/{i}", f"{i}+1=", (i, 2, 3), (str(i + 1),)) for i in range(5)]


def made_rollouts() -> list[Rollout]:
    """Of every kind: empty, masked in the middle, with half a surrogate pair, a NaN, a reason,
    no reward.
    """
    draw = random.Random(3)
    rollouts = []
    for group, prompt in enumerate(PROMPTS):
        for sample in range(2):
            length = draw.randrange(1, 40)
            logprobs = [-draw.random() for _ in range(length)]
            logprobs[0] = math.nan
            trained = [draw.random() < 0.8 for _ in range(length)]
            completion = Completion(
                [draw.getrandbits(30) for _ in range(length)],
                logprobs,
                "half a pair \udc00, and ü" * sample,
                finished=sample > 0,
                trained=trained,
                weight_version=draw.randrange(9),
            )
            label = (POSITIVE, NEGATIVE)[sample]
            verdict = Verdict(Status.OK, label, 1 / 3, draw.random(), early=sample > 0)
            rollouts.append(Rollout(prompt, group, sample, completion, verdict))
    lost = Verdict(Status.LOST, EXCLUDED, None, reason="its server is göne")
    rollouts[3] = dataclasses.replace(
        rollouts[3], completion=Completion((), (), "", finished=False), verdict=lost
    )
    return rollouts


def travel() -> dict[str, Any]:
    """Rank 1 holds nothing, the others every second rollout; then tokens go to rank 1 alone,
    and to all.
    """
    rank = dist.get_rank()
    world = dist.get_world_size()
    whole = made_rollouts()
    exchange = Exchange(rank, world)
    own = [r for i, r in enumerate(whole) if (0, 2)[i % 2] == rank]

    # In the wrong order: sharing sorts them.
    shared = exchange.share(own[::-1], PROMPTS)
    facts = [known(r) for r in shared]
    to_one = exchange.bring(shared, [[], [0, 1, 5], []], text=True)
    without_text = exchange.bring(shared, [range(10)] * world)
    everywhere = exchange.bring(shared, [range(10)] * world, text=True)
    first = exchange.to_first(shared)

    with pytest.raises(AttributeError, match="token_ids of an absent completion"):
        next(r for r in shared if isinstance(r.completion, Absent)).completion.token_ids  # noqa: B018
    return {
        "facts": facts,
        "own": own_of(shared),
        "to one": own_of(to_one),
        "first": own_of(first),
        "texts": [r.completion.text for r in without_text],
        "everywhere": everywhere,
    }


def known(rollout: Rollout) -> tuple[Any, ...]:
    """Returns what every rank knows of a rollout."""
    completion = rollout.completion
    lengths = (rollout.num_tokens, completion.num_tokens, completion.num_trained)
    place = (rollout.prompt, rollout.group, rollout.sample, rollout.holder)
    return *place, *lengths, completion.finished, rollout.verdict


def own_of(rollouts: list[Rollout]) -> list[int]:
    return [i for i, r in enumerate(rollouts) if not isinstance(r.completion, Absent)]


def test_tokens_go_where_they_are_wanted_and_facts_everywhere(world: World) -> None:
    whole = made_rollouts()
    holders = [(0, 2)[i % 2] for i in range(10)]
    expected = [
        dataclasses.replace(r, holder=holder) for r, holder in zip(whole, holders, strict=True)
    ]

    ranks = world.run(travel, 3)

    for rank, results in enumerate(ranks):
        assert results["facts"] == [known(r) for r in expected], "bit for bit, and in order"
        assert results["own"] == [i for i in range(10) if holders[i] == rank]
        assert results["everywhere"] == expected
    assert ranks[1]["to one"] == [0, 1, 5] and ranks[0]["to one"] == ranks[0]["own"]
    assert ranks[0]["first"] == list(range(10)) and ranks[2]["first"] == ranks[2]["own"]
    assert ranks[1]["texts"] == [""] * 10, "what is not asked for stays where it is"


def dealt_or_whole(config: Config, samples: list[Sample], reference_path: str) -> dict[str, bool]:
    """Compares what a rank computes from rollouts that every rank has with what it computes when
    each rollout is held by one rank; returns which of the comparisons hold.
    """
    from megatron_real.policy.reference import Reference
    from megatron_real.weights.hf import HfWeights

    policy = jobs.new_policy(config, config.model.path)
    reference = Reference(policy, HfWeights(reference_path))
    whole = jobs.rollouts_of(samples)
    annotated = reference.annotated(whole)
    mismatch = policy.mismatch(whole)
    batches = policy.cut(annotated)

    rank = dist.get_rank()
    policy.exchange = Exchange(rank, dist.get_world_size())
    dealt = policy.exchange.keep_own(whole)
    held = reference.annotated(dealt)
    own = [r.holder == rank for r in held]
    brought = policy.cut(held)
    again = reference.annotated(held)
    return {
        "held": own_of(held) == [i for i, is_own in enumerate(own) if is_own],
        "not everything": 0 < sum(own) < len(whole),
        "reference": all(
            same_reference(a, b)
            for a, b, is_own in zip(held, annotated, own, strict=True)
            if is_own
        ),
        "not again": all(
            a.reference_logprobs is b.reference_logprobs for a, b in zip(again, held, strict=True)
        ),
        "everywhere": all(
            same_reference(a, b) for a, b in zip(reference.annotated(whole), annotated, strict=True)
        ),
        "mismatch": policy.mismatch(dealt) == mismatch,
        "micro-batches": all(
            same(one, other)
            for batch, other_batch in zip(batches, brought, strict=True)
            for one, other in zip(batch.micro_batches, other_batch.micro_batches, strict=True)
        ),
    }


def same_reference(one: Rollout, other: Rollout) -> bool:
    """Whether both have the same log-probs under the reference policy, bit for bit."""
    assert one.reference_logprobs is not None and other.reference_logprobs is not None
    return numpy.array_equal(one.reference_logprobs, other.reference_logprobs)


def same(one: Any, other: Any) -> bool:
    """Whether two micro-batches hold the same bits."""
    tensors = [name for name, value in vars(one).items() if isinstance(value, torch.Tensor)]
    assert "tokens_T" in tensors and ("reference_logprob_T" in tensors) == bool(one.positions)
    return one.positions == other.positions and all(
        torch.equal(getattr(one, name), getattr(other, name)) for name in tensors
    )


@pytest.mark.parametrize("layout", ["cp2-dp2", "pp2-dp2"])
def test_micro_batches_are_those_of_rollouts_that_every_rank_has(
    world: World, tiny_model: Callable[..., Path], layout: str
) -> None:
    size, options = LAYOUTS[layout]
    config = config_of(tiny_model("qwen2"), **options)
    samples = reference.minibatch(1, vocab=101)
    path = str(tiny_model("qwen2", moved=0.05))

    ranks = world.run(dealt_or_whole, size, config=config, samples=samples, reference_path=path)

    for comparisons in ranks:
        assert all(comparisons.values()), comparisons


def written(folder: Path, ranks_per_node: int) -> list[Rollout]:
    """Returns the rollouts of a step and a skipped update, as ranks with a part each write them."""
    from megatron_real.runs.reporter import Reporter

    rank = dist.get_rank()
    world = dist.get_world_size()
    exchange = Exchange(rank, world, ranks_per_node=ranks_per_node)
    ranks = Ranks(rank, world, dist.group.WORLD)
    rollouts = exchange.keep_own(ROLLOUTS)
    reporter = Reporter(
        reporter_config(folder, tensorboard=False),
        rank=rank,
        world=world,
        gathered=ranks.gathered_by_first,
        exchange=exchange,
    )
    reporter.begin()
    with reporter.progress:
        reporter.trained(1, rollouts, TRAINING)
        reporter.skipped(1, 2, rollouts[2:])
        reporter.settle()
    dist.barrier()
    directory = RunDirectory(folder)
    return read_rollouts(directory.rollouts(1)) + read_rollouts(directory.dump(1, 2).rollouts(1))


@pytest.mark.parametrize("ranks_per_node", [2, 1])
def test_the_first_rank_of_a_node_writes_what_others_hold(
    world: World, tmp_path: Path, ranks_per_node: int
) -> None:
    for rollouts in world.run(written, 2, folder=tmp_path / "run", ranks_per_node=ranks_per_node):
        assert rollouts == ROLLOUTS + ROLLOUTS[2:]

    file = RunDirectory(tmp_path / "run").rollouts(1)
    dump = RunDirectory(tmp_path / "run").dump(1, 2).rollouts(1)
    if ranks_per_node == 2:
        assert file.is_file() and dump.is_file()
        return
    parts = [list(read_rows(part)) for part in part_files(file)]
    places = [[(row["group"], row["sample"]) for row in part] for part in parts]
    assert places == [[(r.group, r.sample) for r in ROLLOUTS[node::2]] for node in (0, 1)]
    # The batch of a skipped update: no rank gets the tokens of another node.
    assert [[row["sample"] for row in read_rows(part)] for part in part_files(dump)] == [[0], [1]]
    figures = [(row["score"], row["minibatch"]) for row in read_rows(file)]
    assert figures == [(0.1, 1), (-0.1, 1), (None, 2), (None, 2)]


def replayed(folder: Path) -> tuple[list[int], list[Rollout]] | str:
    """Which rollouts of a saved step this rank reads, and all of them; or why it cannot."""
    rank, world = dist.get_rank(), dist.get_world_size()
    ranks = Ranks(rank, world, dist.group.WORLD)
    exchange = Exchange(rank, world, ranks_per_node=2)
    try:
        rollouts = SavedSteps(RunDirectory(folder), ranks, exchange).read(1)
    except EveryRankError as error:
        return str(error)
    everything = range(len(rollouts))
    return own_of(rollouts), exchange.bring(rollouts, [everything] * world, text=True)


def test_a_replay_reads_each_rollout_on_one_rank(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts, of two row groups each, for four ranks on two nodes."""
    monkeypatch.setattr(columns, "_ROWS_OF_A_GROUP", 3)
    file = RunDirectory(tmp_path).rollouts(1)
    saved = [
        dataclasses.replace(
            rollout,
            verdict=dataclasses.replace(rollout.verdict, seconds=0.0, early=False),
            refills=rollout.group % 3,
            reference_logprobs=rollout.completion.logprobs - 1,
        )
        for rollout in made_rollouts()
    ]
    for number in (1, 2):
        write_rollouts(file, saved[number - 1 :: 2], step=1, part=Part(number, 2))
    name_parts(file, of=2)

    ranks = world.run(replayed, 4, folder=tmp_path)
    # Row groups in order: of the first node's first rank, the second node's, then their second.
    read = [[0, 2, 4], [1, 3, 5], [6, 8], [7, 9]]
    assert [own for own, _ in ranks] == read
    holders = {i: rank for rank, own in enumerate(read) for i in own}
    expected = [dataclasses.replace(r, holder=holders[i]) for i, r in enumerate(saved)]
    for _, rollouts in ranks:
        assert rollouts == expected
        assert all(
            numpy.array_equal(r.reference_logprobs, s.reference_logprobs, equal_nan=True)  # type: ignore[arg-type]
            for r, s in zip(rollouts, saved, strict=True)
        )

    # A byte of tokens that one rank alone reads.
    part = part_files(file)[1]
    metadata = pyarrow.parquet.ParquetFile(part).metadata.row_group(1)
    names = [metadata.column(i).path_in_schema for i in range(metadata.num_columns)]
    page = metadata.column(names.index("logprobs.list.element")).data_page_offset
    data = bytearray(part.read_bytes())
    data[page + 40] ^= 1
    part.write_bytes(data)
    first, *others = world.run(replayed, 4, folder=tmp_path)
    assert str(first).startswith(f"{part} is not a whole file of rollouts")
    assert others == [first] * 3


def cannot_write(folder: Path) -> tuple[str, list[int], list[Path]]:
    """Returns the error of every rank where one of them cannot write its part,
    and the steps and chunks that count as written.
    """
    from megatron_real.runs import reporter as module

    rank = dist.get_rank()
    world = dist.get_world_size()
    exchange = Exchange(rank, world, ranks_per_node=1)
    ranks = Ranks(rank, world, dist.group.WORLD)
    reporter = module.Reporter(
        reporter_config(folder, tensorboard=False),
        rank=rank,
        world=world,
        gathered=ranks.gathered_by_first,
        exchange=exchange,
    )
    reporter.begin()
    directory = RunDirectory(folder)
    if rank == 0:
        directory.chunk(1, 0, 0).parent.mkdir(parents=True)
        directory.chunk(1, 0, 0).touch()
    elif rank == 1:

        def full(*_: Any, **__: Any) -> None:
            raise OSError("no space left")

        mock.patch.object(module, "write_rollouts", full).start()

    with reporter.progress:
        reporter.trained(1, exchange.keep_own(ROLLOUTS), TRAINING)
        with pytest.raises(RankFailed) as failure:
            reporter.settle()
    dist.barrier()
    return str(failure.value), directory.saved_steps(), directory.chunks(1)


def test_a_step_without_one_of_its_parts_is_not_written(world: World, tmp_path: Path) -> None:
    for error, steps, chunks in world.run(cannot_write, 2, folder=tmp_path / "run"):
        assert error == "rank 1: OSError: no space left"
        assert steps == [] and len(chunks) == 1
