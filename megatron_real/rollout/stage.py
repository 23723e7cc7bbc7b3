"""The rollout stage: prompts spread over ranks, completions sampled and verified there, their facts known everywhere.

    generate   each engine samples for its share of the prompts; each completion goes to the verifier at once
    label      waits for the verdicts that are left, shares the facts of all rollouts, draws anew what an engine lost

The tokens stay on the rank that sampled them until others train on them (exchange.py).

Shares are equal by the expected length of their answers (spread.py). The samples of a prompt come from one engine, or,
where there are fewer prompts than engines, from several: the same answers, since each sample has a seed of its own. An engine is one rank or several neighbours, which
all draw its completions and share the verifying.

A completion that is lost is drawn again on another engine; one that is lost every time is excluded and counted.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_real.exchange import Exchange
from megatron_real.labels import Labeller
from megatron_real.records import EXCLUDED, Completion, Prompt, Rollout, Sampling, Status, Verdict
from megatron_real.rollout.engine import Engine, EngineFailed
from megatron_real.rollout.spread import ExpectedLengths, prompt_seed, samples_together, spread

logger = logging.getLogger(__name__)

Place = tuple[int, int]
"""(group, sample) of a completion: the index of its prompt, and its own within the group."""

_LOST = Completion((), (), "", finished=False)


@dataclass(frozen=True)
class Drawn:
    """One completion on its way to a verdict."""

    place: Place
    """Where it belongs."""
    completion: Completion
    """What the engine sampled."""
    verdict: Future[Verdict]
    """The verifier may still be at it."""
    early: bool = False
    """True when the verdict was there before the engine had finished its last completion."""


@dataclass
class Generation:
    """How far the present share of completions is, for people who watch."""

    wanted: int
    """Completions of this rank's share."""
    started: float
    """When it began, on the clock of time.monotonic()."""
    done: int = 0
    """Completions so far."""
    tokens: int = 0
    """Their response tokens."""
    longest: int = 0
    """Tokens of the longest of them."""
    verdicts: list[Future[Verdict]] = field(default_factory=list)
    """One of each that was given to the verifier."""

    def add(self, completion: Completion, verdict: Future[Verdict]) -> None:
        """Counts a completion."""
        length = completion.num_trained
        self.done += 1
        self.tokens += length
        self.longest = max(self.longest, length)
        self.verdicts.append(verdict)

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        judged = sum(verdict.done() for verdict in list(self.verdicts))
        return (
            f"{self.done} of {self.wanted} rollouts, {self.tokens / seconds:,.0f} tokens/s, "
            f"longest {self.longest}, {judged} judged"
        )


@dataclass(frozen=True)
class EngineWork:
    """What this rank's engine has done."""

    seconds: float = 0.0
    """In which it generated."""
    tokens: int = 0
    """Response tokens that it handed out, on whichever of its ranks."""

    def __add__(self, other: EngineWork) -> EngineWork:
        return EngineWork(self.seconds + other.seconds, self.tokens + other.tokens)


@dataclass(frozen=True)
class Sampled:
    """This rank's share of a step's completions."""

    sampling: Sampling
    """How they were drawn."""
    seed: int
    """Of the draw, the same on every rank."""
    engine_of: dict[Place, int]
    """The engine that answers each, of all ranks' completions."""
    drawn: tuple[Drawn, ...]
    """In order of place; what the engine lost is an empty completion with the verdict `lost`."""
    work: EngineWork = EngineWork()
    """What they took."""


