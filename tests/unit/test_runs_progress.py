"""What a run shows on a terminal and in a plain log, the times of its stages, and
profiler traces.
"""

from __future__ import annotations

import io
import json
import math
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from megatron_real import progress as module
from megatron_real.progress import RunProgress, StageTimer, profile_step

METRICS = {
    "reward_mean": 0.5,
    "loss": 1.25,
    "solved_share": 0.25,
    "one_class_share": 0.375,
    "response_tokens_mean": 31.6,
    "grad_norm": math.nan,
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replaces the clock by one that the test moves."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_stage_that_comes_twice_adds_up_and_the_sums_are_taken_once(clock: list[float]) -> None:
    timer = StageTimer()
    for name, seconds in (("rollout", 2.0), ("update", 1.0), ("rollout", 0.5)):
        with timer.stage(name):
            clock[0] += seconds
        clock[0] += 10  # between stages
    assert timer.take_seconds() == {"rollout": 2.5, "update": 1.0}
    assert timer.take_seconds() == {}


def test_a_stage_that_fails_is_timed_and_over(clock: list[float]) -> None:
    timer = StageTimer()
    with pytest.raises(RuntimeError), timer.stage("rollout"):
        clock[0] += 3
        raise RuntimeError
    assert timer.take_seconds() == {"rollout": 3.0}
    assert timer.current is None


def test_a_plain_log_is_one_line_a_step_without_control_characters() -> None:
    file = io.StringIO()
    console = Console(file=file, soft_wrap=True, force_terminal=False)
    with RunProgress(20, shown=True, console=console) as progress:
        with progress.stage("rollout"):
            pass
        progress.step_done(1, METRICS, {"rollout": 1.26, "update": 0.5})
        progress.evaluation_done(1, 0.625, 0.03, 300, 2.0)
        progress.step_done(2, METRICS, {"rollout": 1.0})
    text = file.getvalue()

    assert re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text) is None
    assert text.splitlines() == [
        "step  1  reward 0.500  held-out -  loss 1.250  solved 0.25  one-class 0.38  "
        "tokens 32  grad -"
        "  |  rollout 1.3  update 0.5 s",
        "held-out accuracy after 1 steps: 0.625 +- 0.030 on 300 problems (2.0 s)",
        "step  2  reward 0.500  held-out 0.625@1  loss 1.250  solved 0.25  one-class 0.38  "
        "tokens 32  grad -"
        "  |  rollout 1.0 s",
    ]


@pytest.mark.parametrize(
    "width, stages", [pytest.param(140, True, id="wide"), pytest.param(85, False, id="narrow")]
)
def test_a_terminal_gets_columns_under_one_heading_and_the_present_stage(
    clock: list[float], width: int, stages: bool
) -> None:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    with RunProgress(20, shown=True, console=console) as progress:
        with progress.stage("rollout"):
            clock[0] += 7
            progress._bar.refresh()
        for step in (1, 2):
            progress.step_done(step, METRICS, {"rollout": 7.0, "update": 0.5})
    text = file.getvalue()

    assert "rollout 7 s" in text and "0/20" in text and "2/20" in text
    assert text.count("one-class") == 1

    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line).rstrip() for line in text.splitlines()]
    heading = next(line for line in lines if "one-class" in line)
    first = next(line for line in lines if line.startswith("    1  "))
    for name, value in (("one-class", "0.38"), ("grad", "-"), ("seconds", "7.5")):
        assert heading.index(name) + len(name) == first.rindex(value) + len(value), (
            f"column {name} lines up"
        )

    expected_names = ["rollout", "update", "seconds"] if stages else ["seconds"]
    expected_values = ["7.0", "0.5", "7.5"] if stages else ["7.5"]
    assert heading.split()[8:] == expected_names
    assert first.split()[8:] == expected_values


def test_a_rank_that_shows_nothing_still_measures(
    clock: list[float], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with RunProgress(20, shown=False, log=tmp_path / "run.log") as progress:
        with progress.stage("rollout"):
            clock[0] += 2
        progress.say("hello")
        progress.step_done(1, METRICS, {})
    assert capsys.readouterr().out == "" and not (tmp_path / "run.log").exists()
    assert progress.take_seconds() == {"rollout": 2.0}


def test_by_itself_a_log_is_plain_and_its_lines_are_not_wrapped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with RunProgress(20, shown=True) as progress, progress.stage("rollout"):
        progress.step_done(1, METRICS, {f"stage_{i}": 1.0 for i in range(20)})
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and len(out) > 300 and "\x1b" not in out


def test_every_line_is_kept_in_the_log_with_its_time(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "run.log"
    file = io.StringIO()
    progress = RunProgress(2, shown=True, log=log, console=Console(file=file))
    progress.say("[bold] is text :smile:")
    assert file.getvalue() == "[bold] is text :smile:\n"
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \[bold\] is text :smile:\n", log.read_text()
    )


def test_the_trace_of_a_chosen_step_has_a_range_for_each_stage(tmp_path: Path) -> None:
    timer = StageTimer()
    for step in (1, 2, 3):
        with profile_step(step, (2,), tmp_path / "profile"):
            for name in ("rollout", "update"):
                with timer.stage(name):
                    pass
    assert [p.name for p in (tmp_path / "profile").iterdir()] == ["step-00002.json"]
    trace = json.loads((tmp_path / "profile" / "step-00002.json").read_text())
    assert {"rollout", "update"} <= {event.get("name") for event in trace["traceEvents"]}


def test_the_log_is_the_same_whatever_terminal_there_was(tmp_path: Path) -> None:
    logs = []
    for terminal in (True, False):
        log = tmp_path / f"{terminal}.log"
        console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
        with RunProgress(2, shown=True, log=log, console=console) as progress:
            progress.evaluation_done(0, 0.25, 0.01, 10, 1.0)
            progress.step_done(1, METRICS, {"rollout": 1.0})
        logs.append([line[21:] for line in log.read_text().splitlines()])
    assert logs[0] == logs[1]
    assert "held-out 0.250@0" in logs[0][1]


def test_a_terminal_of_80_columns_holds_a_row_and_its_heading_comes_again() -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    with RunProgress(1000, shown=True, console=console) as progress:
        progress.evaluation_done(1000, 0.25, 0.01, 10, 1.0)
        for step in range(1, 42):
            progress.step_done(step, METRICS, {"rollout": 1000.0})
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    lines = [line.rpartition("\r")[2] for line in text.split("\n")]
    headings = [line for line in lines if "one-class" in line]
    assert len(headings) == 3
    assert max(len(line.rstrip()) for line in lines if "0.250@1000" in line) <= 80


def test_a_long_stage_logs_its_progress(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.05)
    file = io.StringIO()
    with RunProgress(2, shown=True, console=Console(file=file)) as progress:
        progress.detail = lambda: "3 of 8 rollouts"
        with progress.stage("rollout"):
            clock[0] += 7
            deadline = time.monotonic() + 60
            while "3 of 8" not in file.getvalue() and time.monotonic() < deadline:
                time.sleep(0.01)
    assert file.getvalue().startswith("rollout 7 s: 3 of 8 rollouts\n")
