"""Where a step's rollouts come from.

They are drawn within the step, drawn one step ahead, or read from a saved run.

    take(step)    weights to the engine -> chunks of prompts -> completions -> verdicts
                  -> mismatch filter -> groups of one class drawn again
                  -> the engine releases its memory

`Fresh` does all of it within the step. `OneStepAhead` lets the engine generate the next step's
rollouts while this one trains (ahead.py draws the timeline): its rollouts lag one step behind,
which no caller needs to know. `Replay` reads the rollouts of an earlier run.

A draw depends on the run's seed, the step, the draw's number and its prompts; not on the layout,
and not on earlier interruptions. A whole chunk is kept on disk: a step that is taken up again draws
the missing chunks only.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy
from torch import Tensor

from megatron_real.objective import Objective
from megatron_real.prompts import PromptCursor
from megatron_real.records import (
    UNKNOWN_VERSION,
    Absent,
    Prompt,
    Rollout,
    Sampling,
)
from megatron_real.rollout.ahead import Ahead
from megatron_real.rollout.engines.engine import EngineFailed
from megatron_real.rollout.origin import (
    Origin,
    WeightsDigest,
    digest_of_answers,
    digest_of_questions,
)
from megatron_real.rollout.refill import refill
from megatron_real.rollout.stage import RolloutStage, permuted_labels, without_mismatch
from megatron_real.rollout.sync import WeightSync

logger = logging.getLogger(__name__)

StageTimer = Callable[[str], AbstractContextManager[None]]
"""Measures the time of a stage, by its name, while it is entered."""


@dataclass(frozen=True)
class StepRollouts:
    """The rollouts of one step."""

    rollouts: list[Rollout]
    """The labelled rollouts, in order of group and sample.

    They are the same on every rank but for the completions that other ranks hold.
    """
    lag: float = 0.0
    """Steps between the weights that generated them and those that the step begins with."""
    generating_weights: Callable[[], AbstractContextManager[None]] = nullcontext
    """Within it the policy has the weights that generated them.

    It is to be entered once, before the step's first update.
    """


class Source(Protocol):
    """Gives one step's rollouts after the other."""

    def take(self, step: int) -> StepRollouts:
        """Returns the rollouts of a step, from 1.

        Collective over all ranks. Steps come in order, each once.
        """


class TrainedPolicy(Protocol):
    """What a source asks of the policy. All of it is collective over all ranks."""

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yields every HF (name, tensor), one at a time."""

    def mismatch(self, rollouts: Sequence[Rollout]) -> Sequence[float]:
        """Returns the mean |log-prob here - in the engine| (nats) of each rollout.

        The log-probs here are those of the present weights.
        """

    def make_room(self) -> None:
        """Frees the memory that generation has no use for."""

    def take_room_back(self) -> None:
        """Undoes `make_room`."""


class EarlierWeights(Protocol):
    """A copy of the policy's weights as they were (policy/snapshot.py)."""

    def take(self) -> None:
        """Copies the weights as they are now."""

    def swapped_in(self) -> AbstractContextManager[None]:
        """Returns a context within which the policy has the copied weights."""


@dataclass(frozen=True)
class ChunkName:
    """Names a part of a run's rollouts."""

    step: int
    """Number of the step, from 1."""
    draw: int
    """0, or the round of refills that it was drawn for."""
    first_prompt: int
    """Position of its first prompt among those of the draw."""


class Chunks(Protocol):
    """Where the rollouts of an unfinished step are kept."""

    def read(
        self, name: ChunkName, prompts: Sequence[Prompt], origin: Origin
    ) -> list[Rollout] | None:
        """Returns the rollouts of a chunk, each held by one rank. Collective over all ranks.

        Returns:
            None where there are none that were drawn under `origin`.
        """

    def write(self, name: ChunkName, origin: Origin, rollouts: Sequence[Rollout]) -> None:
        """Keeps the rollouts of a chunk. Collective over all ranks."""


@dataclass(frozen=True)
class DrawOptions:
    """How a step's rollouts are drawn."""

    sampling: Sampling
    """How the engine samples."""
    num_prompts: int
    """Number of a step's groups."""
    chunk_prompts: int
    """Number of a chunk's prompts; 0: all prompts of a draw."""
    refill_rounds: int
    """Number of rounds in which groups that teach nothing are drawn again."""
    exclude_mismatch: float | None
    """Bound (nats) of a rollout's mismatch; None: no bound."""
    permute_labels: bool
    """Whether the step's verdicts are dealt to other rollouts, as a control experiment."""
    seed: int
    """Seed of the run."""
    settings: Mapping[str, Any]
    """The settings that the rollouts depend on, by name; they become part of their `Origin`."""
    objective: Objective
    """Says which groups teach nothing."""

    def draw_seed(self, step: int, draw: int = 0, first_prompt: int = 0) -> int:
        """Returns the seed of a chunk's sampling."""
        # Chunks on disk know their seed: another formula would make them useless. Seeds of runs lie
        # 1,000,003 apart, more than any run has steps; draw and chunk count in higher bits.
        return self.seed * 1_000_003 + step + (draw << 40) + (first_prompt << 48)


