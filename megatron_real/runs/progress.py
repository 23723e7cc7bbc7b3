"""What a run shows while it goes: a live bar with the present stage on a terminal, a line per step everywhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.profiler import record_function


class RunProgress:
    """Progress of the steps and the time of each stage. Ranks other than the first only measure.

    Example:
        with RunProgress(100, shown=rank == 0) as progress:
            with progress.stage("rollout"):
                ...
            progress.step_done(1, {"reward_mean": 0.5}, progress.take_seconds())
    """

    def __init__(self, steps: int, *, shown: bool) -> None:
        self._console = Console(quiet=not shown, soft_wrap=True)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not (shown and self._console.is_terminal),
        )
        self._task = self._bar.add_task("starting", total=steps)
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Shows and times one stage of a step, and names it in a profiler trace."""
        self._bar.update(self._task, description=name)
        started = time.perf_counter()
        with record_function(name):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - started

    def take_seconds(self) -> dict[str, float]:
        """Seconds of each stage since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def say(self, line: str) -> None:
        """One line of text."""
        self._console.print(line, highlight=False, markup=False)

    def step_done(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """The line of a finished step."""
        self._bar.update(self._task, completed=step)
        stages = "  ".join(f"{name} {s:.1f}" for name, s in seconds.items())
        self.say(
            f"step {step:5d}  reward {metrics['reward_mean']:.3f}  loss {metrics['loss']:7.4f}  "
            f"one-class {metrics['one_class_share']:.2f}  tokens {metrics['response_tokens_mean']:.0f}  "
            f"grad {metrics['grad_norm']:.3f}  |  {stages} s"
        )