class RolloutStage:
    """Prompts -> labelled rollouts, the same list on every rank but for the tokens that other ranks hold.

    Every rank samples, whatever its place in the training layout: the engines are whole copies of the model, so no rank
    idles while others generate.
    """

    def __init__(
        self,
        engine: Engine,
        labeller: Labeller,
        *,
        rank: int,
        world: int,
        retries: int = 1,
        exchange: Exchange | None = None,
    ) -> None:
        """Joins an engine and a verifier.

        Args:
            retries: how often a lost completion is drawn again, each time by the next engine.
            exchange: between all ranks; None where the default process group is gloo.
        """
        self.engine, self.labeller, self.rank, self.world, self.retries = (
            engine,
            labeller,
            rank,
            world,
            retries,
        )
        self.exchange = exchange or Exchange(rank, world)
        self.engines = world // engine.tp
        self.index, self.member = divmod(rank, engine.tp)
        self.lengths = ExpectedLengths()
        self.generation: Generation | None = None
        """The present or the last share of this rank."""
        self.work = EngineWork()
        """Of the draws that were labelled since `take_work`."""

    def take_work(self) -> dict[str, float]:
        """Returns `work` as plain numbers, and begins anew; {} on all ranks of an engine but its first."""
        work, self.work = self.work, EngineWork()
        return dataclasses.asdict(work) if self.member == 0 else {}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> Sampled:
        """This rank's share. Verifies completions as the engine hands them out; waits for no verdict and no rank."""
        num_samples = sampling.num_samples
        together = samples_together(len(prompts), num_samples, self.engines)
        parts = [
            [(i, k) for k in range(first, first + together)]
            for i in range(len(prompts))
            for first in range(0, num_samples, together)
        ]
        costs = self.lengths.costs([prompts[part[0][0]] for part in parts], together)
        shares = spread(costs, self.engines)
        engine_of = {
            place: engine
            for engine, share in enumerate(shares)
            for p in share
            for place in parts[p]
        }
        sampling_of_part = dataclasses.replace(sampling, num_samples=together)
        own = [parts[p] for p in shares[self.index]]
        drawn, work = self._draw(prompts, own, sampling_of_part, seed, attempt=0)
        return Sampled(sampling, seed, engine_of, drawn, work)

    def label(
        self,
        prompts: Sequence[Prompt],
        sampled: Sampled,
        before_retry: Callable[[], None] = lambda: None,
    ) -> list[Rollout]:
        """Every rank's labelled rollouts, in order of place; the tokens stay where they are. Collective over all ranks.

        Args:
            prompts: those that were sampled, the same on every rank.
            sampled: this rank's share.
            before_retry: called on every rank before lost completions are drawn again; may bring engines back.

        Raises:
            TooManyFailedChecks, RewardNeedsThreshold: on every rank alike.
        """
        self.work += sampled.work
        known = self._shared(prompts, sampled.drawn)
        once = dataclasses.replace(sampled.sampling, num_samples=1)
        for attempt in range(1, self.retries + 1):
            lost = sorted(place for place, r in known.items() if r.verdict.status == Status.LOST)
            if not lost:
                break
            before_retry()
            mine = [
                [(i, k)]
                for i, k in lost
                if (sampled.engine_of[i, k] + attempt) % self.engines == self.index
            ]
            again, work = self._draw(prompts, mine, once, sampled.seed, attempt=attempt)
            self.work += work
            known |= self._shared(prompts, again)

        rollouts = [known[place] for place in sorted(known)]
        self.labeller.check_failures([rollout.verdict for rollout in rollouts])
        self.lengths.learn(rollouts)
        return rollouts

    def _draw(
        self,
        prompts: Sequence[Prompt],
        places: Sequence[Sequence[Place]],
        sampling: Sampling,
        seed: int,
        *,
        attempt: int,
    ) -> tuple[tuple[Drawn, ...], EngineWork]:
        """Samples each row of `places`, the samples of one prompt, and gives what it finishes at once to the verifier.

        Of an engine on several ranks each verifies a part, and returns it.
        """
        asked = [prompts[row[0][0]] for row in places]
        seeds = [
            _seed_of_part(seed, attempt, row[0], prompt)
            for row, prompt in zip(places, asked, strict=True)
        ]
        mine = [place for row in places for place in row][self.member :: self.engine.tp]
        drawn: dict[Place, Drawn] = {}
        failure = "the engine did not return it"
        self.generation = generation = Generation(len(mine), time.monotonic())
        num_tokens = 0
        try:
            wanted = set(mine)
            for j, k, completion in self.engine.generate(asked, sampling, seeds=seeds):
                num_tokens += completion.num_trained
                place = places[j][k]
                if place in wanted:
                    verdict = self.labeller.submit(asked[j], completion)
                    drawn[place] = Drawn(place, completion, verdict)
                    generation.add(completion, verdict)
        except EngineFailed as error:
            failure = str(error)
            logger.warning(
                "rank %d: the %s engine failed (%s)", self.rank, self.engine.name, failure
            )
        work = EngineWork(time.monotonic() - generation.started, num_tokens)
        early = {
            place: dataclasses.replace(d, early=d.verdict.done()) for place, d in drawn.items()
        }
        return tuple(early.get(place) or _lost(place, failure) for place in mine), work

    def _shared(self, prompts: Sequence[Prompt], drawn: Sequence[Drawn]) -> dict[Place, Rollout]:
        """Every rank's rollouts by place, once the verdicts on those of this rank are there."""
        own = [
            Rollout(
                prompts[d.place[0]],
                *d.place,
                d.completion,
                dataclasses.replace(d.verdict.result(), early=d.early),
            )
            for d in drawn
        ]
        return {(r.group, r.sample): r for r in self.exchange.share(own, prompts)}


def _seed_of_part(seed: int, attempt: int, first: Place, prompt: Prompt) -> int:
    """Seed of the samples of a prompt from `first` on: an engine adds 0, 1, ... to it.

    So those of the first attempt are what they would be if the whole group were drawn at once.
    """
    if attempt:
        return prompt_seed(seed, attempt, first, prompt)
    group, sample = first
    return prompt_seed(seed, 0, (group, 0), prompt) + sample


def permuted_labels(rollouts: Sequence[Rollout], *, seed: int) -> list[Rollout]:
    """The control experiment: the same verdicts, dealt to other rollouts, so that there is nothing to learn."""
    verdicts = [r.verdict for r in rollouts]
    random.Random(seed).shuffle(verdicts)
    return [dataclasses.replace(r, verdict=v) for r, v in zip(rollouts, verdicts, strict=True)]


def without_mismatch(
    rollouts: list[Rollout],
    mismatch: Callable[[Sequence[Rollout]], Sequence[float]],
    *,
    bound: float,
) -> list[Rollout]:
    """Excludes the rollouts whose mean |log-prob difference| of trainer and engine (nats) is beyond the bound.

    Args:
        mismatch: the trainer's, of each rollout.
    """
    return [
        dataclasses.replace(
            r, verdict=dataclasses.replace(r.verdict, status=Status.MISMATCH, label=EXCLUDED)
        )
        if r.label != EXCLUDED and not m <= bound
        else r
        for r, m in zip(rollouts, mismatch(rollouts), strict=True)
    ]


def _lost(place: Place, reason: str) -> Drawn:
    verdict: Future[Verdict] = Future()
    verdict.set_result(Verdict(Status.LOST, EXCLUDED, None, reason=reason))
    return Drawn(place, _LOST, verdict)
