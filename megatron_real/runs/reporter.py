"""Everything a run writes and shows, in one place.

The first rank writes; the others only measure their stages. On several nodes the first rank of each
node writes a part of the rollouts: those that ranks of its node hold.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_real.config import Config, to_dict, to_plain
from megatron_real.disk import write_whole
from megatron_real.errors import State
from megatron_real.evaluation.figures import Evaluation
from megatron_real.parallel.collective import all_well
from megatron_real.parallel.exchange import Exchange
from megatron_real.progress import RunProgress, profile_step
from megatron_real.records import Rollout
from megatron_real.runs.claim import Beginning, Earlier
from megatron_real.runs.curves import plot_curves
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.metrics import MetricsWriter, Training, step_metrics
from megatron_real.runs.parts import Part, delete, name_parts, write_parts
from megatron_real.runs.peak import peak_tflops
from megatron_real.runs.rollouts import write_rollouts
from megatron_real.runs.rows import drop_cut_row
from megatron_real.runs.status import life_of_this_process, write_status
from megatron_real.runs.summary import duration, next_commands, summary_lines
from megatron_real.runs.trackers import TRACKERS, check_installed
from megatron_real.supervision.memory import memory_of_process

__all__ = ["Reporter", "Training"]

SUMMARY_EVERY = 50
"""Steps between summaries; there is one at the end, too."""

_STAGES_OF_EVALUATION = ("sync", "rollout", "evaluation")
"""The stages that an evaluation's time is made of.