@dataclass(frozen=True)
class Generator:
    """Engine and verifier, and the policy whose weights the engine gets."""

    policy: TrainedPolicy
    """The policy, which nobody trains while the engine is awake."""
    stage: RolloutStage
    """Engine and verifier."""
    sync: WeightSync
    """Brings the weights into the engine."""
    timed: StageTimer
    """Measures how long each stage takes."""
    check_weights: Callable[[], None] = lambda: None
    """Called before each sync; may raise to refuse the weights. Collective over all ranks."""

    @contextmanager
    def awake(self) -> Iterator[str]:
        """Within it the engine has the policy's present weights, and the policy has made room.

        Its value is the digest of the weights.
        """
        with self.timed("sync"):
            self.check_weights()
            self.policy.make_room()
            weights = WeightsDigest(self.policy.stream())
            self.sync.run(weights, self.policy.mismatch)
        # No `finally`: after an error the run ends, and nobody wants the room back.
        yield weights.hexdigest()
        self.stage.engine.finish_inference()
        self.policy.take_room_back()

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        """Returns labelled rollouts of the prompts. Collective over all ranks."""
        with self.timed("rollout"):
            sampled = self.stage.generate(prompts, sampling, seed=seed)
        # What is left of verifying: most verdicts have come while the engine generated.
        with self.timed("label"):
            return self.stage.label(prompts, sampled, self._bring_back)

    def _bring_back(self) -> None:
        """Starts engines again that have ended, and gives them the weights that the others have.

        An engine that cannot be brought back now is left to the next sync.
        """
        try:
            ended = self.stage.engine.revive()
        except EngineFailed as error:  # on every rank alike
            logger.warning("%s; other engines draw what it has lost", error)
            return
        # Every engine is synced again: those that lived on have these weights already, and a sync
        # is one collective of all.
        if ended:
            self.sync.run(self.policy.stream())


