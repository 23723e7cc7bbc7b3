"""`megatron-real report RUN_DIR...`: one HTML file about runs, which opens without a network."""

from __future__ import annotations

import argparse
import importlib.util
import time
from pathlib import Path

from megatron_real.commands.arguments import add_evaluations
from megatron_real.commands.terminal import input_checks, say
from megatron_real.disk import write_whole
from megatron_real.report.page import report_page
from megatron_real.report.variants import Run, read_run

SUMMARY = "write one HTML page about runs: curves, time, faults, evaluations, rollouts"
EXAMPLES = """\
examples:
  megatron-real report runs/first
  megatron-real report runs/real-1 runs/real-2 runs/grpo-1 --out compared.html
  megatron-real report runs/first --steps 1 40 60 --eval runs/eval/first
  megatron-real report runs/first --watch 60   again every minute of the run

needs Bokeh and Jinja: pip install 'megatron_real[report]'
"""

_PACKAGES = ("bokeh", "jinja2")


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="directory of a run")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="default: report.html")
    add_evaluations(parser)
    parser.add_argument(
        "--steps",
        nargs="+",
        type=int,
        default=[],
        metavar="STEP",
        help="steps whose rollouts are shown; default: up to 40, evenly spaced",
    )
    parser.add_argument(
        "--megabytes",
        type=float,
        default=5.0,
        metavar="X",
        help="limit of the file's size; rollouts take what is left (default: 5)",
    )
    parser.add_argument(
        "--watch", type=float, default=0.0, metavar="SECONDS", help="write it again and again"
    )


def run(options: argparse.Namespace) -> int:
    """Writes the report; returns the exit code."""
    out = Path(options.out)
    try:
        with input_checks():
            _check(options, out)
            runs = _write(options, out)
            # A run that has ended gets no more rows: the last page is the whole one. One that was
            # killed without a word still says running: Ctrl-C ends the loop.
            while options.watch > 0 and any(run.status.get("state") == "running" for run in runs):
                time.sleep(options.watch)
                runs = _write(options, out)
    except KeyboardInterrupt:
        say(f"stopped watching; {out} is as it was last written")

    return 0


def _check(options: argparse.Namespace, out: Path) -> None:
    """Raises ValueError where an option is refused or a package is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{' and '.join(missing)} is not installed; `pip install 'megatron_real[report]'`"
        )
    if out.is_dir():
        raise ValueError(f"--out is {out}, a directory; give a file such as {out}/report.html")
    # In this form NaN is refused, too: it is neither above 0 nor below.
    if not options.megabytes > 0:
        raise ValueError(f"--megabytes is {options.megabytes}; it must be above 0")
    if not options.watch >= 0:
        raise ValueError(f"--watch is {options.watch}; it must be at least 0")


def _write(options: argparse.Namespace, out: Path) -> list[Run]:
    """Writes the page of what the runs have by now, and returns them."""
    runs = [read_run(path) for path in options.run_dirs]
    page = report_page(
        runs,
        evaluations=options.evaluations,
        steps=options.steps,
        max_bytes=int(options.megabytes * 1e6),
    )
    write_whole(out, page)
    print(f"{out}  {len(page.encode()) / 1e6:.1f} MB")
    return runs
