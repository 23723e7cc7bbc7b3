"""What a run shows while it goes: a live bar with the present stage on a terminal, a line per step everywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch.profiler import profile, record_function

# Heading, metric and format of the columns of a step's line.
_COLUMNS = (
    ("reward", "reward_mean", "{:.3f}"),
    ("held-out", "heldout", "{:.3f}"),
    ("loss", "loss", "{:.3f}"),
    ("solved", "solved_share", "{:.2f}"),
    ("one-class", "one_class_share", "{:.2f}"),
    ("tokens", "response_tokens_mean", "{:.0f}"),
    ("grad", "grad_norm", "{:.2f}"),
)


class StageTimer:
    """Seconds of each stage, and a range of its name in a profiler trace.

    A clock on the host is enough on a GPU too: every stage ends with a result that the host reads (completions,
    verdicts, the scores and the gradient norm of an update), so its kernels are done. `old_logprobs` alone may run
    over into `update`.
    """

    def __init__(self) -> None:
        self.current: str | None = None
        """The stage that runs now."""
        self.started = 0.0
        """When it began, on the clock of time.perf_counter()."""
        self.begun = 0
        """Stages begun so far."""
        self._seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times one stage; a stage that comes several times adds up. Stages do not nest."""
        assert self.current is None, f"stage {name} begins within {self.current}"
        self.current, self.started, self.begun = name, time.perf_counter(), self.begun + 1
        try:
            with record_function(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - self.started
            self.current = None

    def at(self) -> tuple[int, str, float]:
        """(stages begun, the present one or "", seconds in it), for a thread that watches."""
        name = self.current
        return self.begun, name or "", time.perf_counter() - self.started if name else 0.0

    def take_seconds(self) -> dict[str, float]:
        """Seconds of each stage since the last call, in the order they first ran."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class RunProgress(StageTimer):
    """Shows the steps of a run while it times their stages. Ranks other than the first only measure.

    Where standard output is no terminal there is no bar and no control character: one plain line per step.

    Example:
        with RunProgress(100, shown=rank == 0) as progress:
            with progress.stage("rollout"):
                ...
            progress.step_done(1, {"reward_mean": 0.5}, progress.take_seconds())
    """

    def __init__(self, steps: int, *, shown: bool, log: Path | None = None, console: Console | None = None) -> None:
        """`log`: a file that also gets every line, with the time of day."""
        super().__init__()
        self._steps, self._shown, self._log = steps, shown, log
        self._console = console or Console(quiet=not shown, soft_wrap=True)
        self._live = shown and self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            _StageColumn(self),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=4,  # the thread that draws shares the interpreter with the training
            transient=True,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=steps)
        self._heldout = math.nan
        self._stages: list[str] = []

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """One line of text."""
        if not self._shown:
            return
        self._console.print(line, highlight=False, markup=False, emoji=False)
        if self._log is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")

    def step_done(self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]) -> None:
        """The line of a finished step."""
        self._bar.update(self._task, completed=step)
        values = {**metrics, "heldout": self._heldout}
        cells = {name: _number(values.get(key, math.nan), text) for name, key, text in _COLUMNS}
        if self._live:
            self._table_row(step, cells, seconds)
            return
        stages = "  ".join(f"{name} {s:.1f}" for name, s in seconds.items())
        figures = "  ".join(f"{name} {value}" for name, value in cells.items())
        self.say(f"step {step:{len(str(self._steps))}d}  {figures}  |  {stages} s")

    def _table_row(self, step: int, cells: Mapping[str, str], seconds: Mapping[str, float]) -> None:
        """A row of the terminal's table, with a column per stage where the terminal is wide enough for them."""
        if not self._stages:  # the first row
            names = [*seconds, "seconds"]
            heading = _row({name: name for name in ["step", *cells, *names]})
            self._stages = names if len(heading) <= self._console.width else ["seconds"]
            self.say(_row({name: name for name in ["step", *cells, *self._stages]}))
        spent = {**seconds, "seconds": sum(seconds.values())}
        times = {name: _number(spent.get(name, math.nan), "{:.1f}") for name in self._stages}
        self.say(_row({"step": str(step), **cells, **times}))

    def evaluation_done(self, step: int, accuracy: float, standard_error: float, problems: int, seconds: float) -> None:
        """The line of an evaluation; the next steps' lines repeat its accuracy."""
        self._heldout = accuracy
        self.say(
            f"held-out accuracy after {step} steps: {accuracy:.3f} +- {standard_error:.3f} "
            f"on {problems} problems ({seconds:.1f} s)"
        )


class _StageColumn(ProgressColumn):
    """The present stage and how long it has run."""

    def __init__(self, timer: StageTimer) -> None:
        super().__init__()
        self._timer = timer

    def render(self, task: Task) -> Text:
        name = self._timer.current
        return Text(f"{name} {time.perf_counter() - self._timer.started:.0f} s" if name else "", style="cyan")


def _row(cells: Mapping[str, str]) -> str:
    """The cells, each as wide as the name of its column."""
    return "  ".join(f"{value:>{max(len(name), 5)}}" for name, value in cells.items())


def _number(value: float, text: str) -> str:
    return text.format(value) if math.isfinite(value) else "-"


@contextmanager
def profile_step(step: int, steps: Collection[int], directory: Path) -> Iterator[None]:
    """Writes a torch profiler trace (open it in ui.perfetto.dev) of a step that is among `steps`."""
    if step not in steps:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with profile() as trace:  # CPU, and CUDA where there is one
        yield
    trace.export_chrome_trace(str(directory / f"step-{step:05d}.json"))
