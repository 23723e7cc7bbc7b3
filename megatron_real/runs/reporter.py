"""Everything a run writes and shows, in one place. The first rank writes; the others only measure their stages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import profile

from megatron_real.config import Config, to_dict
from megatron_real.records import Rollout
from megatron_real.runs.curves import plot_curves
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.metrics import MetricsWriter, peak_tflops, rollout_metrics, score_metrics
from megatron_real.runs.progress import RunProgress
from megatron_real.runs.rollouts import write_rollouts


@dataclasses.dataclass(frozen=True)
class Training:
    """What the updates of one step were, in plain numbers."""

    losses: Sequence[float]
    """[updates] loss of each minibatch."""
    scores: Sequence[float]
    """[rollouts] score of each rollout, 0 where it was not computed."""
    weights: Sequence[float]
    """[rollouts] dL / dscore."""
    max_abs_weight_tau: float
    """max |w| * tau * groups of the minibatch; at most 1 by Eq. 9 and 10."""
    grad_norms: Sequence[float]
    """[updates] gradient norm before clipping."""
    lr: float
    """Learning rate of the last update."""
    skipped: Sequence[int]
    """Updates that were skipped for a loss or gradient that was not finite."""
    token_means: Mapping[str, float]
    """entropy and train/engine mismatch, means over response tokens."""
    tokens: int
    """Prompt and response tokens that were trained on."""
    flops: float
    """Model FLOPs of forward and backward over them, recomputation and scoring aside."""


class Reporter:
    """Metrics, rollouts, progress and profiles of one run."""

    def __init__(self, config: Config, *, rank: int, world: int) -> None:
        """Claims the run directory. Raises ValueError if it holds a run already."""
        self.config, self.world, self.first = config, world, rank == 0
        self.directory = RunDirectory(config.trainer.run_dir)
        self.progress = RunProgress(config.trainer.steps, shown=self.first)
        self._writer: MetricsWriter | None = None
        if self.first:
            from omegaconf import OmegaConf

            self.directory.claim()
            OmegaConf.save(OmegaConf.create(to_dict(config)), self.directory.config)
            self._writer = MetricsWriter(
                self.directory.metrics,
                tensorboard=self.directory.tensorboard if config.trainer.tensorboard else None,
                wandb=to_dict(config) if config.trainer.wandb else None,
            )

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """One step; a torch profiler trace of it is written where trainer.profile asks."""
        if not (self.first and step in self.config.trainer.profile):
            yield
            return
        self.directory.profile.mkdir(exist_ok=True)
        with profile() as trace:
            yield
        trace.export_chrome_trace(str(self.directory.profile / f"step-{step:05d}.json"))

    def rollouts(self, step: int, rollouts: Sequence[Rollout]) -> None:
        """Keeps the step's rollouts on disk before anything is trained on them."""
        if self.first:
            write_rollouts(self.directory.rollouts(step), rollouts)

    def trained(self, step: int, rollouts: Sequence[Rollout], training: Training) -> None:
        """Writes the finished step's metrics, and its rollouts again, now with scores and weights."""
        if not self.first or self._writer is None:
            return
        write_rollouts(self.directory.rollouts(step), rollouts, scores=training.scores, weights=training.weights)
        seconds = self.progress.take_seconds()
        metrics = {
            "loss": _mean(training.losses),
            **rollout_metrics(rollouts),
            **score_metrics(rollouts, training.scores, training.weights),
            **training.token_means,
            "max_abs_weight_tau": training.max_abs_weight_tau,
            "grad_norm": _mean(training.grad_norms),
            "lr": training.lr,
            "skipped_updates": float(len(training.skipped)),
            **{f"seconds/{name}": value for name, value in seconds.items()},
            **self._speed(training, seconds["old_logprobs"] + seconds["update"]),
        }
        self._writer.write(step, metrics)
        self.progress.step_done(step, metrics, seconds)

    def skipped(self, step: int, update: int, rollouts: Sequence[Rollout]) -> None:
        """Keeps the batch of a skipped update for replay, and says so."""
        if self.first:
            write_rollouts(self.directory.dump(step, update), rollouts)
            where = self.directory.dump(step, update)
            self.progress.say(f"step {step} update {update}: loss or gradient is not finite; skipped, batch in {where}")

    def evaluated(self, step: int, evaluation: Any) -> None:
        """Writes and shows an evaluation (a dataclass with pass_at_1, standard_error and problems)."""
        if not self.first:
            return
        seconds = sum(self.progress.take_seconds().values())
        row = {f"heldout/{name}": float(value) for name, value in dataclasses.asdict(evaluation).items()}
        row["seconds/evaluation"] = seconds
        MetricsWriter(self.directory.evaluations, tensorboard=None, wandb=None).write(step, row)
        self.progress.say(
            f"step {step:5d}  held-out pass@1 {evaluation.pass_at_1:.3f} +- {evaluation.standard_error:.3f} "
            f"on {evaluation.problems} problems  |  {seconds:.1f} s"
        )

    def finish(self) -> None:
        """Draws the curves and says where everything is."""
        if self._writer is None:
            return
        self._writer.close()
        plot_curves(
            self.directory.metrics, self.directory.evaluations, self.directory.curves, title=self.directory.path.name
        )
        self.progress.say(f"run directory  {self.directory.path}")
        self.progress.say(f"curves         {self.directory.curves}")
        if self.directory.weights.exists():
            self.progress.say(f"HF weights     {self.directory.weights}")

    def _speed(self, training: Training, seconds: float) -> dict[str, float]:
        per_rank = 1.0 / (seconds * self.world)
        speed = {
            "tokens_per_second_per_rank": training.tokens * per_rank,
            "tflops_per_rank": training.flops * per_rank / 1e12,
        }
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        peak = peak_tflops(name, self.config.trainer.peak_tflops)
        return speed | ({"mfu": speed["tflops_per_rank"] / peak} if peak else {})


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan

