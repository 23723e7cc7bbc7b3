"""Algorithm 1 of REAL, and the map of this project: each stage of `train` is a package.

prompts -> rollouts -> labels -> batches, old log-probs -> updates -> rollouts and metrics on disk -> evaluation
   ^                                                          |
   +---------------------- weights to the engine <------------+

stage           consumes                  produces                  waits for
sync            the policy's weights      the engine's weights      all ranks, tensor by tensor
rollout         prompts                   completions, in verifying its own rank only
label           completions               rollouts on every rank    the slowest rank's verifier
old_logprobs    rollouts                  packed batches            the pipeline
update          one batch at a time       new weights               all ranks, once per update
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_real.evaluate import evaluate
from megatron_real.job import Job
from megatron_real.policy.policy import Update
from megatron_real.policy.train_step import Batch
from megatron_real.records import Rollout
from megatron_real.rollout.refill import refill
from megatron_real.rollout.stage import permuted_labels, without_mismatch
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.reporter import Training
from megatron_real.runs.rollouts import read_rollouts
from megatron_real.weights.stream import write_hf


class NonFinite(RuntimeError):
    """Too many updates in a row had a loss or gradient that was not finite."""


def train(job: Job) -> None:
    """Trains the policy by REAL. Every process of the job runs this together."""
    config, reporter = job.config, job.reporter
    with reporter.progress:
        _evaluate(job, step=0)
        for step in range(1, config.trainer.steps + 1):
            with reporter.step(step):
                rollouts = _rollouts(job, step)
                reporter.rollouts(step, rollouts)
                batches, updates = _updates(job, rollouts)
                reporter.trained(step, rollouts, _training(job, rollouts, batches, updates))
                _stop_if_not_finite(job, step, batches, updates)
            if step == config.trainer.steps or (config.evaluation.every and step % config.evaluation.every == 0):
                _evaluate(job, step)
        if config.trainer.export:
            _export(job)
        reporter.finish()


def _rollouts(job: Job, step: int) -> list[Rollout]:
    """The step's labelled rollouts, the same on every rank: newly sampled, or those of a saved run."""
    if job.generation is None:
        saved = read_rollouts(RunDirectory(job.config.rollout.replay).rollouts(step))
        return sorted(saved, key=lambda r: (r.group, r.sample))
    generation, timed = job.generation, job.reporter.progress.stage

    def draw(num_prompts: int, number: int) -> list[Rollout]:
        prompts = generation.cursor.next_batch(num_prompts)
        with timed("rollout"):
            sampled = generation.stage.generate(prompts, generation.sampling, seed=job.seed(step, number))
        with timed("label"):
            return generation.stage.label(prompts, sampled)

    with timed("sync"):
        generation.sync.run(job.policy.stream(), job.policy.mismatch)
    chosen = job.config.rollout
    rollouts = refill(draw(chosen.num_prompts, 0), rounds=chosen.refill_rounds, draw=draw)
    generation.stage.engine.finish_inference()
    rollouts = permuted_labels(rollouts, seed=job.seed(step)) if job.config.labels.permute else rollouts
    with timed("mismatch"):
        return without_mismatch(rollouts, job.policy.mismatch, bound=chosen.exclude_mismatch)


def _updates(job: Job, rollouts: Sequence[Rollout]) -> tuple[list[Batch], list[Update]]:
    timed = job.reporter.progress.stage
    with timed("old_logprobs"):
        batches = job.policy.prepare(rollouts)
    with timed("update"):
        return batches, [job.policy.update(batch) for batch in batches]


def _stop_if_not_finite(job: Job, step: int, batches: Sequence[Batch], updates: Sequence[Update]) -> None:
    for number, (batch, update) in enumerate(zip(batches, updates, strict=True), 1):
        if update.skipped:
            job.reporter.skipped(step, number, batch.minibatch.rollouts)
        if update.skipped_in_a_row >= job.config.trainer.max_skipped_updates:
            raise NonFinite(
                f"{update.skipped_in_a_row} updates in a row had a loss or gradient that was not finite; their batches "
                f"are in {job.reporter.directory.dumps}, each a directory for rollout.replay; try a lower optimizer.lr"
            )


def _evaluate(job: Job, step: int) -> None:
    generation = job.generation
    if generation is None or not generation.heldout:
        return
    with job.reporter.progress.stage("sync"):
        generation.sync.run(job.policy.stream(), job.policy.mismatch)
    with job.reporter.progress.stage("evaluation"):
        seed = job.seed(0)  # the same draws at every evaluation: differences are the policy's
        result = evaluate(generation.stage, generation.heldout, generation.heldout_sampling, seed=seed)
        generation.stage.engine.finish_inference()
    job.reporter.evaluated(step, result)


def _export(job: Job) -> None:
    """Writes the weights as an HF directory, in the dtype of the weights that training started from."""
    stream = job.policy.stream()
    if job.reporter.first:
        path = job.config.model.path
        write_hf(job.reporter.directory.weights, stream, source=path, dtype=job.weights.dtype)
    else:
        for _ in stream:  # the stream is collective: every rank takes part in every tensor
            pass


def _training(job: Job, rollouts: Sequence[Rollout], batches: Sequence[Batch], updates: Sequence[Update]) -> Training:
    """The step's updates in plain numbers. Collective over all ranks."""
    stats = job.policy.token_stats(batches)
    kept = [batch.minibatch.rollouts[i].num_tokens for batch in batches for i in batch.minibatch.kept]
    weights = [update.gradient.weight_R for update in updates]
    return Training(
        losses=[update.gradient.loss for update in updates],
        scores=[s for batch, update in zip(batches, updates, strict=True) for s in _scores(batch, update)],
        weights=[w for weight_R in weights for w in weight_R.tolist()],
        max_abs_weight_tau=max(
            float(weight_R.abs().max()) * batch.minibatch.num_groups * job.config.objective.tau
            for weight_R, batch in zip(weights, batches, strict=True)
        ),
        grad_norms=[update.grad_norm for update in updates],
        lr=updates[-1].lr,
        skipped=[i for i, update in enumerate(updates, 1) if update.skipped],
        token_means=stats.means(),
        tokens=sum(kept),
        flops=sum(3 * n * job.policy.architecture.flops_per_token(n / 2) for n in kept),
    )


def _scores(batch: Batch, update: Update) -> list[float]:
    """[R] scores of the minibatch's rollouts in order, NaN for those that were not computed."""
    scores = [math.nan] * len(batch.minibatch.rollouts)
    for i in batch.minibatch.kept:
        scores[i] = float(update.gradient.score_R[i])
    return scores
