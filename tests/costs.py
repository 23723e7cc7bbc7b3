"""What each test costs: seconds of CPU time of pytest and of all processes below it,
and of the clock.

A busy machine slows a test's clock down much more than it adds to its work, so tests are compared
by their CPU time.

    pytest --costs FILE          adds a line for each test to the file, and shows a table at the end
    python -m tests.costs FILE   shows that table of a file, of a run that was broken off too
"""

from __future__ import annotations

import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time of a process, of its children that have ended,
    and of all that live below it.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:  # it has ended meanwhile; its parent counts it from now on
        return 0.0

    children: list[str] = []
    for thread in threads:
        # A thread that ends meanwhile takes nothing along: the process is still counted.
        with suppress(OSError):
            children += Path(f"/proc/{pid}/task/{thread}/children").read_text().split()

    # utime, stime, cutime and cstime: fields 14 to 17 of proc(5); the text after the name begins
    # with field 3.
    ticks = sum(int(field) for field in fields[11:15])
    return ticks / TICKS_PER_SECOND + sum(cpu_seconds(int(child)) for child in children)


def name_of(node: str) -> str:
    """Returns a test's name without the group that pytest-xdist adds to it.

    An "@" within the brackets of a parameter is the test's own.
    """
    name, at, group = node.rpartition("@")
    if at and "]" not in group:
        return name
    return node


@dataclass
class Cost:
    """CPU and clock seconds of one test, its fixtures included."""

    cpu: float
    clock: float


class Recorder:
    """A pytest plugin that measures each test, its fixtures included."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        cpu_before = cpu_seconds(os.getpid())
        clock_before = time.monotonic()

        result = yield

        cpu = cpu_seconds(os.getpid()) - cpu_before
        clock = time.monotonic() - clock_before
        with self._file.open("a") as lines:
            lines.write(f"{cpu:.2f}\t{clock:.2f}\t{name_of(item.nodeid)}\n")
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("costs")
        terminalreporter.write(table(read(self._file)))


def read(file: Path) -> dict[str, Cost]:
    """Returns the last costs of each test in a file."""
    costs: dict[str, Cost] = {}
    if not file.exists():  # no test has ended yet
        return costs
    for line in file.read_text().splitlines():
        cpu, clock, test = line.split("\t")
        costs[test] = Cost(float(cpu), float(clock))
    return costs


def table(costs: dict[str, Cost], *, shown: int = 40) -> str:
    """Returns a table of the files, and of the `shown` tests that cost most."""
    files: dict[str, list[Cost]] = defaultdict(list)
    for test, cost in costs.items():
        files[test.partition("::")[0]].append(cost)

    lines = ["  CPU s  clock s  tests  file"]
    for file, of_file in sorted(files.items(), key=lambda pair: -sum(c.cpu for c in pair[1])):
        cpu = sum(c.cpu for c in of_file)
        clock = sum(c.clock for c in of_file)
        lines.append(f"{cpu:7.1f}  {clock:7.1f}  {len(of_file):5d}  {file}")

    cpu = sum(c.cpu for c in costs.values())
    clock = sum(c.clock for c in costs.values())
    lines += [f"{cpu:7.1f}  {clock:7.1f}  {len(costs):5d}  all", "", "  CPU s  clock s  test"]
    for test, cost in sorted(costs.items(), key=lambda pair: -pair[1].cpu)[:shown]:
        lines.append(f"{cost.cpu:7.1f}  {cost.clock:7.1f}  {test}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(read(Path(sys.argv[1]))))
