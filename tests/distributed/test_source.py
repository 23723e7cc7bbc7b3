"""Where a step's rollouts come from, on two ranks: kept chunks and what they were drawn under,
one step ahead, replay.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_real.config import SyncConfig
from megatron_real.labels import Labeller
from megatron_real.objective import make_objective
from megatron_real.parallel.ranks import EveryRankError, Ranks
from megatron_real.prompts import PromptCursor
from megatron_real.records import POSITIVE, Completion, Prompt, Rollout, Sampling, Status, Verdict
from megatron_real.rollout.engines.engine import EngineFailed, Held
from megatron_real.rollout.source import DrawOptions, Fresh, Generator, OneStepAhead, Replay
from megatron_real.rollout.stage import RolloutStage
from megatron_real.rollout.sync import WeightSync
from megatron_real.runs.chunks import ChunkFiles
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.parts import part_files
from tests.distributed.test_stage import PROMPTS, SAMPLING, Adder, everywhere, known
from tests.distributed.world import World

pytestmark = pytest.mark.one_version

OPTIONS = DrawOptions(
    SAMPLING,
    6,
    4,
    1,
    None,
    permute_labels=False,
    seed=3,
    settings={"rollout.temperature": 1.0},
    objective=make_objective("real"),
)
"""Two chunks of 4 and 2 prompts, then a round of refills."""


class Counting(Adder):
    """Takes one tensor, and counts the prompts that it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def held(self) -> Mapping[str, Held]:
        return {"weight": Held((4,), {})}

    def prepare_for_inference(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        assert len(list(weights)) == 1

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        self.asked += len(prompts)
        yield from super().generate(prompts, sampling, seeds=seeds)


class Weights:
    """A policy of one tensor (`TrainedPolicy`) and an earlier copy of it (`EarlierWeights`)."""

    def __init__(self, value: float = 0.0) -> None:
        self.present = torch.full((4,), value)
        self.earlier = torch.full((4,), -1.0)

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        yield "weight", self.present

    def mismatch(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Below any bound under the weights that generated, which are 0 in these tests;
        beyond it under others.
        """
        return [float(self.present.abs().max())] * len(rollouts)

    def make_room(self) -> None: ...

    def take_room_back(self) -> None: ...

    def take(self) -> None:
        self.earlier = self.present.clone()

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        self.present, self.earlier = self.earlier, self.present
        yield
        self.present, self.earlier = self.earlier, self.present


class Job:
    """A source over real files, as a life of a run has it."""

    def __init__(
        self,
        folder: Path,
        labeller: Labeller,
        options: DrawOptions = OPTIONS,
        prompts: Sequence[Prompt] = PROMPTS,
        weights: float = 0.0,
        begun_step: int | None = None,
        ahead: bool = False,
        ranks_per_node: int = 2,
    ) -> None:
        os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)
        ranks = Ranks.of_all(timedelta(minutes=1))
        self.messages: list[str] = []
        self.engine = Counting()
        self.weights = Weights(weights)
        stage = RolloutStage(self.engine, labeller, rank=ranks.rank, world=ranks.world)
        unchecked = SyncConfig(checksum_every=0, probe_every=0)
        sync = WeightSync(self.engine, unchecked, tied=False, probe=prompts[0], temperature=1.0)
        generator = Generator(self.weights, stage, sync, timed=lambda _: nullcontext())
        chunks = ChunkFiles(
            RunDirectory(folder), ranks, self.messages.append, begun_step=begun_step
        )
        self.cursor = PromptCursor(prompts, seed=1)
        drawing: tuple[Any, ...] = (generator, self.cursor, options, chunks)
        self.source = Fresh(*drawing, seam=lambda: None)
        if ahead:
            self.source = OneStepAhead(
                *drawing, seam=lambda: None, earlier=self.weights, last_step=3
            )

    def first_step(self) -> list[Any]:
        """The facts of the first step's rollouts."""
        return self.known(self.source.take(1).rollouts)

    def known(self, rollouts: list[Rollout]) -> list[Any]:
        """The facts of rollouts, the same on every rank."""
        return known(self.everywhere(rollouts))

    def everywhere(self, rollouts: list[Rollout]) -> list[Rollout]:
        """The rollouts, whole on every rank."""
        return everywhere(self.source.generator.stage, rollouts)


def new_labeller() -> Labeller:
    """A labeller for all lives of a test: starting its processes takes longer than their work."""
    return Labeller("exact", workers=1, timeout_seconds=60, memory_mib=512)


def changed(prompt: Prompt, **values: Any) -> Prompt:
    if prompt.uid not in ("p/3", "p/7"):
        return prompt
    return dataclasses.replace(prompt, **values)


OTHER_ANSWERS = [changed(p, answers=("1000",)) for p in PROMPTS]
OTHER_QUESTIONS = [changed(p, token_ids=(99,)) for p in PROMPTS]
COOLER = dataclasses.replace(OPTIONS, settings={"rollout.temperature": 0.3})


def lives(folder: Path, ranks_per_node: int) -> dict[str, Any]:
    """Takes the same step in several lives of a run, of which each finds the chunks of the one
    before on disk; returns what each has asked its engine.
    """
    life = partial(Job, folder, new_labeller(), ranks_per_node=ranks_per_node)
    first = life()
    drawn = first.first_step()
    results: dict[str, Any] = {"asked at first": first.engine.asked}

    again = life()
    results["the same"] = again.first_step() == drawn and again.engine.asked == 0
    moved = life(ranks_per_node=3 - ranks_per_node)
    results["on other nodes"] = moved.first_step() == drawn and moved.engine.asked == 0

    changes: dict[str, dict[str, Any]] = {
        "settings": {"options": COOLER},
        "weights": {"weights": 1.0},
        "answers": {"prompts": OTHER_ANSWERS},
        "questions": {"prompts": OTHER_QUESTIONS},
    }
    for name, change in changes.items():
        job = life(**change)
        job.first_step()
        results[name] = (job.engine.asked > 0, job.messages[:1])
        life().first_step()  # the chunks are those of the first life again

    dist.barrier()
    if dist.get_rank() == 0:
        cut = part_files(RunDirectory(folder).chunks(1)[0])[-1]
        cut.write_bytes(cut.read_bytes()[:-7])
    dist.barrier()
    job = life()
    results["a cut chunk"] = (job.first_step() == drawn, job.engine.asked, job.messages)
    return results


@pytest.mark.parametrize("ranks_per_node", [2, 1])
def test_a_kept_chunk_is_used_only_where_it_would_be_drawn_alike(
    world: World, tmp_path: Path, ranks_per_node: int
) -> None:
    """Other settings, weights, answers or prompts: the chunk is drawn again on both ranks,
    with a message of what has changed.
    """
    ranks = world.run(lives, 2, folder=tmp_path, ranks_per_node=ranks_per_node)

    asked_at_first = sum(rank["asked at first"] for rank in ranks)
    assert asked_at_first >= 6
    assert all(rank["the same"] and rank["on other nodes"] for rank in ranks)

    sentences = {
        "settings": "rollout.temperature was 1.0 and is 0.3",
        "weights": "the policy's weights have changed",
        "answers": "gold answers have changed",
        "questions": "the prompts have changed",
    }
    for name, sentence in sentences.items():
        asked, messages = ranks[0][name]
        (message,) = messages
        assert asked and message.startswith("step 1: ") and message.endswith(sentence), message
        assert ranks[1][name] == (True, []), "the first rank speaks"

    same, _, messages = ranks[0]["a cut chunk"]
    asked_again = sum(rank["a cut chunk"][1] for rank in ranks)
    assert same and 0 < asked_again < asked_at_first
    # On one node a chunk is one file; on two, each node writes a part, and the last one was cut.
    damaged = "chunk-00001-0-00000"
    if ranks_per_node == 1:
        damaged = "part-00002-of-00002"
    reason = f"{damaged}.parquet is not a whole file of rollouts"
    assert [message for message in messages if reason in message and "drawn again" in message]


def partly_trained(folder: Path, ranks_per_node: int) -> tuple[bool, int, str]:
    """A step that is begun keeps its chunks under moved weights and other settings,
    but not for other prompts.
    """
    life = partial(Job, folder, new_labeller(), ranks_per_node=ranks_per_node)
    drawn = life().first_step()

    moved = life(options=COOLER, weights=1.0, begun_step=1)
    same = moved.first_step() == drawn

    with pytest.raises(EveryRankError) as refusal:
        life(prompts=OTHER_QUESTIONS, begun_step=1).first_step()
    return same, moved.engine.asked, str(refusal.value)


@pytest.mark.parametrize("ranks_per_node", [2, pytest.param(1, marks=pytest.mark.grid)])
def test_a_step_that_is_partly_trained_on_keeps_its_rollouts(
    world: World, tmp_path: Path, ranks_per_node: int
) -> None:
    options = {"folder": tmp_path, "ranks_per_node": ranks_per_node}
    for same, asked, refusal in world.run(partly_trained, 2, **options):
        assert same and asked == 0
        assert "answers other prompts than step 1 asks" in refusal


def versions(rollout: Rollout) -> list[int]:
    return rollout.completion.weight_version.tolist()


def ahead_of_time(folder: Path, bound: float | None) -> dict[str, Any]:
    """Takes three steps one step ahead, between which the weights move and an evaluation borrows
    the engine.
    """
    options = dataclasses.replace(OPTIONS, chunk_prompts=0, refill_rounds=0, exclude_mismatch=bound)
    labeller = new_labeller()
    lagging = Job(folder / "lagging", labeller, options, ahead=True)
    fresh = Job(folder / "fresh", labeller, dataclasses.replace(options, exclude_mismatch=None))
    results: dict[str, Any] = {
        "lags": [],
        "weights": [],
        "versions": [],
        "same": [],
        "statuses": set(),
    }
    for step in (1, 2, 3):
        taken = lagging.source.take(step)
        rollouts = lagging.everywhere(taken.rollouts)
        with taken.generating_weights():
            results["weights"].append(float(lagging.weights.present[0]))
        assert float(lagging.weights.present[0]) == step - 1, "the present ones are back"
        results["lags"].append(taken.lag)
        results["versions"].append({v for r in rollouts for v in versions(r)})
        results["same"].append(known(rollouts) == fresh.known(fresh.source.take(step).rollouts))
        results["statuses"] |= {r.verdict.status for r in taken.rollouts if step < 3}

        lagging.weights.present = lagging.weights.present + 1  # the step's updates
        with lagging.source.awake():
            pass
    return results


def test_one_step_ahead_hands_over_the_weights_that_generated(world: World, tmp_path: Path) -> None:
    """The draws are those of `Fresh`, seed for seed; the mismatch is that of the generating
    weights, 0 up to step 2.
    """
    for results in world.run(ahead_of_time, 2, folder=tmp_path, bound=0.5):
        assert results["lags"] == [0.0, 1.0, 1.0]
        assert results["versions"] == [{1}, {1}, {2}], "the step that began with those weights"
        assert results["weights"] == [0.0, 0.0, 1.0]
        assert results["same"] == [True, True, False], "in the third, all are beyond the bound"
        assert "mismatch" not in results["statuses"]


def test_a_replay_reads_steps_in_order_of_group_and_sample() -> None:
    completion = Completion((1,), (0.0,), "", True)
    verdict = Verdict(Status.OK, POSITIVE, 1.0)
    rollouts = [
        Rollout(PROMPTS[0], group, sample, completion, verdict)
        for group, sample in ((1, 0), (0, 1), (0, 0))
    ]

    taken = Replay({7: rollouts}.__getitem__).take(7)

    assert [(r.group, r.sample) for r in taken.rollouts] == [(0, 0), (0, 1), (1, 0)]
    assert taken.lag == 0.0


class Mortal(Counting):
    """Its server ends after two completions, and takes the policy's weights
    again once it is back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = True
        self.syncs = 0

    def revive(self) -> bool:
        had_ended = not self.alive
        self.alive = True
        return had_ended

    def prepare_for_inference(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        super().prepare_for_inference(weights)
        self.syncs += 1

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        for count, completion in enumerate(super().generate(prompts, sampling, seeds=seeds)):
            if count == 2 and self.syncs == 1:
                self.alive = False
                raise EngineFailed("its server is gone")
            yield completion


def synced_within_the_step() -> tuple[int, int]:
    """Returns the number of syncs in a draw whose server ends in the middle of it,
    and of completions that are lost for good.
    """
    engine = Mortal()
    labeller = Labeller(
        "exact", workers=1, timeout_seconds=60, memory_mib=512, max_failed_share=1.0
    )
    stage = RolloutStage(engine, labeller, rank=0, world=1)
    sync = WeightSync(
        engine,
        SyncConfig(checksum_every=0, probe_every=0),
        tied=False,
        probe=PROMPTS[0],
        temperature=1.0,
    )
    generator = Generator(Weights(), stage, sync, timed=lambda name: nullcontext())
    try:
        with generator.awake():
            rollouts = generator.sample(PROMPTS[:2], SAMPLING, seed=3)
    finally:
        labeller.close()
    return engine.syncs, sum(r.verdict.status == "lost" for r in rollouts)


def test_a_server_that_ends_within_a_step_is_synced_within_it(world: World) -> None:
    assert world.run(synced_within_the_step, 1) == [(2, 0)]
