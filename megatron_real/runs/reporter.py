"""Everything a run writes and shows, in one place. The first rank writes; the others only measure their stages."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from megatron_real.config import Config, to_dict
from megatron_real.evaluate import Evaluation
from megatron_real.records import Rollout
from megatron_real.runs.curves import plot_curves
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.metrics import MetricsWriter, Training, step_metrics
from megatron_real.runs.peak import peak_tflops
from megatron_real.runs.progress import RunProgress, profile_step
from megatron_real.runs.rollouts import write_rollouts

__all__ = ["Reporter", "Training"]


class Reporter:
    """Metrics, rollouts, progress and profiles of one run."""

    def __init__(self, config: Config, *, rank: int, world: int) -> None:
        """Claims the run directory. Raises ValueError if it holds a run already."""
        self.config, self.world, self.first = config, world, rank == 0
        self.directory = RunDirectory(config.trainer.run_dir)
        self._writer: MetricsWriter | None = None
        if self.first:
            from omegaconf import OmegaConf

            self.directory.claim()
            OmegaConf.save(OmegaConf.create(to_dict(config)), self.directory.config)
            self._writer = MetricsWriter(
                self.directory,
                tensorboard=config.trainer.tensorboard,
                wandb=to_dict(config) if config.trainer.wandb else None,
            )
        self.progress = RunProgress(config.trainer.steps, shown=self.first, log=self.directory.log)

    def step(self, step: int) -> AbstractContextManager[None]:
        """One step; a torch profiler trace of it is written by the first rank where trainer.profile asks."""
        return profile_step(step, self.config.trainer.profile if self.first else (), self.directory.profile)

    def rollouts(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Keeps the step's rollouts on disk before anything is trained on them."""
        if self.first:
            write_rollouts(self.directory.rollouts(step), rollouts, step=step)

    def trained(self, step: int, rollouts: Sequence[Rollout], training: Training) -> None:
        """Writes the finished step's metrics, and its rollouts again, now with scores and weights."""
        seconds = self.progress.take_seconds()
        if self._writer is None:
            return
        write_rollouts(
            self.directory.rollouts(step),
            rollouts,
            step=step,
            scores=training.scores,
            weights=training.weights,
            minibatches=self._minibatches(rollouts),
        )
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        peak = peak_tflops(device, self.config.trainer.peak_tflops)
        metrics = step_metrics(rollouts, training, seconds, num_ranks=self.world, peak_tflops=peak)
        self._writer.write(step, metrics)
        self.progress.step_done(step, metrics, seconds)

    def skipped(self, step: int, update: int, rollouts: Sequence[Rollout]) -> None:
        """Keeps the batch of a skipped update for replay, and says so."""
        if self.first:
            dump = self.directory.dump(step, update)
            write_rollouts(dump.rollouts(1), rollouts, step=step)
            self.progress.say(
                f"step {step} update {update}: loss or gradient is not finite; skipped. "
                f"Its batch can be looked into by rollout.replay={dump.path} trainer.steps=1"
            )

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Writes and shows an evaluation."""
        seconds = sum(self.progress.take_seconds().values())
        if self._writer is None:
            return
        row = {f"heldout/{name}": float(value) for name, value in evaluation.figures().items()}
        self._writer.write_evaluation(step, row | {"seconds/evaluation": seconds})
        self.progress.evaluation_done(
            step, evaluation.pass_at_1, evaluation.standard_error, evaluation.problems, seconds
        )
        self._draw()  # so that an interrupted run has curves too

    def finish(self) -> None:
        """Draws the curves and says where everything is."""
        if self._writer is None:
            return
        self._writer.close()
        self._draw()
        self.progress.say(f"run directory  {self.directory.path}")
        self.progress.say(f"curves         {self.directory.curves}")
        if self.directory.weights.exists():
            self.progress.say(f"HF weights     {self.directory.weights}")

    def _draw(self) -> None:
        where = self.directory
        plot_curves(where.metrics, where.evaluations, where.curves, title=where.path.name)

    def _minibatches(self, rollouts: Sequence[Rollout]) -> list[int]:
        """[rollouts] number of the update, from 1, that trained on each: groups are cut in order of appearance."""
        order = {group: i for i, group in enumerate(dict.fromkeys(r.group for r in rollouts))}
        return [1 + order[r.group] // self.config.batch.minibatch_prompts for r in rollouts]
