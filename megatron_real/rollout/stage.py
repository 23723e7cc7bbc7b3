"""The rollout stage: each rank samples and verifies its share, and every rank learns all facts.

    generate   each engine samples for its share of the prompts; each completion goes to the
               verifier at once
    label      waits for the verdicts that are left, shares the facts of all rollouts, and draws
               again what an engine has lost

The tokens stay on the rank that sampled them until others train on them (parallel/exchange.py).

Shares are equal by the expected length of their answers (spread.py). The samples of a prompt come
from one engine or, where there are fewer prompts than engines, from several. The answers are the
same, because each sample has a seed of its own. An engine is one rank or several neighbouring ones,
which all draw its completions and share the verifying. What waits for an engine because others are
decoded first is answered by whichever engine has room (backlog.py).

A completion that is lost is drawn again on another engine. One that is lost every time is excluded
and counted.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_real.labels import Labeller
from megatron_real.parallel.exchange import Exchange
from megatron_real.records import EXCLUDED, Completion, Prompt, Rollout, Sampling, Status, Verdict
from megatron_real.rollout.backlog import Backlog
from megatron_real.rollout.engines.engine import Engine, EngineFailed, QueueEngine
from megatron_real.rollout.spread import (
    ExpectedLengths,
    begun_and_waiting,
    prompt_seed,
    samples_together,
    spread,
)

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
    """Number of completions of this rank's share, as far as others have not taken them over."""
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
    taken_over: int = 0
    """Completions that it handed out of other engines' shares."""

    def __add__(self, other: EngineWork) -> EngineWork:
        return EngineWork(
            self.seconds + other.seconds,
            self.tokens + other.tokens,
            self.taken_over + other.taken_over,
        )


