"""The rollout stage: each rank samples and verifies its share, and every rank learns all facts.

    generate   each engine samples for its share of the prompts; each completion goes to the
               verifier at once
    label      waits for the verdicts that are left, shares the facts of all rollouts, and draws
               again what an engine has lost

The tokens stay on the rank that sampled them until others train on them (parallel/exchange.py).

Shares are equal by the expected length of their answers (spread.py). The samples of a prompt come
from one engine or, where there are fewer prompts than engines, from several. The answers are the
same, because each sample has a seed of its own. An engine is one rank or several neighbouring ones,
which all draw its completions and share the verifying.

A completion that is lost is drawn again on another engine. One that is lost every time is excluded
and counted.
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_real.labels import Labeller
from megatron_real.parallel.exchange import Exchange
from megatron_real.records import EXCLUDED, Completion, Prompt, Rollout, Sampling, Status, Verdict
from megatron_real.rollout.engines.engine import Engine, EngineFailed
from megatron_real.rollout.spread import ExpectedLengths, prompt_seed, samples_together, spread

logger = logging.getLogger(__name__)

Place = tuple[int, int]
"""(group, sample) of a completion: the index of its prompt, and its own within the group."""

_LOST = Completion((), (), "", finished=False)


@dataclass(frozen=True)
class Drawn:
    """One completion on its way to a verdict."""

    place: Place
    """Its group and sample."""
    completion: Completion
    """What the engine sampled."""
    verdict: Future[Verdict]
    """The verdict, which the verifier may not have reached yet."""
    early: bool = False
    """Whether the verdict was there before the engine had finished its last completion."""


@dataclass
class Generation:
    """How far this rank is with its share of completions, for people who watch."""

    wanted: int
    """Number of completions of this rank's share."""
    started: float
    """When it began, on the clock of time.monotonic()."""
    done: int = 0
    """Number of completions so far."""
    tokens: int = 0
    """Number of their response tokens."""
    longest: int = 0
    """Number of tokens of the longest of them."""
    verdicts: list[Future[Verdict]] = field(default_factory=list)
    """The verdicts of the completions so far, present or to come."""

    def add(self, completion: Completion, verdict: Future[Verdict]) -> None:
        """Counts a completion that was given to the verifier."""
        length = completion.num_trained
        self.done += 1
        self.tokens += length
        self.longest = max(self.longest, length)
        self.verdicts.append(verdict)

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        # A copy: another thread may add to the list meanwhile.
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
    """Seed of the draw, the same on every rank."""
    engine_of: dict[Place, int]
    """The engine that draws each completion, of all ranks' completions."""
    drawn: tuple[Drawn, ...]
    """This rank's completions, in order of place.

    What the engine has lost is an empty completion with the verdict `lost`.
    """
    work: EngineWork = EngineWork()
    """What they took."""


