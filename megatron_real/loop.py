"""Algorithm 1 of REAL, and the map of this project: each line of `train` is a stage, each stage a package.

    prompts -> rollouts -> labels -> batches, old log-probs -> updates -> metrics, rollouts on disk -> evaluation
       ^                                                          |
       +---------------------- weights to the engine <------------+

    stage           consumes                    produces                  waits for
    sync            the policy's weights        the engine's weights      all ranks, tensor by tensor
    rollout         prompts                     completions               its own rank only
    label           completions                 rollouts on every rank    the slowest rank's verifier
    old_logprobs    rollouts                    packed batches            the pipeline
    update          one batch at a time         new weights               all ranks, once per update
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from megatron_real.config import Config
from megatron_real.policy.policy import Update
from megatron_real.records import Rollout
from megatron_real.stages import Stages

logger = logging.getLogger(__name__)


class NonFinite(RuntimeError):
    """Too many updates in a row had a loss or gradient that was not finite."""


def train(config: Config) -> None:
    """Trains a policy by REAL. Run by every process of the job."""
    stages = Stages(config)
    with stages.progress:
        _evaluate(stages, step=0)
        for step in range(1, config.trainer.steps + 1):
            with stages.profiled(step):
                rollouts = stages.replayed(step) if config.rollout.replay else _rollouts(stages, step)
                stages.keep_rollouts(step, rollouts)
                updates = _updates(stages, step, rollouts)
                stages.report(step, rollouts, updates)
            if config.evaluation.every and step % config.evaluation.every == 0 or step == config.trainer.steps:
                _evaluate(stages, step)
        stages.finish()


def _rollouts(stages: Stages, step: int) -> list[Rollout]:
    prompts = stages.cursor.next_batch(stages.config.rollout.num_prompts)
    with stages.timed("sync"):
        stages.engine.prepare_for_inference(stages.policy.stream())
    with stages.timed("rollout"):
        sampled = stages.rollout.generate(prompts, stages.training_sampling, seed=stages.seed(step))
    with stages.timed("label"):
        rollouts = stages.rollout.label(prompts, sampled)
    stages.engine.finish_inference()
    return stages.permuted(step, rollouts) if stages.config.labels.permute else rollouts


def _updates(stages: Stages, step: int, rollouts: Sequence[Rollout]) -> list[Update]:
    with stages.timed("old_logprobs"):
        batches = stages.policy.prepare(rollouts)
    updates = []
    with stages.timed("update"):
        for batch in batches:
            updates.append(stages.policy.update(batch))
    return updates
