"""The rollout stage on two ranks: streaming, engines that fail, dynamic sampling.

Every rank must know the same.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_real.labels import Labeller, TooManyFailedChecks
from megatron_real.objective import make_objective
from megatron_real.prompts import PromptCursor
from megatron_real.records import EXCLUDED, Completion, Prompt, Rollout, Sampling
from megatron_real.rollout.engines.engine import Engine, EngineFailed, Held
from megatron_real.rollout.refill import refill
from megatron_real.rollout.stage import RolloutStage
from tests.distributed.world import World

pytestmark = pytest.mark.one_version

SAMPLING = Sampling(num_samples=4, temperature=1.0, max_tokens=8)
PROMPTS = [Prompt(f"p/{i}", f"{i}+1=", (i,), (str(i + 1),)) for i in range(24)]


class Adder:
    """An engine that knows each answer; a third of its samples, by the seed, are off by one."""

    name = "adder"
    tokenizer = None
    tp = 1
    process = "rank"

    def held(self) -> Mapping[str, Held]:
        return {}

    def checksums(self, dtypes: Mapping[str, torch.dtype]) -> Mapping[str, Mapping[int, int]]:
        return {}

    def revive(self) -> bool:
        return False

    def prepare_for_inference(self, weights: Iterable[tuple[str, Tensor]]) -> None: ...

    def finish_inference(self) -> None: ...

    def close(self) -> None: ...

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        draw = random.Random(str(seeds))
        answers = [
            [self.answer(prompt, draw) for _ in range(sampling.num_samples)] for prompt in prompts
        ]
        for k in range(sampling.num_samples):
            for i, completions in enumerate(answers):
                completion = completions[k]
                if completion is not None:
                    yield i, k, completion

    def answer(self, prompt: Prompt, draw: random.Random) -> Completion | None:
        number = int(prompt.answers[0]) + (draw.random() < 1 / 3)
        return Completion(
            (dist.get_rank(), draw.getrandbits(20)), (0.0, 0.0), f"\\boxed{{{number}}}", True
        )


class Watched(Adder):
    """Yields a completion once the verifier of its rank has begun with all that were before it:
    it leaves a file in `seen` for each.
    """

    def __init__(self, seen: Path) -> None:
        self.seen = seen / str(dist.get_rank())
        self.seen.mkdir()

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        for count, completion in enumerate(super().generate(prompts, sampling, seeds=seeds)):
            while len(list(self.seen.iterdir())) < count:
                time.sleep(0.005)
            yield completion


VERIFIER = """
import os, tempfile
TRUSTED = True  # it writes files

def judge(text, answers, metadata):
    tempfile.mkstemp(dir=f"FOLDER/{os.environ['RANK']}")
    return text == "\\\\boxed{" + answers[0] + "}"
"""


class Dying(Adder):
    """On the last rank it fails after five completions, and again whenever it is asked."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        for count, completion in enumerate(super().generate(prompts, sampling, seeds=seeds)):
            if dist.get_rank() == dist.get_world_size() - 1 and count == 5:
                raise EngineFailed("its server is gone")
            yield completion


class Leaky(Adder):
    """Loses every completion of the prompts 3 and 4."""

    def answer(self, prompt: Prompt, draw: random.Random) -> Completion | None:
        if prompt.uid in ("p/3", "p/4"):
            return None
        return super().answer(prompt, draw)


def stage_of(
    engine: Callable[[], Engine],
    retries: int,
    max_failed_share: float = 1.0,
    verifier: str = "exact",
) -> RolloutStage:
    labeller = Labeller(
        verifier, workers=1, timeout_seconds=60, memory_mib=512, max_failed_share=max_failed_share
    )
    return RolloutStage(
        engine(), labeller, rank=dist.get_rank(), world=dist.get_world_size(), retries=retries
    )


def one_step(
    engine: Callable[[], Engine], retries: int = 1, num_prompts: int = 6, **options: Any
) -> list[Rollout]:
    stage = stage_of(engine, retries, **options)
    prompts = PROMPTS[:num_prompts]
    try:
        rollouts = stage.label(prompts, stage.generate(prompts, SAMPLING, seed=3))
        if stage.engine.tp == 1:
            check_work(stage, rollouts)
        return everywhere(stage, rollouts)
    finally:
        stage.labeller.close()


def check_work(stage: RolloutStage, rollouts: list[Rollout]) -> None:
    """The stage counts the tokens of what its engine has drawn, draws of lost completions too."""
    work = stage.take_work()

    own = [r.completion.num_tokens for r in rollouts if r.holder == stage.rank]
    assert work["tokens"] == sum(own) and work["seconds"] > 0
    assert stage.take_work() == {"seconds": 0.0, "tokens": 0, "taken_over": 0}


