"""What the benchmarks share: side-by-side timing, the line that describes the machine,
and a table with a JSON twin.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def describe() -> str:
    """One line: processor or GPU, threads, versions."""
    versions = (
        f"torch {torch.__version__}, megatron-core {importlib.metadata.version('megatron-core')}"
    )
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {versions}"
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        facts = {
            name.strip(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
    amx = ", AMX bf16" if "amx_bf16" in facts.get("flags", "") else ""
    name = facts.get("model name", "unknown processor")
    threads = torch.get_num_threads()
    return f"{name}{amx}, {os.cpu_count()} cores, {threads} threads a process, {versions}"


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """The options of every benchmark."""
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="timed rounds, after one that warms up"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="torch threads of a process; 0: torch's choice"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of one thread, for a busy machine"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of tables")


def apply_options(options: argparse.Namespace) -> None:
    """Sets the threads. Processor time needs a single one: idle threads spin."""
    if options.cpu_time or options.threads:
        torch.set_num_threads(1 if options.cpu_time else options.threads)


def interleaved(
    paths: Mapping[str, Callable[[], Callable[[], Any]]], options: argparse.Namespace
) -> dict[str, float]:
    """Seconds of each path, the fastest of the rounds.

    Calling a path prepares it outside the clock and returns what is timed. Every round times all of
    them in turn, so that a busy neighbour hits all alike; a first round warms up.
    """
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(1 + options.rounds):
        for name, prepare in paths.items():
            run = prepare()
            torch.cuda.synchronize()  # nothing to wait for on a CPU (megatron_real.cpu)
            start = clock()
            run()
            torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: min(values[1:]) for name, values in seconds.items()}


def show(title: str, rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Prints rows of equal keys as a table, or as one line of JSON."""
    if options.json:
        print(json.dumps({"title": title, "machine": describe(), "rows": list(rows)}))
        return
    table = Table()
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    console = Console(width=120)
    console.print(title, style="bold", highlight=False)
    console.print(table)
    console.print(describe(), style="dim", highlight=False)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
