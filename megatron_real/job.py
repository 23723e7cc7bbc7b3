"""What the loop drives, built once from the configuration.

Whatever is wrong fails here, before the first step.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megatron_real.checkpoint import saver
from megatron_real.config import Config, check_world, too_few_sequences
from megatron_real.config.sources import data_sources
from megatron_real.conversion.convert import open_start
from megatron_real.errors import ExpectedEnd, NothingToDo, Stopped, state_and_reason
from megatron_real.evaluation.figures import Evaluation, evaluate
from megatron_real.labels import Labeller, build_labeller
from megatron_real.parallel.exchange import Exchange
from megatron_real.parallel.groups import join_world, set_up
from megatron_real.parallel.ranks import Ranks
from megatron_real.policy.determinism import allow_only_deterministic
from megatron_real.policy.policy import Policy, PolicySettings
from megatron_real.policy.reference import Reference
from megatron_real.policy.snapshot import Snapshot
from megatron_real.progress import RunProgress
from megatron_real.prompts import PromptCursor
from megatron_real.prompts.cursor import Digests
from megatron_real.prompts.training import heldout_prompts, training_prompts
from megatron_real.records import Prompt, Sampling
from megatron_real.rollout import RolloutStage, build_engine, takes_over
from megatron_real.rollout.sampling import evaluation_sampling, training_sampling
from megatron_real.rollout.source import (
    DrawOptions,
    Fresh,
    Generator,
    OneStepAhead,
    Replay,
    Source,
)
from megatron_real.rollout.sync import WeightSync
from megatron_real.runs.chunks import ChunkFiles, settings_of_rollouts
from megatron_real.runs.claim import Claim, Earlier
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.reporter import Reporter
from megatron_real.runs.saved_steps import SavedSteps
from megatron_real.supervision.lifeline import Lifeline
from megatron_real.supervision.stop import StopRequest
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.mapping import Weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldoutEvaluation:
    """The evaluation on data.heldout, by the engine and the verifier of training."""

    source: Fresh
    """Lends its engine, with the policy's present weights."""
    problems: list[Prompt]
    """What is asked."""
    sampling: Sampling
    """How answers are drawn."""

    def run(self) -> Evaluation:
        """Evaluates the policy as it is now. Collective over all ranks.

        The draws are the same each time: differences are the policy's.
        """
        generator = self.source.generator
        # Training counts its steps from 1, and so none of its draws has this seed.
        seed = self.source.options.draw_seed(0)
        stage = generator.stage
        with self.source.awake(), generator.timed("evaluation"):
            of_training = stage.work
            evaluation = evaluate(stage, self.problems, self.sampling, seed=seed)
            # An evaluation is no part of the step's generating, which `work` counts.
            stage.work = of_training
        return evaluation


@dataclass(frozen=True)
class Job:
    """One training job on this rank."""

    config: Config
    """The whole configuration."""
    weights: Weights
    """The weights that training starts from."""
    policy: Policy
    """Model and optimizer."""
    reference: Reference | None
    """The frozen policy that a KL penalty is measured against; None without one."""
    reporter: Reporter
    """Everything that is written and shown."""
    source: Source
    """Where each step's rollouts come from."""
    labeller: Labeller | None
    """The verifiers of the rollouts; None in a replay, whose rollouts have their labels."""
    evaluation: HeldoutEvaluation | None
    """None without held-out problems, and in a replay, which has no engine."""
    checkpoints: saver.Checkpoints
    """Saves the run, and knows where it begins."""
    ranks: Ranks
    """All processes of the job."""
    lifeline: Lifeline
    """Ends this rank when another one has ended, and the others when this one has."""
    claim: Claim | None
    """The first rank's right to the run directory."""

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends the job on this rank, and says in status.json how.

        An error that nobody expected takes the other ranks down, by its name; a good end takes
        nobody down. An expected error is every rank's: one that does not end by it within a while
        is taken down.
        """
        if self.labeller is not None:
            self.labeller.close()
        cause = ""
        if error is not None:
            state, reason = state_and_reason(error)
            diverged = isinstance(error, ExpectedEnd) and error.diverged
            if not isinstance(error, ExpectedEnd | KeyboardInterrupt):
                # Before the status: where another rank has failed first, this process ends here, by
                # that rank's name.
                self.lifeline.say_end(reason)
            self.reporter.say_status(state, reason, diverged=diverged)
            # All ranks have agreed to stop, and may take their time.
            if not isinstance(error, Stopped):
                cause = reason
        self.lifeline.close(cause)

        # Last: until then no other job may take the run directory.
        if self.claim is not None:
            self.claim.release()


def build(config: Config, stop: StopRequest) -> Job:
    """Joins the other processes and builds this rank's part; `stop` may ask it to stop early.

    Nothing of the run directory changes but its lock before everything is built, loaded and
    checked.

    Raises:
        ValueError: weights, data or layout do not fit, or the run directory is in use; one
            sentence.
        NothingToDo: the run has finished.
    """
    # First: cuBLAS and NCCL read these settings at their first call.
    if config.trainer.deterministic:
        allow_only_deterministic()
    join_world(config.trainer.timeout_minutes)
    check_world(config, dist.get_world_size())
    ranks = Ranks.of_all(timedelta(minutes=config.trainer.timeout_minutes))

    # Before anything else may fail on one rank alone.
    lifeline = Lifeline(
        ranks.rank,
        ranks.world,
        gathered=ranks.gathered,
        hang_seconds=config.trainer.hang_minutes * 60,
    )
    claim = None
    if ranks.first:
        claim = Claim(RunDirectory(config.trainer.run_dir))
        atexit.register(claim.release)  # however this rank ends, if it ends by itself

    try:
        return _build(config, stop, ranks, claim, lifeline)
    except BaseException as error:
        if claim is not None:
            _refuse(claim, error)
        if isinstance(error, NothingToDo):
            lifeline.close()
        elif isinstance(error, ValueError):
            # Every rank refuses the same input, and has a while to come to it.
            lifeline.close(str(error))
        else:
            # An accident, perhaps of this rank alone: the others end by its name.
            lifeline.say_end(f"{type(error).__name__}: {error}")
        raise


def _refuse(claim: Claim, error: BaseException) -> None:
    """Writes into the run directory why a start has ended that has changed nothing else in it."""
    if isinstance(error, NothingToDo):
        # A run that has finished keeps its own status.
        claim.release()
    elif isinstance(error, ValueError):
        claim.refuse(str(error))
    elif isinstance(error, KeyboardInterrupt):
        claim.refuse("interrupted while it started", "stopped")
    else:
        state, reason = state_and_reason(error)
        claim.refuse(reason, state)


def _last_word(claim: Claim, reporter: Reporter) -> Callable[[str], None]:
    """Returns what the first rank calls when another rank's end ends it."""

    def write(sentence: str) -> None:
        reporter.say_status("crashed", sentence)
        if not reporter.begun:
            claim.refuse(sentence, "crashed")

    return write