The engine gets the weights, and ends what it generates ahead, before it answers.
"""

PACE_STEPS = 2
"""Steps whose time tells how long a run will take."""

NEW_RUN = Beginning(Earlier(), newest=None, changed=[])
"""The beginning of a run in a directory where there was nothing."""


class Reporter:
    """Metrics, rollouts, progress and profiles of one run."""

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        world: int,
        gathered: Callable[[Mapping[str, float]], Sequence[Mapping[str, float]]] = lambda seconds: [
            seconds
        ],
        exchange: Exchange | None = None,
    ) -> None:
        """Writes nothing yet: the run directory is this life's from `begin` on.

        Args:
            config: the run's configuration.
            rank: this rank.
            world: number of ranks.
            gathered: returns every rank's values on the first rank, which alone reads them;
                collective.
            exchange: brings the rollouts to the ranks that write them; None where the first rank
                has all rollouts whole.

        Raises:
            ValueError: a tracker is asked for whose package is not installed.
        """
        self.config = config
        self.world = world
        self.first = rank == 0
        self.directory = RunDirectory(config.trainer.run_dir)
        self._gathered = gathered
        self._exchange = exchange or Exchange(rank, world)
        self._writer: MetricsWriter | None = None
        self.engine_work: Callable[[], Mapping[str, float]] | None = None
        """Gives what this rank's engine has done in the step; None where there is no engine."""
        self.begun = False
        """Whether the run directory is this life's."""
        # A step's rollouts are written while the next step runs. One thread keeps files in order.
        self._rollout_thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts-to-disk")
        self._writing: Future[None] | None = None
        self._written_step = 0  # whose parts have no name yet; 0: none, and always so on one node
        self._steps = 0
        self._idle = 0
        """Steps of this life that taught nothing."""
        self._step_times: list[float] = []
        if self.first:
            check_installed(self._trackers())
        self.progress = RunProgress(config.trainer.steps, shown=self.first)

    def begin(
        self, beginning: Beginning = NEW_RUN, offsets: Mapping[str, int] | None = None
    ) -> None:
        """Makes the run directory this life's.

        By now everything that this life depends on has been checked.

        Args:
            beginning: what the directory holds of earlier lives.
            offsets: bytes of each file of rows that the checkpoint counts.
        """
        self.begun = True
        if not self.first:
            return

        self.directory.path.mkdir(parents=True, exist_ok=True)
        self.say_status("running")
        self.progress.log_to(self.directory.log)

        steps = 0
        if beginning.newest:
            steps = beginning.newest.position.step
        # What an earlier life has written after its last checkpoint goes before config.yaml
        # changes: a kill in between must not leave rows beside a configuration that they were not
        # made with.
        if beginning.earlier.config is not None or beginning.earlier.steps:
            self._rewind(steps, offsets or {})
        self._write_life(beginning)

        # Trackers drop the rows of their own copies from this step on; None: there are none.
        first_step = None
        if beginning.newest:
            first_step = steps + 1
        elif beginning.again:
            first_step = 0
        self._writer = MetricsWriter(
            self.directory,
            trackers=self._trackers(),
            config=to_dict(self.config),
            first_step=first_step,
            say=self.progress.say,
        )

    def _write_life(self, beginning: Beginning) -> None:
        """Writes config.yaml of this life, and a copy of it to lives/, where earlier ones stay."""
        from omegaconf import OmegaConf

        values = to_plain(self.config)
        origin = "the start"
        if beginning.newest:
            origin = str(beginning.newest.position)
        life = {
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "life": life_of_this_process(),
            "processes": self.world,
            "from": origin,
            "changed": beginning.changed,
            "config": values,
        }
        number = 1
        # The first rank alone writes here, and it holds the directory's lock.
        while self.directory.life(number).exists():
            number += 1
        write_whole(self.directory.life(number), json.dumps(life, indent=1) + "\n")
        write_whole(self.directory.config, OmegaConf.to_yaml(OmegaConf.create(values)))

    def say_status(self, state: State, reason: str = "", *, diverged: bool = False) -> None:
        """Tells scripts what the run is doing, from `begin` on.

        Before that the directory is not this life's.
        """
        if not self.first or not self.begun:
            return
        try:
            write_status(self.directory.status, state, reason, diverged=diverged)
        except OSError as error:  # the end that is to be told must not become another one
            print(
                f"megatron-real: {self.directory.status} cannot be written ({error}); "
                f"this run is {state}: {reason}",
                file=sys.stderr,
            )

    def _trackers(self) -> list[str]:
        """Names of the trackers that the configuration asks for."""
        return [name for name in TRACKERS if getattr(self.config.trainer, name)]

    def offsets(self) -> dict[str, int]:
        """Bytes of each file of rows so far."""
        files = (self.directory.metrics, self.directory.evaluations)
        return {file.name: _size(file) for file in files}

    def _rewind(self, steps: int, offsets: Mapping[str, int]) -> None:
        """Drops what was written after the first `steps` steps: it will be made again.

        The chunks of the step after them are kept: each says what it was drawn under, and is used
        only where that has not changed (runs/chunks.py).
        """
        # A checkpoint counts the bytes of each file of rows at its time. What follows
        # them is later.
        for file in (self.directory.metrics, self.directory.evaluations):
            size = offsets.get(file.name, 0)
            present = _size(file)
            if present > size:
                rows = file.read_bytes()[size:].count(b"\n")
                self.progress.say(
                    f"{file.name}: the last {rows} rows are of steps that will be made again"
                )
                # The file keeps its inode: a program that follows it goes on.
                os.truncate(file, size)
                if size == 0:
                    file.unlink()
            elif present < size:
                # Somebody has cut or deleted the file. Training does not need the rows.
                cut = ""
                if drop_cut_row(file):
                    cut = ", and its last row was cut"
                self.progress.say(
                    f"WARNING: {file.name} has {present} bytes, and {size} when the checkpoint was "
                    f"written: rows of finished steps are lost{cut}"
                )

        for step, rollouts in self.directory.kept_rollouts():
            # A whole file of the step right after them stays, too: it is replaced when that step
            # is made again.
            if step > steps + 1:
                delete(rollouts)
        for left_over in self.directory.unfinished_rollouts():
            delete(left_over)

    def step(self, step: int) -> AbstractContextManager[None]:
        """Returns the context of one step.

        Where trainer.profile asks for it, the first rank writes a trace of torch's profiler.
        """
        profiled: Sequence[int] = ()
        if self.first:
            profiled = self.config.trainer.profile
        return profile_step(step, profiled, self.directory.profile)

    def trained(self, step: int, rollouts: Sequence[Rollout], training: Training) -> None:
        """Writes the finished step's metrics, and lets the thread write its rollouts. Collective.

        The rollouts, with their scores, take the place of their chunks. It raises the error that
        has kept the rollouts of the step before from being written.
        """
        seconds = self.progress.take_seconds()
        # Collective: every rank calls these in the same order, before most of them return below.
        seconds_of_ranks = self._gathered(seconds)
        memory_of_ranks = self._gathered(memory_of_process())
        engines: Sequence[Mapping[str, float]] = ()
        if self.engine_work is not None:
            engines = [work for work in self._gathered(self.engine_work()) if work]

        # First the step before: host memory holds one step that is being written, not many.
        self.settle()
        kept = self._kept(step, rollouts)
        whole = self._exchange.to_nodes(rollouts, kept)
        if self._exchange.first_of_node:
            self._writing = self._rollout_thread.submit(
                self._write_rollouts, step, whole, kept, training
            )
        if self._exchange.num_nodes > 1:
            self._written_step = step
        if self._writer is None:
            return

        # The row of metrics, which the first rank alone writes.
        device = "cpu"
        if torch.cuda.is_available():
            device = torch.cuda.get_device_name()
        peak = peak_tflops(device, self.config.trainer.peak_tflops)
        metrics = step_metrics(
            rollouts,
            training,
            seconds,
            num_ranks=self.world,
            peak_tflops=peak,
            seconds_of_ranks=seconds_of_ranks,
            memory_of_ranks=memory_of_ranks,
            engines=engines,
        )
        self._writer.write(step, metrics)
        self.progress.step_done(step, metrics, seconds)
        self._count_idle(step, training, metrics)
        self._estimate_time_left(step)
        if step % SUMMARY_EVERY == 0 and step < self.config.trainer.steps:
            self._summarise()

    def settle(self) -> None:
        """Waits until the rollouts of every finished step are on disk. Collective.

        It raises the error that has kept them from being written. A checkpoint that counts a step
        must not be on disk before the step's rollouts are.
        """
        # Forgotten before it is waited for: an error is raised once, and not again by `finish`.
        writing = self._writing
        self._writing = None
        if not self._written_step:
            if writing is not None:
                writing.result()
            return

        # The parts are a step's rollouts once every node has written its own.
        step = self._written_step
        self._written_step = 0

        def wait_for_own_part() -> None:
            if writing is not None:
                writing.result()

        all_well(wait_for_own_part, group=self._exchange.group or dist.group.WORLD)
        if self.first:
            name_parts(self.directory.rollouts(step), of=self._exchange.num_nodes)
            self._drop_rollouts(step)

    def _kept(self, step: int, rollouts: Sequence[Rollout]) -> list[int]:
        """Returns the positions of the rollouts that are written: those of whole groups.

        They are the same on every rank.
        """
        groups = sorted({rollout.group for rollout in rollouts})
        count = self.config.rollout.keep_groups
        if 0 < count < len(groups):
            # Of seed and step alone, so that every rank, and a resumed run, keeps the same groups.
            draw = random.Random(f"kept groups {self.config.trainer.seed} {step}")
            groups = draw.sample(groups, count)
        kept = set(groups)
        return [i for i, rollout in enumerate(rollouts) if rollout.group in kept]

    def _write_rollouts(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        kept: Sequence[int],
        training: Training,
    ) -> None:
        """Writes this node's part of a step, which on one node is all of it; runs in the thread."""
        exchange = self._exchange
        own = sorted(set(kept) & set(exchange.held_by_node(rollouts)))
        figures = training.token_figures
        # Groups were cut into minibatches in order of appearance; updates count from 1.
        order = {group: i for i, group in enumerate(dict.fromkeys(r.group for r in rollouts))}
        size = self.config.batch.minibatch_prompts
        minibatches = [1 + order[rollout.group] // size for rollout in rollouts]
        write_rollouts(
            self.directory.rollouts(step),
            [rollouts[i] for i in own],
            step=step,
            scores=[training.scores[i] for i in own],
            weights=[training.weights[i] for i in own],
            minibatches=[minibatches[i] for i in own],
            token_figures={name: [arrays[i] for i in own] for name, arrays in figures.items()},
            part=Part(exchange.node + 1, exchange.num_nodes),
        )

        # The chunks only now: a kill in between leaves the one or the other.
        if exchange.num_nodes == 1:
            self._drop_rollouts(step)

    def _estimate_time_left(self, step: int) -> None:
        """Says once, after the first steps of this life, how long the others will take."""
        if len(self._step_times) > PACE_STEPS:
            return

        # The end of each of the first steps; the first end is the beginning of the second step.
        self._step_times.append(time.monotonic())
        left = self.config.trainer.steps - step
        if len(self._step_times) != PACE_STEPS + 1 or not left:
            return

        # The first step is left out: it compiles and warms up.
        pace = (self._step_times[-1] - self._step_times[0]) / PACE_STEPS
        self.progress.say(
            f"about {duration(pace * left)} left for {left} steps at the pace of the last "
            f"{PACE_STEPS}"
        )

    def _summarise(self) -> None:
        rollout = self.config.rollout
        for line in summary_lines(
            self.directory, rollouts_per_step=rollout.num_prompts * rollout.group_size
        ):
            self.progress.say(line)

    def _drop_rollouts(self, step: int) -> None:
        """Deletes the chunks of a step that is written as a whole, and steps that are not kept."""
        keep = self.config.rollout.keep_steps
        keep_every = self.config.rollout.keep_every
        doomed = self.directory.chunks(step)
        if keep:
            for number, file in self.directory.kept_rollouts():
                is_milestone = keep_every and number % keep_every == 0
                if number <= step - keep and not is_milestone:
                    doomed.append(file)

        for file in doomed:
            try:
                delete(file)
            except OSError as error:  # a file too many harms nothing: a chunk says what it is of
                self.progress.say(f"WARNING: {file.name} could not be deleted: {error}")

    def _count_idle(self, step: int, training: Training, metrics: Mapping[str, float]) -> None:
        """Warns of the 1st, 2nd, 4th, 8th, ... step whose rollouts had no weight."""
        self._steps += 1
        if any(weight != 0 for weight in training.weights):
            return

        # Doubling intervals: a run that never learns is told so often enough, and the log stays
        # readable.
        self._idle += 1
        is_power_of_two = self._idle & (self._idle - 1) == 0
        if is_power_of_two:
            self.progress.say(
                f"WARNING: step {step} taught nothing, like {self._idle} of {self._steps} steps so "
                f"far: no rollout had a weight ({metrics['solved_share']:.0%} of the groups all "
                f"right, {metrics['one_class_share']:.0%} of one label, "
                f"{metrics['excluded_share']:.0%} of the rollouts excluded)"
            )

    def skipped(self, step: int, update: int, rollouts: Sequence[Rollout]) -> None:
        """Keeps the batch of a skipped update for replay, and tells the user. Collective."""
        dump = self.directory.dump(step, update)
        file = dump.rollouts(1)

        def write(own: list[Rollout], part: Part) -> None:
            write_rollouts(file, own, step=step, part=part)

        write_parts(file, self._exchange, rollouts, write)
        groups = len({r.group for r in rollouts})
        self.progress.say(
            f"step {step} update {update}: loss or gradient is not finite; skipped. "
            f"Its batch can be looked into by rollout.replay={dump.path} trainer.steps=1 "
            f"rollout.num_prompts={groups} batch.minibatch_prompts={groups}"
        )

    def evaluated(self, step: int, evaluation: Evaluation) -> None:
        """Writes and shows an evaluation."""
        # What the step did after its own row was written is counted by the next row, not here.
        seconds = sum(self.progress.take_seconds(only=_STAGES_OF_EVALUATION).values())
        if self._writer is None:
            return

        # Before the row: where a row is, its problems are, too.
        answers = {"samples": evaluation.samples, "correct": dict(evaluation.correct)}
        write_whole(self.directory.heldout_answers(step), json.dumps(answers) + "\n")
        row = {f"heldout/{name}": float(value) for name, value in evaluation.figures().items()}
        self._writer.write_evaluation(step, row | {"seconds/evaluation": seconds})
        self.progress.evaluation_done(
            step, evaluation.pass_at_1, evaluation.standard_error, evaluation.problems, seconds
        )
        self._draw()  # so that an interrupted run has curves, too

    def finish(self, warning: str = "") -> None:
        """Draws the curves and says where everything is.

        Args:
            warning: what did not go well at the end, if anything.
        """
        self.settle()
        self._rollout_thread.shutdown()
        if self._writer is None:
            return

        # Before the last words: a tracker prints its own.
        self._writer.close()
        self._draw()

        # What the user must not overlook goes to the terminal and to status.json.
        reasons = []
        if warning:
            reasons.append(warning)
        if self._steps and self._idle == self._steps:
            reasons.append(
                f"none of the {self._steps} steps taught anything: no rollout had a weight"
            )
        for reason in reasons:
            self.progress.say(f"WARNING: {reason}")
        self.say_status("finished", "; ".join(reasons))

        self._summarise()
        self.progress.say(f"run directory  {self.directory.path}")
        self.progress.say(f"curves         {self.directory.curves}")
        if self.directory.weights.exists():
            self.progress.say(f"HF weights     {self.directory.weights}")
        for line in next_commands(self.directory):
            self.progress.say(line)

    def _draw(self) -> None:
        """Draws the curves, under a title of the run and the settings that matter most."""
        config = self.config
        settings = [config.objective.name]
        # Not every objective has a temperature.
        if hasattr(config.objective, "tau"):
            settings.append(f"tau {config.objective.tau:g}")
        settings += [
            f"lr {config.optimizer.lr:g}",
            f"{config.rollout.num_prompts} prompts x {config.rollout.group_size} rollouts",
            f"minibatches of {config.batch.minibatch_prompts}",
            f"seed {config.trainer.seed}",
        ]
        directory = self.directory
        title = f"{directory.path.name}: {', '.join(settings)}"
        try:
            plot_curves(directory.metrics, directory.evaluations, directory.curves, title=title)
        except Exception as error:  # a picture ends no run, whatever the plotting library raises
            self.progress.say(f"WARNING: {directory.curves.name} could not be drawn: {error}")


def _size(file: Path) -> int:
    """Returns the bytes of a file, 0 where it is missing."""
    if not file.exists():
        return 0
    return file.stat().st_size