class Fresh:
    """Draws a step's rollouts when they are wanted, from the weights that train on them."""

    def __init__(
        self,
        generator: Generator,
        cursor: PromptCursor,
        options: DrawOptions,
        chunks: Chunks,
        *,
        seam: Callable[[], None],
    ) -> None:
        """Joins what a draw needs.

        Args:
            generator: engine, verifier and policy.
            cursor: gives the prompts in order.
            options: how rollouts are drawn.
            chunks: where they are kept until the step is done.
            seam: called after each chunk that was drawn; may end the run by an exception.
        """
        self.generator = generator
        self.cursor = cursor
        self.options = options
        self._chunks = chunks
        self._seam = seam

    def awake(self) -> AbstractContextManager[str]:
        """Lends the engine with the policy's present weights, for example to an evaluation."""
        return self.generator.awake()

    def take(self, step: int) -> StepRollouts:
        """See `Source`."""
        with self.awake() as weights:
            rollouts = self._rollouts(step, weights)
        return StepRollouts(rollouts)

    def _rollouts(self, step: int, weights: str) -> list[Rollout]:
        """Returns the step's rollouts.

        Args:
            step: number of the step, from 1.
            weights: digest of the weights that the engine has.
        """
        options = self.options

        def draw(num_prompts: int, number: int) -> list[Rollout]:
            # A step that is taken up again begins at the same place, so that chunks on disk are
            # of its prompts.
            prompts = self.cursor.next_batch(num_prompts)
            size = options.chunk_prompts or num_prompts
            rollouts: list[Rollout] = []
            for first in range(0, num_prompts, size):
                name = ChunkName(step, number, first)
                # Groups count from 0 within a chunk, which on disk knows no others.
                chunk = self._chunk(name, prompts[first : first + size], weights)
                rollouts += [dataclasses.replace(r, group=first + r.group) for r in chunk]
            return rollouts

        rollouts = refill(
            draw(options.num_prompts, 0),
            options.objective,
            rounds=options.refill_rounds,
            draw=draw,
        )
        # After the refills, which go by the true labels.
        if options.permute_labels:
            return permuted_labels(rollouts, seed=options.draw_seed(step))
        return rollouts

    def _chunk(self, name: ChunkName, prompts: Sequence[Prompt], weights: str) -> list[Rollout]:
        """Returns the chunk's rollouts, from the disk if they are there; groups count from 0."""
        seed = self.options.draw_seed(name.step, name.draw, name.first_prompt)
        origin = Origin(
            weights,
            digest_of_questions(prompts),
            digest_of_answers(prompts),
            seed,
            self.options.settings,
        )
        # Found where an earlier life of the run has drawn it and was stopped within the step.
        kept = self._chunks.read(name, prompts, origin)
        if kept is not None:
            # As if they had been drawn: the shares of the next draw depend on the lengths.
            self.generator.stage.lengths.learn(kept)
            return kept

        rollouts = self._sample(prompts, seed)
        # A version is the number of the step that began with the weights.
        rollouts = sampled_by(rollouts, version=name.step - self._lag)

        if self.options.exclude_mismatch is not None:
            with self.generator.timed("mismatch"), self._generating_weights():
                mismatch = self.generator.policy.mismatch
                bound = self.options.exclude_mismatch
                rollouts = without_mismatch(rollouts, mismatch, bound=bound)

        with self.generator.timed("write"):
            self._chunks.write(name, origin, rollouts)
        # After the write: a run that is stopped here begins its next life with this chunk.
        self._seam()
        return rollouts

    def _sample(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        return self.generator.sample(prompts, self.options.sampling, seed=seed)

    @property
    def _lag(self) -> int:
        """Steps between the weights that generate the present rollouts and the policy's."""
        return 0

    def _generating_weights(self) -> AbstractContextManager[None]:
        """Within it the policy has the weights that generated the present rollouts.

        Here it has them anyway.
        """
        return nullcontext()


class OneStepAhead(Fresh):
    """Draws a step's rollouts while the step before trains, from the weights of that time.

    The first step of each life of the run is drawn as by `Fresh`.
    """

    def __init__(
        self,
        generator: Generator,
        cursor: PromptCursor,
        options: DrawOptions,
        chunks: Chunks,
        *,
        seam: Callable[[], None],
        earlier: EarlierWeights,
        last_step: int,
    ) -> None:
        """Joins what `Fresh` needs and a copy of earlier weights.

        Args:
            generator, cursor, options, chunks, seam: see `Fresh`.
            earlier: the weights that generated a step's rollouts; this class alone fills it.
            last_step: the step after which nothing is drawn ahead.
        """
        super().__init__(generator, cursor, options, chunks, seam=seam)
        self._earlier = earlier
        self._last_step = last_step
        self._ahead = Ahead(generator.stage, options.sampling)
        self._lagging = False
        """Whether the present step's rollouts were drawn ahead."""
        self._generated_by = ""
        """Digest of the weights that generate ahead."""

    @contextmanager
    def awake(self) -> Iterator[str]:
        """Waits until the engine has generated what was begun ahead, and lends it."""
        with self.generator.timed("rollout"):
            self._lagging = self._ahead.settle()
        with self.generator.awake() as weights:
            yield weights

    def take(self, step: int) -> StepRollouts:
        """See `Source`."""
        with self.awake() as weights:
            lagging = self._lagging
            generated_by = weights
            if lagging:
                generated_by = self._generated_by
            rollouts = self._rollouts(step, generated_by)

            # Only now, because refills of this step have taken prompts from the cursor, too.
            if step < self._last_step:
                prompts = self.cursor.peek(self.options.num_prompts)
                self._ahead.begin(prompts, seed=self.options.draw_seed(step + 1))
                self._generated_by = weights
        return StepRollouts(rollouts, float(lagging), partial(self._hand_over, lagging))

    def _sample(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        rollouts = self._ahead.take(prompts)
        if rollouts is None:
            # The first step of a life, or a round of refills: nothing was begun for these prompts.
            return super()._sample(prompts, seed)
        return rollouts

    @property
    def _lag(self) -> int:
        return int(self._lagging)

    def _generating_weights(self) -> AbstractContextManager[None]:
        if self._lagging:
            return self._earlier.swapped_in()
        return super()._generating_weights()

    @contextmanager
    def _hand_over(self, lagging: bool) -> Iterator[None]:
        """Within it the policy has the weights that generated the step's rollouts.

        Afterwards the present weights are kept as the earlier ones: the engine has them, and
        generates the next step's rollouts with them while this step's updates are made.
        """
        generating_weights: AbstractContextManager[None] = nullcontext()
        if lagging:
            generating_weights = self._earlier.swapped_in()
        with generating_weights:
            yield
        # Only now: until here the copy held the weights that this step's rollouts came from.
        self._earlier.take()


class Replay:
    """Reads the rollouts that an earlier run has saved; it needs no engine."""

    def __init__(self, read: Callable[[int], list[Rollout]]) -> None:
        """Takes what reads a step.

        Args:
            read: returns the rollouts of a step, in any order; collective over all ranks.
        """
        self._read = read

    def take(self, step: int) -> StepRollouts:
        """See `Source`."""
        # Files hold them rank by rank, and a replay may run on other ranks than the run did.
        rollouts = sorted(self._read(step), key=lambda r: (r.group, r.sample))
        return StepRollouts(rollouts)


def sampled_by(rollouts: Sequence[Rollout], *, version: int) -> list[Rollout]:
    """Notes on each trained token the version of the weights that sampled it.

    Other tokens get UNKNOWN_VERSION. A completion that is absent here gets its versions on the rank
    that holds it.
    """
    noted = []
    for rollout in rollouts:
        completion = rollout.completion
        if not isinstance(completion, Absent):
            versions = numpy.where(completion.trained, version, UNKNOWN_VERSION)
            completion = dataclasses.replace(completion, weight_version=versions)
            rollout = dataclasses.replace(rollout, completion=completion)
        noted.append(rollout)
    return noted
