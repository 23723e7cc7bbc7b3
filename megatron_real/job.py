"""What the loop drives, built once from the configuration. Whatever is wrong fails here, before the first step."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from megatron_real.config import Config, LabelConfig, check_world
from megatron_real.labels import Labeller
from megatron_real.policy.layout import join_world, set_up
from megatron_real.policy.policy import Policy
from megatron_real.policy.snapshot import Snapshot
from megatron_real.prompts import PromptCursor, load_prompts
from megatron_real.records import Prompt, Sampling
from megatron_real.rollout import RolloutStage, build_engine
from megatron_real.rollout.ahead import Ahead
from megatron_real.rollout.sync import WeightSync
from megatron_real.runs import checkpoint
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.lifeline import Lifeline
from megatron_real.runs.lock import RunLock
from megatron_real.runs.ranks import EveryRankError, Ranks
from megatron_real.runs.reporter import Reporter
from megatron_real.runs.stop import StopRequest
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.conversion import open_megatron
from megatron_real.weights.hf import HfWeights
from megatron_real.weights.mapping import Weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """The parts of a job that generate; a replay has none of them."""

    stage: RolloutStage
    """Engine and verifier."""
    sync: WeightSync
    """Brings the policy's weights into the engine."""
    cursor: PromptCursor
    """Training prompts, in order."""
    sampling: Sampling
    """How training rollouts are drawn."""
    ahead: Ahead
    """Rollouts of the next step, where they may lag behind."""
    heldout: list[Prompt]
    """Problems of the evaluation; empty without one."""
    heldout_sampling: Sampling
    """How answers to them are drawn."""


@dataclass(frozen=True)
class Job:
    """One training job on this rank."""

    config: Config
    """The whole configuration."""
    weights: Weights
    """The weights that training starts from."""
    policy: Policy
    """Model and optimizer."""
    reporter: Reporter
    """Everything that is written and shown."""
    generation: Generation | None
    """None when saved rollouts are replayed."""
    checkpoints: checkpoint.Checkpoints
    """Saves the run, and knows where it begins."""
    ranks: Ranks
    """All processes of the job."""
    lifeline: Lifeline
    """Ends this rank when another one has ended, and the others when this one has."""
    snapshot: Snapshot | None
    """The weights that the engine got last, where rollouts may lag behind."""

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """An error that nobody expected takes the other ranks down by its name; a good end takes nobody down."""
        if error is not None and kind is not None:
            self.lifeline.say_end(f"{kind.__name__}: {error}")
            self.reporter.say_status("crashed", f"{kind.__name__}: {error}")
        self.lifeline.close()

    def generating_weights(self, lag: float) -> AbstractContextManager[None]:
        """Within, the policy has the weights that generated rollouts of so many steps before."""
        return self.snapshot.swapped_in() if lag and self.snapshot is not None else nullcontext()

    def seed(self, step: int, draw: int = 0, first: int = 0) -> int:
        """Seed of a step's sampling: the run's seed, the step, the draw and the chunk's first prompt determine it."""
        return self.config.trainer.seed * 1_000_003 + step + (draw << 40) + (first << 48)


def build(config: Config, stop: StopRequest) -> Job:
    """Joins the other processes and builds this rank's part; `stop` may ask it to stop early.

    Raises:
        ValueError: weights, data or layout do not fit, or the run directory is in use; one sentence.
    """
    join_world(config.trainer.timeout_minutes)
    rank, world = dist.get_rank(), dist.get_world_size()
    check_world(config, world)
    ranks = Ranks.of_all(timedelta(minutes=config.trainer.timeout_minutes))
    directory = RunDirectory(config.trainer.run_dir)
    lock = RunLock(directory.lock)
    ranks.on_first(lambda: lock.take(logger.warning), EveryRankError)
    if ranks.first:
        atexit.register(lock.release)  # however this rank ends, if it ends by itself
    found = checkpoint.find(directory, ranks, logger.warning)
    reporter = ranks.together(
        lambda: Reporter(
            config,
            rank=rank,
            world=world,
            resumed_after=found.position.step if found else None,
            gathered=ranks.gathered,
        )
    )
    lifeline = Lifeline(
        rank,
        world,
        share=ranks.shared,
        stage=reporter.progress.at,
        hang_seconds=config.trainer.hang_minutes * 60,
    )
    reporter.progress.say(f"model {config.model.path} on {world} processes")
    architecture = Architecture.read(config.model.path)
    start = config.model.weights
    weights = open_megatron(Path(start), architecture) if start else HfWeights(config.model.path)
    updates = config.trainer.steps * (config.rollout.num_prompts // config.batch.minibatch_prompts)
    policy = Policy(config, architecture, set_up(config.parallel, seed=config.trainer.seed), num_updates=updates)
    policy.load(weights)
    replay, say = config.rollout.replay, reporter.progress.say
    generation = None if replay else _generation(config, architecture, say=say, rank=rank, world=world)
    drawing: dict[str, checkpoint.Stateful] = (
        {"cursor": generation.cursor, "lengths": generation.stage.lengths} if generation else {}
    )
    checkpoints = checkpoint.Checkpoints(config, policy, reporter, drawing, ranks, stop)
    checkpoints.resume(found)
    if found and config.rollout.max_lag:
        say("rollouts are not ahead yet: this life's first ones are of the present weights")
    snapshot = Snapshot(policy) if config.rollout.max_lag else None
    return Job(config, weights, policy, reporter, generation, checkpoints, ranks, lifeline, snapshot)


def _generation(
    config: Config, architecture: Architecture, *, say: Callable[[str], None], rank: int, world: int
) -> Generation:
    engine, data = build_engine(config, say=say), config.data
    train = load_prompts(data.train, engine.tokenizer, suffix=data.suffix, max_tokens=data.max_prompt_tokens)
    heldout = (
        load_prompts(data.heldout, engine.tokenizer, suffix=data.suffix, max_tokens=data.max_prompt_tokens)
        if data.heldout
        else []
    )
    chosen, evaluation = config.rollout, config.evaluation
    stage = RolloutStage(engine, build_labeller(config.labels), rank=rank, world=world, retries=chosen.retries)
    sampling = Sampling(chosen.group_size, chosen.temperature, chosen.max_response_tokens, chosen.top_p, chosen.top_k)
    return Generation(
        stage=stage,
        sync=WeightSync(engine, chosen.sync, tied=architecture.tied, probe=train[0], temperature=chosen.temperature),
        cursor=PromptCursor(train, seed=config.trainer.seed, shuffle=data.shuffle),
        sampling=sampling,
        ahead=Ahead(stage, sampling),
        heldout=heldout[: evaluation.max_problems or None],
        heldout_sampling=Sampling(
            evaluation.samples, evaluation.temperature, chosen.max_response_tokens, evaluation.top_p
        ),
    )


def build_labeller(labels: LabelConfig) -> Labeller:
    """The verifier processes that the configuration asks for."""
    return Labeller(
        labels.verifier,
        workers=labels.workers,
        timeout_seconds=labels.timeout_seconds,
        memory_mib=labels.memory_mib,
        require_think=labels.require_think,
        require_boxed=labels.require_boxed,
        excluded=labels.excluded,
        overlong=labels.overlong,
        threshold=labels.threshold,
        max_failed_share=labels.max_failed_share,
    )