def _build(
    config: Config, stop: StopRequest, ranks: Ranks, claim: Claim | None, lifeline: Lifeline
) -> Job:
    """Builds this rank's part, in an order in which each check comes before what it protects."""
    directory = RunDirectory(config.trainer.run_dir)
    exchange = Exchange(ranks.rank, ranks.world, ranks.group, ranks_per_node=ranks.per_node)
    # The first rank alone looks for the trackers' packages, and all must refuse with it.
    reporter = ranks.together(
        lambda: Reporter(
            config,
            rank=ranks.rank,
            world=ranks.world,
            gathered=ranks.gathered_by_first,
            exchange=exchange,
        )
    )
    say = reporter.progress.say
    lifeline.stage = reporter.progress.at
    if claim is not None:
        lifeline.before_end = _last_word(claim, reporter)

    # The run directory: what an earlier life has left, and where this one begins.
    def take_over() -> Earlier:
        if claim is None:
            return Earlier()
        return claim.take(logger.warning)

    earlier = ranks.on_first(take_over)
    survey = saver.survey(directory, ranks)
    beginning = saver.beginning_of(config, directory, earlier, survey, ranks)

    # Model and optimizer, with the starting weights.
    processes = f"{ranks.world} processes"
    if ranks.world == 1:
        processes = "1 process"
    say(f"model {config.model.path} in {config.model.dtype} on {processes}")
    architecture, weights = open_start(config.model.path, config.model.weights)
    policy = _policy(config, architecture, weights, exchange, say)

    # The reference, before a checkpoint takes the place of the starting weights.
    reference = None
    objective = policy.settings.objective
    if objective.needs_reference and objective.kl.reference_path:
        _, reference_weights = open_start(objective.kl.reference_path)
        reference = Reference(policy, reference_weights)
    elif objective.needs_reference:
        reference = Reference(policy)

    # Engine and verifiers, which a replay does without.
    drawing = None
    # What a checkpoint keeps beside policy and optimizer.
    stateful: dict[str, saver.Stateful] = {}
    if not config.rollout.replay:
        drawing = _drawing(config, architecture, exchange, ranks, say)
        reporter.progress.detail = _generating(reporter.progress, drawing.stage)
        reporter.engine_work = drawing.stage.take_work
        stateful = {"cursor": drawing.cursor, "lengths": drawing.stage.lengths}

    # The checkpoint's state, over what was built so far.
    checkpoints = saver.Checkpoints(config, policy, reporter, stateful, ranks, stop)
    checkpoints.load(beginning.newest)

    # Where rollouts come from, now that the position in the run is known.
    source: Source
    labeller = None
    evaluation = None
    if drawing is None:
        replayed = SavedSteps(RunDirectory(config.rollout.replay), ranks, exchange)
        source = Replay(replayed.read)
    else:
        source = _source(config, drawing, policy, checkpoints, reporter, ranks)
        labeller = drawing.stage.labeller
        if drawing.heldout:
            evaluation = HeldoutEvaluation(source, drawing.heldout, evaluation_sampling(config))

    # Only now the run directory changes.
    checkpoints.begin(beginning, survey.damaged)
    if beginning.newest and config.rollout.max_lag:
        say("rollouts are not ahead yet: this life's first ones are of the present weights")
    return Job(
        config=config,
        weights=weights,
        policy=policy,
        reference=reference,
        reporter=reporter,
        source=source,
        labeller=labeller,
        evaluation=evaluation,
        checkpoints=checkpoints,
        ranks=ranks,
        lifeline=lifeline,
        claim=claim,
    )


