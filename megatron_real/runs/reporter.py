"""Everything a run writes and shows, in one place. The first rank writes; the others only measure their stages."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from megatron_real.config import Config, to_dict, to_plain
from megatron_real.disk import write_whole
from megatron_real.evaluate import Evaluation
from megatron_real.records import Rollout
from megatron_real.runs.changes import changes, same_rollouts
from megatron_real.runs.curves import plot_curves
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.metrics import MetricsWriter, Training, step_metrics
from megatron_real.runs.peak import peak_tflops
from megatron_real.runs.progress import RunProgress, profile_step
from megatron_real.runs.rollouts import write_rollouts

__all__ = ["Reporter", "Training"]


class Reporter:
    """Metrics, rollouts, progress and profiles of one run."""

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        world: int,
        resumed_after: int | None = None,
        gathered: Callable[[Mapping[str, float]], Sequence[Mapping[str, float]]] = lambda seconds: [seconds],
    ) -> None:
        """Claims the run directory.

        Args:
            resumed_after: steps that a checkpoint has; None without one.
            gathered: collective; every rank's values.

        Raises:
            ValueError: the directory holds a run already that is not to be resumed.
        """
        self.config, self.world, self.first = config, world, rank == 0
        self.directory = RunDirectory(config.trainer.run_dir)
        self._gathered = gathered
        self._writer: MetricsWriter | None = None
        if self.first:
            from omegaconf import OmegaConf

            before = self._config_before()
            again = resumed_after is None and self._was_cut_short(before)
            self.directory.claim(exist_ok=again or resumed_after is not None)
            self._same_rollouts = before is not None and same_rollouts(before, to_plain(config))
            self.say_status("running")
            OmegaConf.save(OmegaConf.create(to_dict(config)), self.directory.config)
            self._writer = MetricsWriter(
                self.directory,
                tensorboard=config.trainer.tensorboard,
                wandb=to_dict(config) if config.trainer.wandb else None,
                first_step=0 if again else None if resumed_after is None else resumed_after + 1,
            )
        self.progress = RunProgress(config.trainer.steps, shown=self.first, log=self.directory.log)

    def _config_before(self) -> dict[str, Any] | None:
        """The configuration with which this directory was last used."""
        from omegaconf import OmegaConf

        if not self.directory.config.is_file():
            return None
        values: Any = OmegaConf.to_container(OmegaConf.load(self.directory.config))
        return dict(values)

    def _was_cut_short(self, before: Mapping[str, Any] | None) -> bool:
        """The directory holds the same run, which ended before its first checkpoint: it begins anew."""
        if before is None or not self.config.checkpoint.every or not self.directory.status.is_file():
            return False
        finished = json.loads(self.directory.status.read_text())["state"] == "finished"
        return not finished and not list(changes(before, to_plain(self.config)))

    def say_status(self, state: str, reason: str = "") -> None:
        """Tells scripts what the run is doing: running, stopped (start it again), finished, failed or crashed."""
        if self.first:
            life = f"{os.environ.get('SLURM_JOB_ID', '')}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            status = {"state": state, "reason": reason, "time": when, "life": life}
            write_whole(self.directory.status, json.dumps(status) + "\n")

    def offsets(self) -> dict[str, int]:
        """Bytes of each file of rows so far."""
        files = (self.directory.metrics, self.directory.evaluations)
        return {file.name: file.stat().st_size if file.exists() else 0 for file in files}

    def rewind(self, steps: int, offsets: Mapping[str, int]) -> None:
        """Drops what was written after the first `steps` steps: it will be made again.

        The rollouts of the step after them are kept where nothing that they depend on has changed: the weights that a
        checkpoint holds have generated them.
        """
        for file in (self.directory.metrics, self.directory.evaluations):
            size = offsets.get(file.name, 0)
            if file.exists() and file.stat().st_size > size:
                rows = file.read_bytes()[size:].count(b"\n")
                self.progress.say(f"{file.name}: the last {rows} rows are of steps that will be made again")
                os.truncate(file, size)
                if size == 0:
                    file.unlink()
        for step, file in self.directory.kept_rollouts():
            if step > steps + 1 or (step == steps + 1 and not self._same_rollouts):
                file.unlink()

    def step(self, step: int) -> AbstractContextManager[None]:
        """One step; a torch profiler trace of it is written by the first rank where trainer.profile asks."""
        return profile_step(step, self.config.trainer.profile if self.first else (), self.directory.profile)

    def trained(self, step: int, rollouts: Sequence[Rollout], training: Training) -> None:
        """Writes the finished step's metrics, and its rollouts with scores and weights in place of their chunks."""
        seconds = self.progress.take_seconds()
        seconds_of_ranks = self._gathered(seconds)
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
        for chunk in self.directory.chunks(step):
            chunk.unlink()
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        peak = peak_tflops(device, self.config.trainer.peak_tflops)
        metrics = step_metrics(
            rollouts, training, seconds, num_ranks=self.world, peak_tflops=peak, seconds_of_ranks=seconds_of_ranks
        )
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
        self.say_status("finished")
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
