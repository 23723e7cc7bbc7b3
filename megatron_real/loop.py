"""Algorithm 1 of REAL, and the map of this project: each stage of `train` is a package.

prompts -> rollouts -> labels -> batches, old log-probs -> updates -> metrics on disk
   ^                                                          |    -> evaluation -> checkpoint
   +---------------------- weights to the engine <------------+

stage           consumes                  produces                  waits for
sync            the policy's weights      the engine's weights      all ranks, tensor by tensor
rollout         prompts                   completions, in verifying its own rank only
label           completions               rollouts on every rank    the slowest rank's verifier
reference       rollouts                  their log-probs under     the pipeline; only with a KL
                                          the frozen policy         penalty to a reference
old_logprobs    rollouts                  packed batches            the pipeline
update          one batch at a time       new weights               all ranks, once per update
checkpoint      everything                a copy that a thread      the copy, not the disk
                                          writes

The first three are in rollout/source.py. A run may stop at the seams of its stages, and the same
command goes on from there; see checkpoint/saver.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from megatron_real.checkpoint.state import prepare_step
from megatron_real.job import Job
from megatron_real.policy.policy import Update
from megatron_real.policy.train_step import Batch
from megatron_real.rollout.source import StepRollouts
from megatron_real.runs.card import CARD, model_card, versions
from megatron_real.runs.saved import Position
from megatron_real.runs.training import summary
from megatron_real.supervision.ruin import NonFinite
from megatron_real.weights.stream import write_hf


def train(job: Job) -> None:
    """Trains the policy by REAL. Every process of the job runs this together."""
    config = job.config
    reporter = job.reporter
    checkpoints = job.checkpoints
    with reporter.progress:
        if checkpoints.position == Position(0):
            # The starting weights: what training is measured against.
            _evaluate(job, step=0)
        # A step that a checkpoint was taken within is taken up again.
        for step in range(checkpoints.position.step + 1, config.trainer.steps + 1):
            with reporter.step(step):
                taken = job.source.take(step)  # sync, sample, verify, refill
                if job.reference is not None:
                    # A KL penalty needs the rollouts' log-probs under the reference.
                    with reporter.progress.stage("reference"):
                        rollouts = job.reference.annotated(taken.rollouts)
                        taken = dataclasses.replace(taken, rollouts=rollouts)

                batches, updates = _updates(job, taken)
                with reporter.progress.stage("write"):
                    reporter.settle()  # the rollouts of the step before are on disk
                with reporter.progress.stage("report"):
                    training = summary(job.policy, batches, updates, lag=taken.lag)
                    reporter.trained(step, taken.rollouts, training)
                # Once the step's row, which says what was skipped, is on disk.
                _stop_if_not_finite(job, step, batches, updates)

            accuracy = None
            every = config.evaluation.every
            is_due = every > 0 and step % every == 0
            if is_due or step == config.trainer.steps:
                accuracy = _evaluate(job, step)
            checkpoints.step_done(step, accuracy=accuracy)

        # Before the export, which may fail: the last checkpoint is then there.
        unsaved = checkpoints.close()
        if config.trainer.export:
            _export(job)
        reporter.finish(unsaved)


def _updates(job: Job, taken: StepRollouts) -> tuple[list[Batch], list[Update]]:
    """Makes the updates of a step, and returns its batches and updates.

    Updates that an earlier life of the run has made are among them, and are not made again.
    """
    timed = job.reporter.progress.stage
    with timed("old_logprobs"), taken.generating_weights():
        begun = job.checkpoints.take_begun()
        batches, updates = prepare_step(job.policy, taken.rollouts, begun, lagging=taken.lag > 0)

    while len(updates) < len(batches):
        with timed("update"):
            updates.append(job.policy.update(batches[len(updates)]))
        # After the last update comes the seam of the step, with its metrics and evaluation.
        if len(updates) < len(batches):
            job.checkpoints.seam(batches, updates)
    return batches, updates


def _stop_if_not_finite(
    job: Job, step: int, batches: Sequence[Batch], updates: Sequence[Update]
) -> None:
    """Keeps the batches of skipped updates, and ends the run after too many in a row.

    Raises:
        NonFinite: trainer.max_skipped_updates updates in a row were skipped.
    """
    for number, (batch, update) in enumerate(zip(batches, updates, strict=True), 1):
        if update.skipped:
            job.reporter.skipped(step, number, batch.minibatch.rollouts)
        if update.skipped_in_a_row >= job.config.trainer.max_skipped_updates:
            raise NonFinite(
                f"{update.skipped_in_a_row} updates in a row had a loss or gradient that was not "
                f"finite; their batches are in {job.reporter.directory.dumps}, each a directory "
                f"for rollout.replay; {job.checkpoints.last_good()}; try a lower optimizer.lr"
            )


def _evaluate(job: Job, step: int) -> float | None:
    """Returns pass@1 on the held-out problems; None where there are none."""
    if job.evaluation is None:
        return None
    result = job.evaluation.run()
    job.reporter.evaluated(step, result)
    return result.pass_at_1


def _export(job: Job) -> None:
    """Writes the weights as an HF directory with a model card.

    Their dtype is that of the weights that training started from.
    """
    # The tensors are sent one by one, as the ranks ask for them.
    stream = job.policy.stream()
    if job.reporter.first:
        path = job.config.model.path
        directory = job.reporter.directory
        card = {CARD: model_card(directory, versions())}
        write_hf(directory.weights, stream, source=path, dtype=job.weights.dtype, texts=card)
    else:
        for _ in stream:  # the stream is collective: every rank takes part in every tensor
            pass