@dataclass(frozen=True)
class Sampled:
    """This rank's share of a step's completions."""

    sampling: Sampling
    """How they were drawn."""
    seed: int
    """Seed of the draw, the same on every rank."""
    engine_of: dict[Place, int]
    """The engine whose share each completion is in, of all ranks' completions."""
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
        take_over: bool = False,
    ) -> None:
        """Joins an engine and a verifier.

        Args:
            engine: samples the completions.
            labeller: judges them.
            rank: this rank.
            world: number of ranks.
            retries: how often a lost completion is drawn again, each time by the next engine.
            exchange: between all ranks; None where the default process group is gloo.
            take_over: whether a `QueueEngine` answers prompts that wait for other engines.
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

        self.backlog: Backlog | None = None
        """What waits for an engine; None where each engine keeps to its share."""
        if take_over and self.engines > 1 and isinstance(engine, QueueEngine):
            self.backlog = Backlog(engine, self.index, self.member)

        self.lengths = ExpectedLengths()
        self.generation: Generation | None = None
        """Progress of this rank's present share, or of its last one."""
        self.work = EngineWork()
        """Work of the draws that were labelled since `take_work`."""

    def take_work(self) -> dict[str, float]:
        """Returns `work` as plain numbers, and begins anew.

        It is {} on all ranks of an engine but its first.
        """
        work = self.work
        self.work = EngineWork()
        # All ranks of an engine count the same work.
        if self.member > 0:
            return {}
        return dataclasses.asdict(work)

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

        own = shares[self.index]
        rows: Iterator[int] = iter(own)
        if self.backlog is not None:
            # Parts that hold what the engine decodes together, rounded up.
            at_once = -(-self.backlog.engine.at_once // together)
            begun, waiting = begun_and_waiting(shares, costs, at_once)
            rows = itertools.chain(begun[self.index], self.backlog.begin(waiting))

        sampling_of_part = dataclasses.replace(sampling, num_samples=together)
        drawn, work = self._draw(prompts, parts, sampling_of_part, seed, own=own, rows=rows)
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
        known |= self._never_begun(prompts, sampled, known)

        # Retries go to the engines after the one that lost it, in turn.
        lost_by: dict[Place, int] = {}
        for place, rollout in known.items():
            assert rollout.holder is not None, "sharing says who holds a rollout"
            lost_by[place] = rollout.holder // self.engine.tp

        once = dataclasses.replace(sampled.sampling, num_samples=1)
        for attempt in range(1, self.retries + 1):
            lost = sorted(place for place, r in known.items() if r.verdict.status == Status.LOST)
            if not lost:
                break
            # On all ranks, though most may have lost nothing: bringing an engine back is
            # collective.
            before_retry()
            own = [
                row
                for row, place in enumerate(lost)
                if (lost_by[place] + attempt) % self.engines == self.index
            ]

            again, work = self._draw(
                prompts,
                [[place] for place in lost],
                once,
                sampled.seed,
                own=own,
                rows=iter(own),
                attempt=attempt,
            )
            self.work += work
            # What was lost again stays in here as lost, for the next attempt.
            known |= self._shared(prompts, again)

        rollouts = [known[place] for place in sorted(known)]
        self.labeller.check_failures([rollout.verdict for rollout in rollouts])
        # On every rank alike, so that all deal out the next shares alike.
        self.lengths.learn(rollouts)
        return rollouts

    def _never_begun(
        self, prompts: Sequence[Prompt], sampled: Sampled, known: dict[Place, Rollout]
    ) -> dict[Place, Rollout]:
        """Returns as lost what no engine has begun: all of them have failed before.

        Collective over all ranks.
        """
        never = [place for place in sampled.engine_of if place not in known]
        if not never:
            return {}
        own = [place for place in never if sampled.engine_of[place] == self.index]
        # The ranks of an engine share its completions: no two ranks may report the same place.
        own = own[self.member :: self.engine.tp]
        return self._shared(prompts, [_lost(place, "no engine has begun it") for place in own])

    def _draw(
        self,
        prompts: Sequence[Prompt],
        places: Sequence[Sequence[Place]],
        sampling: Sampling,
        seed: int,
        *,
        own: Sequence[int],
        rows: Iterator[int],
        attempt: int = 0,
    ) -> tuple[tuple[Drawn, ...], EngineWork]:
        """Samples completions and gives each one to the verifier as it finishes.

        Args:
            prompts: all prompts of the draw.
            places: all that is drawn, a row for each request: samples of one prompt.
            sampling: with as many samples as a row has.
            seed: seed of the draw.
            own: indices of the rows of this rank's share.
            rows: indices of the rows that this rank's engine draws, each taken when it is begun.
            attempt: how often the completions were lost before.

        Returns:
            This rank's part of the engine's completions, in order of place. Where an engine is
            several ranks, all of them sample all its completions, and each one verifies and returns
            a part of them.
        """
        tp = self.engine.tp
        wanted = len(range(self.member, len(own) * sampling.num_samples, tp))
        generation = Generation(wanted, time.monotonic())
        self.generation = generation

        # What this rank's engine has begun, and how many completions it had begun before. It grows
        # while the engine generates, perhaps in a thread of the engine's.
        begun: dict[Place, int] = {}

        def begin() -> Iterator[int]:
            for row in rows:
                for place in places[row]:
                    begun[place] = len(begun)
                generation.wanted = max(wanted, len(range(self.member, len(begun), tp)))
                yield row
            # What is left of this rank's share, others have begun.
            generation.wanted = len(range(self.member, len(begun), tp))

        drawn: dict[Place, Drawn] = {}
        failure = "the engine did not return it"
        in_own_share = set(own)
        num_tokens = 0
        num_taken_over = 0
        requests = _Requests(prompts, places, seed, attempt)
        try:
            for row, k, completion in self._completions(requests, sampling, begin()):
                num_tokens += completion.num_trained
                num_taken_over += row not in in_own_share
                place = places[row][k]
                # Completions are dealt in the order in which they were begun, which is the same on
                # all ranks of the engine.
                if begun[place] % tp == self.member:
                    verdict = self.labeller.submit(prompts[place[0]], completion)
                    drawn[place] = Drawn(place, completion, verdict)
                    generation.add(completion, verdict)
        except EngineFailed as error:
            failure = str(error)
            logger.warning(
                "rank %d: the %s engine failed (%s)", self.rank, self.engine.name, failure
            )
        # Early verdicts are looked at below, once generation is over.
        work = EngineWork(time.monotonic() - generation.started, num_tokens, num_taken_over)

        completions = []
        for place, number in sorted(begun.items()):
            if number % tp != self.member:
                continue
            if place in drawn:
                early = drawn[place].verdict.done()
                completions.append(dataclasses.replace(drawn[place], early=early))
            else:
                completions.append(_lost(place, failure))
        return tuple(completions), work

    def _completions(
        self, requests: _Requests, sampling: Sampling, rows: Iterator[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        """Yields (row, sample, completion) of the rows that this rank's engine draws."""
        if self.backlog is not None:
            # All rows, as any of them may become this engine's; `rows` says which do.
            everything = range(len(requests.places))
            prompts, seeds = requests.of(everything)
            yield from self.backlog.engine.generate_as_room(
                prompts, sampling, seeds=seeds, rows=rows
            )
            return

        begun = list(rows)
        prompts, seeds = requests.of(begun)
        for j, k, completion in self.engine.generate(prompts, sampling, seeds=seeds):
            yield begun[j], k, completion

    def _shared(self, prompts: Sequence[Prompt], drawn: Sequence[Drawn]) -> dict[Place, Rollout]:
        """Waits for the verdicts of this rank and returns every rank's rollouts by place."""
        own = []
        for draw in drawn:
            group, sample = draw.place
            verdict = dataclasses.replace(draw.verdict.result(), early=draw.early)
            own.append(Rollout(prompts[group], group, sample, draw.completion, verdict))
        return {(r.group, r.sample): r for r in self.exchange.share(own, prompts)}


@dataclass(frozen=True)
class _Requests:
    """What engines are asked in one draw."""

    prompts: Sequence[Prompt]
    """All prompts of the draw."""
    places: Sequence[Sequence[Place]]
    """A row for each request: samples of one prompt."""
    seed: int
    """Seed of the draw."""
    attempt: int
    """How often the completions were lost before."""

    def of(self, rows: Sequence[int]) -> tuple[list[Prompt], list[int]]:
        """Returns the prompts of these rows, and the seeds of their first samples."""
        prompts = []
        seeds = []
        for row in rows:
            # The engine adds 0, 1, ... to a seed for the further samples of the row.
            group, sample = self.places[row][0]
            prompt = self.prompts[group]

            if self.attempt:
                # Another seed for each attempt, or it would draw the lost answer once more.
                seed = prompt_seed(self.seed, self.attempt, (group, sample), prompt)
            else:
                # At the first attempt each sample gets the seed that it would get if the whole
                # group were drawn at once: answers do not depend on the number of engines.
                seed = prompt_seed(self.seed, 0, (group, 0), prompt) + sample

            prompts.append(prompt)
            seeds.append(seed)
        return prompts, seeds


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
