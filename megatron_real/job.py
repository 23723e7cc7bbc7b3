"""What the loop drives, built once from the configuration. Whatever is wrong fails here, before the first step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from megatron_real.config import Config, check_world
from megatron_real.labels import Labeller
from megatron_real.policy.layout import join_world, set_up
from megatron_real.policy.policy import Policy
from megatron_real.prompts import PromptCursor, load_prompts
from megatron_real.records import Prompt, Sampling
from megatron_real.rollout import RolloutStage, build_engine
from megatron_real.rollout.sync import WeightSync
from megatron_real.runs.reporter import Reporter
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.hf import HfWeights


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
    heldout: list[Prompt]
    """Problems of the evaluation; empty without one."""
    heldout_sampling: Sampling
    """How answers to them are drawn."""


@dataclass(frozen=True)
class Job:
    """One training job on this rank."""

    config: Config
    """The whole configuration."""
    weights: HfWeights
    """The weights that training starts from."""
    policy: Policy
    """Model and optimizer."""
    reporter: Reporter
    """Everything that is written and shown."""
    generation: Generation | None
    """None when saved rollouts are replayed."""

    def seed(self, step: int) -> int:
        """Seed of a step's sampling: it depends on the run's seed and the step alone."""
        return self.config.trainer.seed * 1_000_003 + step


def build(config: Config) -> Job:
    """Joins the other processes and builds this rank's part.

    Raises:
        ValueError: weights, data or layout do not fit; one sentence.
    """
    join_world(config.trainer.timeout_minutes)
    rank, world = dist.get_rank(), dist.get_world_size()
    check_world(config, world)
    reporter = Reporter(config, rank=rank, world=world)
    reporter.progress.say(f"model {config.model.path} on {world} processes")
    architecture, weights = Architecture.read(config.model.path), HfWeights(config.model.path)
    updates = config.trainer.steps * (config.rollout.num_prompts // config.batch.minibatch_prompts)
    policy = Policy(config, architecture, set_up(config.parallel, seed=config.trainer.seed), num_updates=updates)
    policy.load(weights)
    generation = (
        None
        if config.rollout.replay
        else _generation(config, architecture, say=reporter.progress.say, rank=rank, world=world)
    )
    return Job(config, weights, policy, reporter, generation)


def _generation(
    config: Config, architecture: Architecture, *, say: Callable[[str], None], rank: int, world: int
) -> Generation:
    engine, data, labels = build_engine(config, say=say), config.data, config.labels
    train = load_prompts(data.train, engine.tokenizer, suffix=data.suffix, max_tokens=data.max_prompt_tokens)
    heldout = (
        load_prompts(data.heldout, engine.tokenizer, suffix=data.suffix, max_tokens=data.max_prompt_tokens)
        if data.heldout
        else []
    )
    labeller = Labeller(
        labels.verifier,
        workers=labels.workers,
        timeout_seconds=labels.timeout_seconds,
        memory_mib=labels.memory_mib,
        overlong=labels.overlong,
        threshold=labels.threshold,
        max_failed_share=labels.max_failed_share,
    )
    chosen, evaluation = config.rollout, config.evaluation
    return Generation(
        stage=RolloutStage(engine, labeller, rank=rank, world=world),
        sync=WeightSync(
            engine,
            config.rollout.sync,
            tied=architecture.tied,
            probe=train[0],
            temperature=config.rollout.temperature,
        ),
        cursor=PromptCursor(train, seed=config.trainer.seed, shuffle=data.shuffle),
        sampling=Sampling(
            chosen.group_size, chosen.temperature, chosen.max_response_tokens, chosen.top_p, chosen.top_k
        ),
        heldout=heldout[: evaluation.max_problems or None],
        heldout_sampling=Sampling(
            evaluation.samples, evaluation.temperature, chosen.max_response_tokens, evaluation.top_p
        ),
    )