def _policy(
    config: Config,
    architecture: Architecture,
    weights: Weights,
    exchange: Exchange,
    say: Callable[[str], None],
) -> Policy:
    """Builds model and optimizer from the weights that training starts from."""
    too_few = too_few_sequences(config, check_world(config, exchange.world))
    if too_few:
        say(f"WARNING: {too_few}")
    return Policy(
        PolicySettings.of(config),
        architecture,
        weights,
        set_up(
            config.parallel,
            seed=config.trainer.seed,
            timeout_minutes=config.trainer.timeout_minutes,
        ),
        num_updates=config.trainer.steps * config.updates_per_step,
        exchange=exchange,
    )


def _generating(progress: RunProgress, stage: RolloutStage) -> Callable[[], str]:
    """Returns what says how far the rollouts are, in the stages in which they are made."""

    def described() -> str:
        if progress.current not in ("rollout", "label", "evaluation"):
            return ""
        return str(stage.generation or "")

    return described


@dataclass(frozen=True)
class _Drawing:
    """What generating needs and the policy does not."""

    stage: RolloutStage
    """Engine and verifier."""
    sync: WeightSync
    """Brings the policy's weights into the engine."""
    cursor: PromptCursor
    """Training prompts, in order."""
    heldout: list[Prompt]
    """Problems of the evaluation; empty without one."""


@dataclass(frozen=True)
class _Data:
    """The prompts of a run, as every rank needs them."""

    train: list[Prompt]
    """What is trained on."""
    heldout: list[Prompt]
    """What is evaluated."""
    digests: Digests
    """Of the training prompts."""

    @classmethod
    def read(cls, config: Config, tokenizer: Any) -> _Data:
        train = training_prompts(config, tokenizer)
        return cls(train, heldout_prompts(config, tokenizer), Digests.of(train))


def _drawing(
    config: Config,
    architecture: Architecture,
    exchange: Exchange,
    ranks: Ranks,
    say: Callable[[str], None],
) -> _Drawing:
    """Builds engine, prompts and verifiers."""
    say("loading the rollout engine")
    engine = build_engine(config, say=say)

    # Tokenising takes longer than sending the result, and reads the files once for all.
    data = ranks.on_first(lambda: _Data.read(config, engine.tokenizer))
    sources = data_sources(config.data).values()
    verifiers = [source.verifier for source in sources if source.verifier]
    labeller = build_labeller(config.labels, others=verifiers)
    rollout = config.rollout

    return _Drawing(
        stage=RolloutStage(
            engine,
            labeller,
            rank=exchange.rank,
            world=exchange.world,
            retries=rollout.retries,
            exchange=exchange,
            take_over=takes_over(config, engine),
        ),
        sync=WeightSync(
            engine,
            rollout.sync,
            tied=architecture.tied,
            probe=data.train[0],
            temperature=rollout.temperature,
        ),
        cursor=PromptCursor(
            data.train,
            seed=config.trainer.seed,
            shuffle=config.data.shuffle,
            digests=data.digests,
        ),
        # 0 problems at most means all of them.
        heldout=data.heldout[: config.evaluation.max_problems or None],
    )


def _source(
    config: Config,
    drawing: _Drawing,
    policy: Policy,
    checkpoints: saver.Checkpoints,
    reporter: Reporter,
    ranks: Ranks,
) -> Fresh:
    """Returns the rollouts of an engine: by the weights that train on them, or one step before."""
    rollout = config.rollout
    generator = Generator(
        policy,
        drawing.stage,
        drawing.sync,
        timed=reporter.progress.stage,
        check_weights=checkpoints.check_sound,
    )
    options = DrawOptions(
        sampling=training_sampling(config),
        num_prompts=rollout.num_prompts,
        chunk_prompts=rollout.chunk_prompts,
        refill_rounds=rollout.refill_rounds,
        objective=policy.settings.objective,
        exclude_mismatch=rollout.exclude_mismatch,
        permute_labels=config.labels.permute,
        seed=config.trainer.seed,
        settings=settings_of_rollouts(config),
    )

    # A checkpoint within a step: its rollouts are in the chunks' files, and are not drawn again.
    position = checkpoints.position
    begun = None
    if position.update > 0:
        begun = position.step + 1
    chunks = ChunkFiles(reporter.directory, ranks, reporter.progress.say, begun_step=begun)
    if rollout.max_lag:
        return OneStepAhead(
            generator,
            drawing.cursor,
            options,
            chunks,
            seam=checkpoints.seam,
            earlier=Snapshot(policy),
            last_step=config.trainer.steps,
        )

    return Fresh(generator, drawing.cursor, options, chunks, seam=checkpoints.seam)
