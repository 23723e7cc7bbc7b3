"""What a run shows while it goes: a live bar with the stage on a terminal, a line per step."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
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

_WIDTHS = {"held-out": 10}
"""Widths of columns whose cells are longer than their names: an accuracy and its step."""
_HEADING_EVERY = 20
"""Rows of a terminal's table after which its heading comes again."""
HEARTBEAT_SECONDS = 60.0
"""A stage that lasts longer says a line so often, where there is no terminal with a live one."""

_HELD_LINES = 1000
"""Lines that are kept for a log that cannot be written."""


class StageTimer:
    """Seconds of each stage, and a range of its name in a profiler trace.

    A clock on the host is enough on a GPU too: every stage ends with a result that the host reads
    (completions, verdicts, the scores and the gradient norm of an update), so its kernels are done.
    `old_logprobs` alone may run over into `update`.
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
        self.current = name
        self.started = time.perf_counter()
        self.begun += 1
        try:
            with record_function(name):
                yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - self.started
            self.current = None

    def at(self) -> tuple[int, str, float]:
        """Returns (stages begun, the present one or "", seconds in it), for another thread."""
        # Read once: the stage may end between two looks.
        name = self.current
        if not name:
            return self.begun, "", 0.0
        return self.begun, name, time.perf_counter() - self.started

    def take_seconds(self, only: Collection[str] = ()) -> dict[str, float]:
        """Returns the seconds of each stage since the last call, in the order they first ran.

        Args:
            only: stages to take, leaving the others for a later call; empty for all.
        """
        taken = {}
        for name in list(self._seconds):
            if not only or name in only:
                taken[name] = self._seconds.pop(name)
        return taken


class Heartbeat:
    """Says a line now and then, so that a long stage is not taken for a hang.

    Example:
        with Heartbeat(lambda: "12 of 64 rollouts", print):
            ...
    """

    def __init__(self, line: Callable[[], str], say: Callable[[str], None]) -> None:
        """
        Args:
            line: called for the line; "" where there is nothing to say.
            say: shows it.
        """
        self._line = line
        self._say = say
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Heartbeat:
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        # No line may follow the end. One that has not begun has no thread.
        if self._thread is not None:
            self._thread.join()

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            line = self._line()
            if line:
                self._say(line)


class RunProgress(StageTimer):
    """Shows the steps of a run while it times their stages.

    Ranks other than the first only measure.
    Where standard output is no terminal there is no bar and no control character: one plain line
    per step.

    Example:
        with RunProgress(100, shown=rank == 0) as progress:
            with progress.stage("rollout"):
                ...
            progress.step_done(1, {"reward_mean": 0.5}, progress.take_seconds())
    """

    def __init__(
        self, steps: int, *, shown: bool, log: Path | None = None, console: Console | None = None
    ) -> None:
        """
        Args:
            steps: of the whole run.
            shown: whether this rank shows anything.
            log: a file that also gets every line, with the time of day; see `log_to`.
            console: where lines are shown; default: standard output.
        """
        super().__init__()
        self._steps = steps
        self._shown = shown
        self._log = log
        self._held: list[str] = []

        # A notebook shows plain lines too: rich would make an output of its own of each.
        self._console = console or Console(quiet=not shown, soft_wrap=True, force_jupyter=False)
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
            # Seldom: the thread that draws shares the interpreter with the training.
            refresh_per_second=4,
            # At the end the bar goes, and the lines above it stay.
            transient=True,
            disable=not self._live,
        )
        self._task = self._bar.add_task("", total=steps)
        self._heldout = "-"
        self._stages: list[str] = []
        self._rows = 0
        self.detail: Callable[[], str] = lambda: ""
        """Returns what the present stage has done so far, in a few words."""
        self._heartbeat = Heartbeat(self._long_stage, self.say)

    def __enter__(self) -> RunProgress:
        self._bar.start()
        if self._shown and not self._live:
            # The bar moves by itself; without it nothing is shown between two steps.
            self._heartbeat.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        # Also where it has not begun: it then does nothing.
        self._heartbeat.__exit__()
        self._bar.stop()

    def _long_stage(self) -> str:
        """Returns the heartbeat's line, "" while the present stage is not long."""
        _, _, seconds = self.at()
        if seconds < HEARTBEAT_SECONDS:
            return ""
        return self.stage_line()

    def stage_line(self) -> str:
        """Returns the present stage, its time so far, and what it has done; "" between stages."""
        _, name, seconds = self.at()
        if not name:
            return ""
        line = f"{name} {seconds:.0f} s"
        if detail := self.detail():
            line += f": {detail}"
        return line

    def say(self, line: str) -> None:
        """Shows one line of text, and logs it."""
        self._show(line)
        self.note(line)

    def _show(self, line: str) -> None:
        """Shows one line of text on the terminal alone."""
        if self._shown:
            # As it is: rich would take what stands in brackets for markup.
            self._console.print(line, highlight=False, markup=False, emoji=False)

    def note(self, line: str) -> None:
        """Logs one line of text, and does not show it."""
        if not self._shown:
            return
        self._held.append(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {line}\n")
        if self._log is not None:
            self.log_to(self._log)

    def log_to(self, file: Path) -> None:
        """Makes this file get every line from now on, and those that were shown before.

        A run's log is in its directory, where nothing is written before the run has been accepted.
        """
        self._log = file
        if not self._held:
            return

        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as log:
                log.write("".join(self._held))
        except OSError:
            # The terminal has the line. It is tried again with the next one: a full disk may get
            # room, and a log that cannot be written ends no run.
            self._held = self._held[-_HELD_LINES:]
        else:
            self._held = []

    def step_done(
        self, step: int, metrics: Mapping[str, float], seconds: Mapping[str, float]
    ) -> None:
        """Shows the line of a finished step, or on a terminal its row of the table."""
        self._bar.update(self._task, completed=step)

        cells = {name: _number(metrics.get(key, math.nan), text) for name, key, text in _COLUMNS}
        cells["held-out"] = self._heldout
        figures = "  ".join(f"{name} {value}" for name, value in cells.items())
        stages = "  ".join(f"{name} {value:.1f}" for name, value in seconds.items())
        # The number as wide as the last step's, so that lines are aligned.
        line = f"step {step:{len(str(self._steps))}d}  {figures}  |  {stages} s"

        # The log has the same line whatever the terminal shows.
        self.note(line)
        if not self._live:
            self._show(line)
            return

        # A table on the terminal, with a column per stage where it is wide enough for them.
        if not self._stages:
            # The first row decides for the whole run: a table does not change its columns.
            self._stages = [*seconds, "seconds"]
            heading = _row({name: name for name in ["step", *cells, *self._stages]})
            if len(heading) > self._console.width:
                self._stages = ["seconds"]

        if self._rows % _HEADING_EVERY == 0:
            self._show(_row({name: name for name in ["step", *cells, *self._stages]}))
        self._rows += 1

        spent = {**seconds, "seconds": sum(seconds.values())}
        times = {name: _number(spent.get(name, math.nan), "{:.1f}") for name in self._stages}
        self._show(_row({"step": str(step), **cells, **times}))

    def evaluation_done(
        self, step: int, accuracy: float, standard_error: float, problems: int, seconds: float
    ) -> None:
        """Shows the line of an evaluation.

        The next steps' lines repeat its accuracy and its step.
        """
        self._heldout = f"{accuracy:.3f}@{step}"
        self.say(
            f"held-out accuracy after {step} steps: {accuracy:.3f} +- {standard_error:.3f} "
            f"on {problems} problems ({seconds:.1f} s)"
        )


class _StageColumn(ProgressColumn):
    """The part of the bar that shows the present stage."""

    def __init__(self, progress: RunProgress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Task) -> Text:
        """Returns the text of the column; rich calls this at each refresh."""
        return Text(self._progress.stage_line(), style="cyan")


def _row(cells: Mapping[str, str]) -> str:
    """Returns the cells, each as wide as the name of its column or as what it may hold."""
    widths = {name: max(len(name), _WIDTHS.get(name, 5)) for name in cells}
    return "  ".join(f"{value:>{widths[name]}}" for name, value in cells.items())


def _number(value: float, text: str) -> str:
    # NaN: the step has no such figure, as of accuracy before the first evaluation.
    if not math.isfinite(value):
        return "-"
    return text.format(value)


@contextmanager
def profile_step(step: int, steps: Collection[int], directory: Path) -> Iterator[None]:
    """Writes a torch profiler trace (for ui.perfetto.dev) of a step that is among `steps`."""
    if step not in steps:
        yield
        return

    directory.mkdir(parents=True, exist_ok=True)
    # Of the CPU, and of CUDA where there is one.
    with profile() as trace:
        yield
    trace.export_chrome_trace(str(directory / f"step-{step:05d}.json"))