class RolloutStage:
    """Turns prompts into labelled rollouts.

    Every rank gets the same list, but for the tokens that other ranks hold. Every rank samples,
    whatever its place in the training layout: the engines are whole copies of the model, so no rank
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
            engine: samples the completions.
            labeller: judges them.
            rank: this rank.
            world: number of ranks.
            retries: how often a lost completion is drawn again, each time by the next engine.
            exchange: between all ranks; None where the default process group is gloo.
        """
        self.engine = engine
        self.labeller = labeller
        self.rank = rank
        self.world = world
        self.retries = retries
        self.exchange = exchange or Exchange(rank, world)
        self.engines = world // engine.tp
        # This rank's engine, and its number among the ranks of that engine.
        self.index, self.member = divmod(rank, engine.tp)
        self.lengths = ExpectedLengths()
        self.generation: Generation | None = None
        """Progress of this rank's present share, or of its last one."""
        self.work = EngineWork()
        """Work of the draws that were labelled since `take_work`."""

    def take_work(self) -> dict[str, float]:
        """Returns `work` as plain numbers, and begins anew.

        It is {} on all ranks of an engine but its first.
        """
        work, self.work = self.work, EngineWork()
        return dataclasses.asdict(work) if self.member == 0 else {}

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> Sampled:
        """Samples this rank's share, and gives each completion to the verifier as it finishes.

        It waits for no verdict and for no other rank.
        """
        # A part is what one engine draws of one prompt: the whole group where prompts abound.
        num_samples = sampling.num_samples
        together = samples_together(len(prompts), num_samples, self.engines)
        parts: list[list[Place]] = []
        for i in range(len(prompts)):
            for first in range(0, num_samples, together):
                parts.append([(i, k) for k in range(first, first + together)])

        # Every rank knows the same lengths, so all of them deal out the same shares.
        costs = self.lengths.costs([prompts[part[0][0]] for part in parts], together)
        shares = spread(costs, self.engines)
        engine_of: dict[Place, int] = {}
        for engine, share in enumerate(shares):
            for p in share:
                engine_of |= dict.fromkeys(parts[p], engine)

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
        """Waits for the verdicts and returns every rank's labelled rollouts, in order of place.

        The tokens stay where they are. Collective over all ranks.

        Args:
            prompts: the prompts that were sampled, the same on every rank.
            sampled: this rank's share.
            before_retry: called on every rank before lost completions are drawn again; it may bring
                engines back.

        Raises:
            TooManyFailedChecks, RewardNeedsThreshold: see `Labeller`; on every rank alike.
        """
        self.work += sampled.work
        known = self._shared(prompts, sampled.drawn)
        once = dataclasses.replace(sampled.sampling, num_samples=1)
        for attempt in range(1, self.retries + 1):
            lost = sorted(place for place, r in known.items() if r.verdict.status == Status.LOST)
            if not lost:
                break
            before_retry()
            own = [
                [place]
                for place in lost
                if (sampled.engine_of[place] + attempt) % self.engines == self.index
            ]
            again, work = self._draw(prompts, own, once, sampled.seed, attempt=attempt)
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
        """Samples completions and gives each one to the verifier as it finishes.

        Args:
            prompts: all prompts of the draw.
            places: what this rank's engine draws: a row for each request, of samples of one prompt.
            sampling: with as many samples as a row has.
            seed: seed of the draw.
            attempt: how often the completions were lost before.

        Returns:
            This rank's part of the engine's completions. Where an engine is several ranks, all of
            them sample all its completions, and each one verifies and returns a part of them.
        """
        row_prompts = [prompts[row[0][0]] for row in places]
        seeds = [
            _seed_of_part(seed, attempt, row[0], prompt)
            for row, prompt in zip(places, row_prompts, strict=True)
        ]
        engine_places = [place for row in places for place in row]
        own = engine_places[self.member :: self.engine.tp]
        wanted = set(own)

        drawn: dict[Place, Drawn] = {}
        failure = "the engine did not return it"
        generation = Generation(len(own), time.monotonic())
        self.generation = generation
        num_tokens = 0
        try:
            for j, k, completion in self.engine.generate(row_prompts, sampling, seeds=seeds):
                num_tokens += completion.num_trained
                place = places[j][k]
                if place in wanted:
                    verdict = self.labeller.submit(row_prompts[j], completion)
                    drawn[place] = Drawn(place, completion, verdict)
                    generation.add(completion, verdict)
        except EngineFailed as error:
            failure = str(error)
            logger.warning(
                "rank %d: the %s engine failed (%s)", self.rank, self.engine.name, failure
            )
        work = EngineWork(time.monotonic() - generation.started, num_tokens)

        completions = []
        for place in own:
            if place in drawn:
                early = drawn[place].verdict.done()
                completions.append(dataclasses.replace(drawn[place], early=early))
            else:
                completions.append(_lost(place, failure))
        return tuple(completions), work

    def _shared(self, prompts: Sequence[Prompt], drawn: Sequence[Drawn]) -> dict[Place, Rollout]:
        """Waits for the verdicts of this rank and returns every rank's rollouts by place."""
        own = []
        for d in drawn:
            group, sample = d.place
            verdict = dataclasses.replace(d.verdict.result(), early=d.early)
            own.append(Rollout(prompts[group], group, sample, d.completion, verdict))
        return {(r.group, r.sample): r for r in self.exchange.share(own, prompts)}


def _seed_of_part(seed: int, attempt: int, first: Place, prompt: Prompt) -> int:
    """Returns the seed of a prompt's samples from `first` on, to which an engine adds 0, 1, ..."""
    if attempt:
        return prompt_seed(seed, attempt, first, prompt)
    # At the first attempt each sample gets the seed that it would get if the whole group were drawn
    # at once: answers do not depend on the number of engines.
    group, sample = first
    return prompt_seed(seed, 0, (group, 0), prompt) + sample


def permuted_labels(rollouts: Sequence[Rollout], *, seed: int) -> list[Rollout]:
    """Deals the same verdicts to other rollouts: a control experiment with nothing to learn."""
    verdicts = [r.verdict for r in rollouts]
    random.Random(seed).shuffle(verdicts)
    return [dataclasses.replace(r, verdict=v) for r, v in zip(rollouts, verdicts, strict=True)]


def without_mismatch(
    rollouts: list[Rollout],
    mismatch: Callable[[Sequence[Rollout]], Sequence[float]],
    *,
    bound: float,
) -> list[Rollout]:
    """Excludes the rollouts whose mismatch of trainer and engine is beyond a bound.

    Args:
        rollouts: labelled rollouts.
        mismatch: returns the mean |log-prob difference| (nats) of each rollout.
        bound: the largest mismatch (nats) with which a rollout is kept.
    """
    checked = []
    for rollout, difference in zip(rollouts, mismatch(rollouts), strict=True):
        # `not <=` rather than `>`: a mismatch that is NaN is excluded, too.
        if rollout.label != EXCLUDED and not difference <= bound:
            verdict = dataclasses.replace(rollout.verdict, status=Status.MISMATCH, label=EXCLUDED)
            rollout = dataclasses.replace(rollout, verdict=verdict)
        checked.append(rollout)
    return checked


def _lost(place: Place, reason: str) -> Drawn:
    """Returns a completion that the engine has lost, with its verdict."""
    verdict: Future[Verdict] = Future()
    verdict.set_result(Verdict(Status.LOST, EXCLUDED, None, reason=reason))
    return Drawn(place, _LOST, verdict)
