"""Algorithm 1 of REAL, and the map of this project: each stage of `train` is a package.

prompts -> rollouts -> labels -> batches, old log-probs -> updates -> metrics on disk -> evaluation -> checkpoint
   ^                                                          |
   +---------------------- weights to the engine <------------+

stage           consumes                  produces                  waits for
sync            the policy's weights      the engine's weights      all ranks, tensor by tensor
rollout         prompts                   completions, in verifying its own rank only
label           completions               rollouts on every rank    the slowest rank's verifier
old_logprobs    rollouts                  packed batches            the pipeline
update          one batch at a time       new weights               all ranks, once per update
checkpoint      everything                a copy that a thread      the copy, not the disk
                                          writes

A run may stop at the seams of its stages, and the same command goes on from there; see runs/checkpoint.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_real.evaluate import evaluate
from megatron_real.job import Generation, Job
from megatron_real.policy.policy import Update
from megatron_real.policy.state import prepare
from megatron_real.policy.train_step import Batch
from megatron_real.records import Prompt, Rollout
from megatron_real.rollout.refill import refill
from megatron_real.rollout.stage import permuted_labels, without_mismatch
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import read_rollouts
from megatron_real.runs.sampling import Draws
from megatron_real.runs.saved import Position
from megatron_real.runs.training import summary
from megatron_real.weights.stream import write_hf


class NonFinite(RuntimeError):
    """Too many updates in a row had a loss or gradient that was not finite."""


def train(job: Job) -> None:
    """Trains the policy by REAL. Every process of the job runs this together."""
    config, reporter, checkpoints = job.config, job.reporter, job.checkpoints
    with reporter.progress:
        if checkpoints.position == Position(0):
            _evaluate(job, step=0)
        for step in range(checkpoints.position.step + 1, config.trainer.steps + 1):
            with reporter.step(step):
                rollouts, lag = _rollouts(job, step)
                batches, updates = _updates(job, rollouts, lag)
                reporter.trained(step, rollouts, summary(job.policy, batches, updates, lag=lag))
                _stop_if_not_finite(job, step, batches, updates)
            due = step == config.trainer.steps or (config.evaluation.every and step % config.evaluation.every == 0)
            checkpoints.step_done(step, accuracy=_evaluate(job, step) if due else None)
        checkpoints.close()
        if config.trainer.export:
            _export(job)
        reporter.finish()


def _rollouts(job: Job, step: int) -> tuple[list[Rollout], float]:
    """The step's labelled rollouts, the same on every rank, newly sampled or a saved run's; the steps that they lag."""
    if job.generation is None:
        saved = read_rollouts(RunDirectory(job.config.rollout.replay).rollouts(step))
        return sorted(saved, key=lambda r: (r.group, r.sample)), 0.0
    generation, chosen, timed = job.generation, job.config.rollout, job.reporter.progress.stage

    def sample(prompts: Sequence[Prompt], draw: int, first: int) -> list[Rollout]:
        rollouts = generation.ahead.take(prompts)
        if rollouts is None:
            with timed("rollout"):
                sampled = generation.stage.generate(prompts, generation.sampling, seed=job.seed(step, draw, first))
            with timed("label"):
                rollouts = generation.stage.label(prompts, sampled)
        if chosen.exclude_mismatch is None:
            return rollouts
        with timed("mismatch"), job.generating_weights(lag):
            return without_mismatch(rollouts, job.policy.mismatch, bound=chosen.exclude_mismatch)

    lag = _sync(job, generation)
    reuse = not chosen.max_lag or job.checkpoints.position.update > 0
    cursor, lengths, seam = generation.cursor, generation.stage.lengths, job.checkpoints.seam
    draws = Draws(step, cursor, lengths, sample, chosen.chunk_prompts, reuse, job.reporter, job.ranks, seam)
    rollouts = refill(draws.draw(chosen.num_prompts, 0), rounds=chosen.refill_rounds, draw=draws.draw)
    if chosen.max_lag and step < job.config.trainer.steps:
        generation.ahead.begin(cursor.peek(chosen.num_prompts), seed=job.seed(step + 1))
    generation.stage.engine.finish_inference()
    job.policy.take_room_back()
    return permuted_labels(rollouts, seed=job.seed(step)) if job.config.labels.permute else rollouts, lag


def _sync(job: Job, generation: Generation) -> float:
    """Brings the weights to the engine once the rollouts that it makes ahead are there; the steps that those lag."""
    with job.reporter.progress.stage("rollout"):
        ahead = generation.ahead.settle()
    with job.reporter.progress.stage("sync"):
        job.policy.make_room()
        generation.sync.run(job.policy.stream(), job.policy.mismatch)
    return float(ahead)


def _updates(job: Job, rollouts: Sequence[Rollout], lag: float) -> tuple[list[Batch], list[Update]]:
    timed = job.reporter.progress.stage
    with timed("old_logprobs"):
        with job.generating_weights(lag):
            batches, updates = prepare(job.policy, rollouts, job.checkpoints.take_begun(), lagging=lag > 0)
        if job.snapshot is not None:
            job.snapshot.take()  # the engine has these weights, and generates the next step's rollouts with them
    while len(updates) < len(batches):
        with timed("update"):
            updates.append(job.policy.update(batches[len(updates)]))
        if len(updates) < len(batches):
            job.checkpoints.seam(batches, updates)
    return batches, updates


def _stop_if_not_finite(job: Job, step: int, batches: Sequence[Batch], updates: Sequence[Update]) -> None:
    for number, (batch, update) in enumerate(zip(batches, updates, strict=True), 1):
        if update.skipped:
            job.reporter.skipped(step, number, batch.minibatch.rollouts)
        if update.skipped_in_a_row >= job.config.trainer.max_skipped_updates:
            raise NonFinite(
                f"{update.skipped_in_a_row} updates in a row had a loss or gradient that was not finite; their batches "
                f"are in {job.reporter.directory.dumps}, each a directory for rollout.replay; try a lower optimizer.lr"
            )


def _evaluate(job: Job, step: int) -> float | None:
    """pass@1 on the held-out problems; None where there are none."""
    generation = job.generation
    if generation is None or not generation.heldout:
        return None
    _sync(job, generation)
    with job.reporter.progress.stage("evaluation"):
        seed = job.seed(0)  # the same draws at every evaluation: differences are the policy's
        result = evaluate(generation.stage, generation.heldout, generation.heldout_sampling, seed=seed)
        generation.stage.engine.finish_inference()
    job.policy.take_room_back()
    job.reporter.evaluated(step, result)
    return result.pass_at_1


def _export(job: Job) -> None:
    """Writes the weights as an HF directory, in the dtype of the weights that training started from."""
    stream, path = job.policy.stream(), job.config.model.path
    if job.reporter.first:
        write_hf(job.reporter.directory.weights, stream, source=path, dtype=job.weights.dtype)
    else:
        for _ in stream:  # the stream is collective: every rank takes part in every tensor
            pass
