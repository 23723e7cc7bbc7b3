"""What the benchmarks share: side-by-side timing, the line that describes the machine,
and tables that can be kept as files and compared with earlier ones.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


def processor() -> str:
    """Returns the name of the GPU, or of the CPU with its number of cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        facts = {
            name.strip(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
    # bf16 is several times slower on a CPU without AMX, so the name says which it is.
    name = facts.get("model name", "unknown processor")
    if "amx_bf16" in facts.get("flags", ""):
        name += ", AMX bf16"
    return f"{name}, {os.cpu_count()} cores"


def versions() -> dict[str, str]:
    """Returns the versions of Python, torch and megatron-core."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": importlib.metadata.version("megatron-core"),
    }


def describe() -> str:
    """Returns one line: processor or GPU, threads, versions."""
    facts = [processor()]
    if not torch.cuda.is_available():
        facts.append(f"{torch.get_num_threads()} threads a process")
    facts += [f"{name} {version}" for name, version in versions().items()]
    return ", ".join(facts)


def add_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    """Adds the options of every benchmark that times paths in turn."""
    parser.add_argument(
        "--rounds", type=int, default=rounds, help="timed rounds, after one that warms up"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="torch threads of a process; 0: torch's choice"
    )
    parser.add_argument(
        "--cpu-time", action="store_true", help="processor time of one thread, for a busy machine"
    )
    add_result_options(parser)


def add_result_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a benchmark's results: to keep them, and to compare with kept ones."""
    parser.add_argument(
        "--json", type=_new_file, metavar="FILE", help="write the results to this file as well"
    )
    parser.add_argument(
        "--against",
        type=_read_results,
        metavar="FILE",
        help="print the ratio of each figure to that of this earlier file of --json",
    )


def _new_file(word: str) -> Path:
    # Looked at before anything is measured, which may take an hour.
    file = Path(word)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no directory {file.parent}; make it first")
    return file


def _read_results(word: str) -> dict[str, Any]:
    try:
        results = json.loads(Path(word).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{word} cannot be read ({error}); name a file that --json wrote"
        ) from None
    if not isinstance(results, dict) or not {"machine", "tables"} <= results.keys():
        raise argparse.ArgumentTypeError(
            f"{word} is no file of results; name one that --json wrote"
        )
    return {**results, "file": word}


def apply_options(options: argparse.Namespace) -> None:
    """Sets the threads. Processor time needs a single one: idle threads spin."""
    if options.cpu_time:
        torch.set_num_threads(1)
    elif options.threads:
        torch.set_num_threads(options.threads)


def interleaved(
    paths: Mapping[str, Callable[[], Callable[[], Any]]], options: argparse.Namespace
) -> dict[str, float]:
    """Seconds of each path, the fastest of the rounds.

    Calling a path prepares it outside the clock and returns what is timed. Every round times all of
    them in turn, so that a busy neighbour hits all alike; a first round warms up.
    """
    clock = time.perf_counter
    if options.cpu_time:
        clock = time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(1 + options.rounds):
        for name, prepare in paths.items():
            run = prepare()
            torch.cuda.synchronize()  # nothing to wait for on a CPU (megatron_real.parallel.cpu)
            start = clock()
            run()
            torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return {name: min(values[1:]) for name, values in seconds.items()}


def show(title: str, rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> None:
    """Prints rows of equal keys as a table; writes and compares them where that is asked for.

    The first column names the row. `--json` writes all tables that were shown so far, `--against`
    prints a second table of the figures now, before, and their ratio.
    """
    console = Console(width=120)
    console.print(title, style="bold", highlight=False)
    console.print(_table(rows))
    console.print(describe(), style="dim", highlight=False)

    if options.json is not None:
        tables = vars(options).setdefault("tables", [])
        tables.append({"title": title, "rows": list(rows)})
        results = {
            "machine": processor(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "tables": tables,
        }
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    if options.against is not None:
        compared = compare(title, rows, options.against)
        console.print(f"Now / before = ratio, before: {options.against['file']}", style="bold")
        if compared:
            console.print(_table(compared))
        else:
            console.print(f"It has no table with the title '{title}' and these rows.")
        if options.against["machine"] != processor():
            console.print(
                f"It was measured on another processor, {options.against['machine']}: "
                "seconds do not compare, ratios within one run do."
            )


def compare(
    title: str, rows: Sequence[Mapping[str, Any]], earlier: Mapping[str, Any]
) -> list[dict[str, str]]:
    """Returns a row of "now / before = ratio" for each row that the earlier results have too.

    Rows belong together by the value of their first column, and equal values in their order.
    Only figures, which are floats, are compared.

    Args:
        title: of the table, the same in the earlier results.
        rows: of the table, as measured now.
        earlier: what `--json` wrote.
    """
    before: dict[str, list[Mapping[str, Any]]] = {}
    for table in earlier["tables"]:
        if table["title"] == title:
            for row in table["rows"]:
                before.setdefault(str(next(iter(row.values()))), []).append(row)

    compared = []
    for row in rows:
        first, name = next(iter(row.items()))
        candidates = before.get(str(name))
        if not candidates:
            continue
        # Taken in turn: several rows may have one name, as of several sizes.
        old = candidates.pop(0)
        cells = {first: str(name)}
        for column, value in row.items():
            old_value = old.get(column)
            # Whole numbers are sizes and counts, which the user asked for. JSON may have made one
            # of an earlier float.
            if isinstance(value, float) and isinstance(old_value, int | float):
                ratio = "-"
                if old_value:
                    ratio = f"{value / old_value:.2f}"
                cells[column] = f"{_cell(value)} / {_cell(float(old_value))} = {ratio}"
        compared.append(cells)
    return compared


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table()
    # The first column names the row, the others are figures.
    first, *others = rows[0]
    table.add_column(first, justify="left")
    for name in others:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if value < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}"