def everywhere(stage: RolloutStage, rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts, whole on every rank."""
    everything = range(len(rollouts))
    return stage.exchange.bring(rollouts, [everything] * stage.world, text=True)


def known(rollouts: list[Rollout]) -> list[Any]:
    """Returns all facts of the rollouts but those of the clock and the weight version."""
    return [
        (r.prompt.uid, r.group, r.sample, drawn(r), r.verdict.status, r.label, r.refills)
        for r in rollouts
    ]


def drawn(rollout: Rollout) -> tuple[Any, ...]:
    completion = rollout.completion
    tokens = tuple(completion.token_ids.tolist())
    return tokens, tuple(completion.logprobs.tolist()), completion.text, completion.finished


def alike(ranks: list[list[Rollout]]) -> list[Rollout]:
    """The rollouts, which all ranks must know alike, complete and in order."""
    # Equal to the verdicts' seconds: each verdict is made once and gathered.
    assert all(rank == ranks[0] for rank in ranks)
    assert [(r.group, r.sample) for r in ranks[0]] == [(i, k) for i in range(6) for k in range(4)]
    return ranks[0]


def test_completions_are_verified_while_others_are_generated(world: World, tmp_path: Path) -> None:
    """Each rank generates 12; while it waits with the last one,
    the verifier has begun with the 11th.
    """
    file = tmp_path / "own.py"
    file.write_text(VERIFIER.replace("FOLDER", str(tmp_path)))
    engine = partial(Watched, tmp_path)

    streamed = alike(world.run(one_step, 2, engine=engine, verifier=f"{file}:judge"))
    at_once = alike(world.run(one_step, 2, engine=Adder))

    assert known(streamed) == known(at_once), "the order of arrival changes nothing"
    assert sum(r.verdict.early for r in streamed) >= 2 * 10
    for r in streamed:
        is_right = r.completion.text == f"\\boxed{{{r.prompt.answers[0]}}}"
        assert (r.verdict.status == "ok") == is_right
    assert {r.verdict.status for r in streamed} == {"ok", "wrong"}


def test_the_same_seed_gives_the_same_rollouts(world: World) -> None:
    first, second = (known(alike(world.run(one_step, 2, engine=Adder))) for _ in range(2))
    assert first == second
    assert len({r[3] for r in first}) == len(first), "each completion is a draw of its own"


def test_what_a_dying_engine_lost_is_drawn_by_another(world: World) -> None:
    rollouts = alike(world.run(one_step, 2, engine=Dying))

    assert {r.verdict.status for r in rollouts} == {"ok", "wrong"}
    # The first token of a completion is the rank that drew it; odd groups are rank 1's.
    drawn_by = [r.completion.token_ids[0] for r in rollouts]
    assert drawn_by.count(1) == 5 and all(
        drawn_by[r.group * 4 + r.sample] == 0 for r in rollouts if r.group % 2 == 0
    )
    draws = {r.completion.token_ids.tobytes() for r in rollouts}
    assert len(draws) == len(rollouts), "drawn anew, not copied"


def test_what_is_lost_every_time_is_excluded_and_counted(world: World) -> None:
    rollouts = alike(world.run(one_step, 2, engine=Leaky))
    lost = [r for r in rollouts if r.verdict.status == "lost"]
    assert {r.prompt.uid for r in lost} == {"p/3", "p/4"} and len(lost) == 8
    for r in lost:
        facts = (r.label, len(r.completion.token_ids), r.verdict.reason)
        assert facts == (EXCLUDED, 0, "the engine did not return it")

    without_retry = alike(world.run(one_step, 2, engine=Dying, retries=0))
    lost = [r for r in without_retry if r.verdict.status == "lost"]
    assert len(lost) == 12 - 5 and {r.verdict.reason for r in lost} == {"its server is gone"}


def refusal(max_failed_share: float) -> str:
    with pytest.raises(TooManyFailedChecks) as error:
        one_step(Leaky, max_failed_share=max_failed_share)
    return str(error.value)


def test_every_rank_stops_for_the_same_reason(world: World) -> None:
    """Rank 0 lost 4 of its 12, rank 1 lost 4 of its 12: the share is that of the whole step."""
    first, second = world.run(refusal, 2, max_failed_share=0.3)
    assert first == second
    assert first.startswith(
        "8 of 24 checks failed (8 lost), more than labels.max_failed_share = 0.3; most often: the"
    )


def more_ranks_than_prompts() -> int:
    return len(one_step(Adder, num_prompts=1))


def test_a_rank_may_have_nothing_to_do(world: World) -> None:
    assert world.run(more_ranks_than_prompts, 3) == [4, 4, 4]


def refilled(rounds: int) -> tuple[list[Any], dict[str, Any]]:
    """Two steps of 6 prompts with dynamic sampling, as the loop does it;
    and where the order of prompts stands.
    """
    stage = stage_of(Adder, retries=1)
    cursor = PromptCursor(PROMPTS, seed=1)
    steps: list[Any] = []
    for step in range(2):

        def draw(num_prompts: int, number: int, step: int = step) -> list[Rollout]:
            prompts = cursor.next_batch(num_prompts)
            return stage.label(
                prompts, stage.generate(prompts, SAMPLING, seed=step + (number << 40))
            )

        rollouts = refill(draw(6, 0), make_objective("real"), rounds=rounds, draw=draw)
        steps.append(known(everywhere(stage, rollouts)))
    stage.labeller.close()
    return steps, cursor.state_dict()


def test_dynamic_sampling_on_two_ranks(world: World) -> None:
    (off, after_off), *others = world.run(refilled, 2, rounds=0)
    assert others == [(off, after_off)]

    (on, after_on), *others = world.run(refilled, 2, rounds=4)
    assert others == [(on, after_on)], "ranks agree on the rollouts and on the order of prompts"
    assert world.run(refilled, 2, rounds=4)[0] == (on, after_on), "the same seed, the same draws"

    assert one_class(off[0]) and not one_class(on[0])
    # The groups of two classes stay as they were drawn.
    kept = [r for r in on[0] if not r[6]]
    assert kept == [r for r in off[0] if r[1] not in one_class(off[0])]
    assert after_on["position"] > after_off["position"]
    assert len({r[3] for r in on[0] + on[1]}) == 48, "each draw has a seed of its own"


def one_class(rollouts: list[Any]) -> list[int]:
    return [group for group in range(6) if len({r[5] for r in rollouts if r[1] == group}) < 2]


class BySeed(Adder):
    """Each answer follows from its own seed alone, as an engine with a seed for
    each request gives it.
    """

    count = 0

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        for i, seed in enumerate(seeds):
            for k in range(sampling.num_samples):
                self.count += 1
                yield i, k, self.completion(seed + k)

    @staticmethod
    def completion(seed: int) -> Completion:
        token = seed % 2**31
        return Completion((token,), (0.0,), f"\\boxed{{{token}}}", True)


def spread_groups() -> tuple[list[Any], int]:
    """Returns the answers to two prompts, and how many of them this rank's engine gave."""
    engine = BySeed()
    stage = stage_of(lambda: engine, retries=1)
    prompts = PROMPTS[:2]
    try:
        rollouts = stage.label(prompts, stage.generate(prompts, SAMPLING, seed=3))
        return known(everywhere(stage, rollouts)), engine.count
    finally:
        stage.labeller.close()


def test_groups_are_spread_over_engines_without_other_answers(world: World) -> None:
    """Two prompts of four samples on one engine, and on four,
    of which two would idle if groups stayed whole.
    """
    ((alone, count),) = world.run(spread_groups, 1)
    assert count == 8
    spread = world.run(spread_groups, 4)
    assert [count for _, count in spread] == [2, 2, 2, 2]
    assert all(answers == alone for answers, _ in spread)


class Queue(BySeed):
    """Begins prompts as it has room. The last engine is so slow that it gives its first answer
    when the others have ended, or fails then.
    """

    at_once = 4

    def __init__(self, folder: Path, *, tp: int = 1, fails: bool = False) -> None:
        self.tp = tp
        self.fails = fails
        self.index = dist.get_rank() // tp
        self.slow = self.index == dist.get_world_size() // tp - 1
        self.others_ended = folder / "ended"

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        rows = iter(range(len(prompts)))
        return self.generate_as_room(prompts, sampling, seeds=seeds, rows=rows)

    def generate_as_room(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        rows: Iterator[int],
    ) -> Iterator[tuple[int, int, Completion]]:
        under_way: list[tuple[int, int]] = []
        exhausted = False
        while under_way or not exhausted:
            while len(under_way) < self.at_once and not exhausted:
                i = next(rows, None)
                if i is None:
                    exhausted = True
                else:
                    under_way += [(i, k) for k in range(sampling.num_samples)]
            while self.slow and not self.others_ended.exists():
                time.sleep(0.005)
            if self.slow and self.fails:
                raise EngineFailed("its server is gone")
            if under_way:
                i, k = under_way.pop(0)
                yield i, k, self.completion(seeds[i] + k)
        self.others_ended.touch()


def answered_as_room(
    folder: Path, *, tp: int = 1, take_over: bool = True, fails: bool = False
) -> tuple[list[Any], int, int]:
    """The answers to 12 prompts; how many of them this rank holds, and how many its engine has
    taken over.
    """
    labeller = Labeller(
        "exact", workers=1, timeout_seconds=60, memory_mib=512, max_failed_share=1.0
    )
    if not take_over:
        (folder / "ended").touch()
    rank, world = dist.get_rank(), dist.get_world_size()
    engine = Queue(folder, tp=tp, fails=fails)
    stage = RolloutStage(engine, labeller, rank=rank, world=world, retries=0, take_over=take_over)
    with labeller:
        rollouts = stage.label(PROMPTS[:12], stage.generate(PROMPTS[:12], SAMPLING, seed=3))
        held = sum(rollout.holder == rank for rollout in rollouts)
        work = stage.take_work()
        return known(everywhere(stage, rollouts)), held, int(work.get("taken_over", 0))


@pytest.mark.parametrize("tp", [1, 2])
def test_what_waits_for_a_slow_engine_is_answered_by_another(
    world: World, tmp_path: Path, tp: int
) -> None:
    """Two engines decode one prompt at a time. The slow one keeps the one that it has begun; of its
    share, five wait.
    """
    size = 2 * tp
    (tmp_path / "shares").mkdir()
    alone = world.run(answered_as_room, size, folder=tmp_path / "shares", tp=tp, take_over=False)
    taken = world.run(answered_as_room, size, folder=tmp_path, tp=tp)
    assert all(answers == alone[0][0] for answers, _, _ in alone + taken), "seed for seed"

    assert [held for _, held, _ in alone] == [24 // tp] * size
    assert [held for _, held, _ in taken] == [44 // tp] * tp + [4 // tp] * tp
    assert [count for _, _, count in alone] == [0] * size
    first_ranks = [count for _, _, count in taken][::tp]
    assert first_ranks == [5 * 4, 0]


def test_what_waits_for_an_engine_that_fails_is_answered_by_another(
    world: World, tmp_path: Path
) -> None:
    (answers, *_), _ = world.run(answered_as_room, 2, folder=tmp_path, fails=True)
    statuses = [status for _, _, _, _, status, *_ in answers]
    assert statuses.count("lost") == 4, "the prompt that it had begun"


def without_engines() -> list[tuple[str, str]]:
    """Both engines fail before they have answered anything."""

    class Gone(Queue):
        def generate_as_room(self, *_: Any, rows: Iterator[int], **__: Any) -> Iterator[Any]:
            next(rows)
            raise EngineFailed("its server is gone")
            yield  # a generator, which begins when it is asked

    labeller = Labeller(
        "exact", workers=1, timeout_seconds=60, memory_mib=512, max_failed_share=1.0
    )
    rank, world = dist.get_rank(), dist.get_world_size()
    stage = RolloutStage(Gone(Path()), labeller, rank=rank, world=world, retries=1, take_over=True)
    with labeller:
        asked = PROMPTS[:4]
        rollouts = stage.label(asked, stage.generate(asked, SAMPLING, seed=3))
    return [(rollout.verdict.status, rollout.verdict.reason) for rollout in rollouts]


def test_what_no_engine_has_begun_is_lost_on_every_rank(world: World) -> None:
    first, second = world.run(without_engines, 2)
    assert first == second
    assert len(first) == 16 and {status for status, _ in first} == {"lost"}


class Mortal(Adder):
    """Its process on the last rank ends after five completions.

    It yields none until it is brought back.
    """

    alive = True

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        for count, completion in enumerate(super().generate(prompts, sampling, seeds=seeds)):
            if dist.get_rank() == dist.get_world_size() - 1 and count == 5:
                self.alive = False
            if not self.alive:
                raise EngineFailed("its server is gone")
            yield completion


def brought_back(bring_back: bool) -> tuple[int, int]:
    """Returns how many completions are lost for good where one engine alone answers,
    and how often the stage tried to bring it back.
    """
    engine = Mortal()
    retries = 0

    def before_retry() -> None:
        nonlocal retries
        retries += 1
        engine.alive = engine.alive or bring_back

    stage = stage_of(lambda: engine, retries=1)
    prompts = PROMPTS[:2]
    try:
        sampled = stage.generate(prompts, SAMPLING, seed=3)
        rollouts = stage.label(prompts, sampled, before_retry)
        return sum(r.verdict.status == "lost" for r in rollouts), retries
    finally:
        stage.labeller.close()


@pytest.mark.parametrize(
    ("bring_back", "lost"), [pytest.param(True, 0, id="back"), pytest.param(False, 3, id="gone")]
)
def test_an_engine_is_brought_back_before_its_answers_are_drawn_again(
    world: World, bring_back: bool, lost: int
) -> None:
    assert world.run(brought_back, 1, bring_back=bring_back) == [(lost, 1)]
