"""`megatron-real compare SWEEP.yaml`: trains variants with several seeds, and compares them.

Everything is checked before the first run starts. docs/compare.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from megatron_real.commands.arguments import add_overrides
from megatron_real.commands.terminal import input_checks, say, table
from megatron_real.compare.execute import Executor, sweep_lock
from megatron_real.compare.results import RunOutcome, RunResult, read_result
from megatron_real.compare.sweep import Sweep, load_sweep
from megatron_real.errors import INTERRUPTED, STOPPED_EARLY
from megatron_real.runs.summary import duration

SUMMARY = "train variants of a configuration with several seeds, and compare them"
EXAMPLES = """\
examples:
  megatron-real compare examples/configs/compare/quickstart.yaml --nproc 2
  megatron-real compare sweep.yaml --list          the runs and their commands
  megatron-real compare sweep.yaml --table --json  what is there; starts nothing
  sbatch --array=0-17 examples/compare.sh          each run as a job

The same command goes on where the sweep was stopped. A run that diverged or
failed is counted and not started again; delete its directory for another try.

exit codes: 0 all runs have finished; 1 some diverged or failed, or (--table)
are not finished; 2 the input was refused; 75 stopped early, start the same
command again; 130 interrupted
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("sweep", help="YAML file with base, out, seeds, budget and variants")
    add_overrides(parser, of="in all runs")
    parser.add_argument(
        "--nproc", type=int, metavar="N", help="processes of each run; default: one"
    )

    # One of these at most: each looks at the sweep and starts none of its runs.
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--list", action="store_true", help="number the runs and show their commands"
    )
    instead.add_argument(
        "--table", action="store_true", help="show what there is so far; start nothing"
    )
    instead.add_argument(
        "--describe",
        type=int,
        metavar="NUMBER",
        help="print one run as NAME=VALUE lines, for examples/compare.sh",
    )

    parser.add_argument(
        "--json", action="store_true", help="print the table, and every run, as JSON"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the sweep; returns the exit code."""
    # Only what is refused before a run starts is an error of the input.
    with input_checks():
        sweep = _checked(options)
        if options.describe is not None:
            print(_description(sweep, options.describe))
            return 0

    if options.list:
        for number, run in enumerate(sweep.runs):
            command = shlex.join(["megatron-real", "train", str(run.base), *run.overrides])
            print(f"{number}  {command}")
        return 0
    if options.table:
        results = [read_result(run) for run in sweep.runs]
        # Without the lock: a sweep that is at work may be looked at.
        _show(sweep, results, as_json=options.json)
        return _exit_code(results)

    try:
        return _execute(sweep, options)
    except KeyboardInterrupt:
        say("interrupted; the same command goes on with the sweep")
        return INTERRUPTED


def _checked(options: argparse.Namespace) -> Sweep:
    """Returns the sweep with every run's configuration checked.

    Raises:
        ValueError: an option or a configuration is refused.
    """
    # A run in this process, before, leaves a world of one.
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "compare starts its own processes, but torchrun or srun has started this one as one of "
            f"{os.environ['WORLD_SIZE']}; start it alone, with --nproc"
        )
    if options.nproc is not None and options.nproc < 1:
        raise ValueError(f"--nproc is {options.nproc}; it must be 1 or above")

    # A single run of an array is laid out by its job, whose processes are not known here.
    num_ranks = None
    if options.describe is None and not options.list and not options.table:
        num_ranks = options.nproc or 1
    return load_sweep(options.sweep, options.overrides, num_ranks=num_ranks)


def _execute(sweep: Sweep, options: argparse.Namespace) -> int:
    """Starts what is not done yet, run by run; returns the exit code."""
    # What the table needs, scipy among it, is missing now or never.
    import megatron_real.compare.table  # noqa: F401

    results: list[RunResult] = []
    with (
        sweep_lock(sweep.out, say) as lock,
        Executor(sweep.out / "logs", lock, num_ranks=options.nproc, say=say) as executor,
    ):
        # In the sweep's order, one after the other: each run has the whole machine.
        for number, run in enumerate(sweep.runs, 1):
            if executor.asked_to_stop:
                return _stopped()
            result = read_result(run)
            # What has diverged or failed stays so: the same command would only repeat it.
            is_due = result.outcome == RunOutcome.UNFINISHED
            if is_due:
                log = executor.log(run)
                say(f"run {number} of {len(sweep.runs)}: {run.name} (log: {log})")
                code = executor.execute(run)
                result = read_result(run)
                # Ctrl-C reaches the run too, which has saved and said so: the sweep ends with it.
                if code == INTERRUPTED:
                    raise KeyboardInterrupt
                unfinished = result.outcome == RunOutcome.UNFINISHED
                # 75: the run has saved. A signal may also end it too early for that; either way the
                # same command goes on with it.
                if code == STOPPED_EARLY or (executor.asked_to_stop and unfinished):
                    return _stopped()
                if unfinished:
                    result = _failed_now(result, code, log)

            say(_in_words(result))
            results.append(result)
            # On standard error: standard output gets one table, at the end. What an earlier start
            # has done brings no new one.
            if is_due and len(results) < len(sweep.runs) and not options.json:
                _print_table(sweep, results, file=sys.stderr)

    _show(sweep, results, as_json=options.json)
    return _exit_code(results)


def _exit_code(results: Sequence[RunResult]) -> int:
    if all(result.outcome == RunOutcome.FINISHED for result in results):
        return 0
    return 1


def _stopped() -> int:
    say("the sweep has stopped early; the same command goes on with it")
    return STOPPED_EARLY


def _failed_now(result: RunResult, code: int, log: Path) -> RunResult:
    """Returns the result of a run that ended without a word of its own, with the log's last line.

    The next start of the sweep tries such a run again.
    """
    ended = f"exit code {code}"
    if code < 0:
        ended = f"signal {-code}"
    # The log has what all libraries print, in whatever bytes.
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [line for line in lines if line.strip()]
    last_line = f"{log} is empty"
    if lines:
        last_line = lines[-1].removeprefix("megatron-real: ")
    reason = f"it ended with {ended}; {last_line}"
    return dataclasses.replace(result, outcome=RunOutcome.FAILED, reason=reason)


def _in_words(result: RunResult) -> str:
    """Returns one run's result as a sentence."""
    if result.outcome != RunOutcome.FINISHED:
        return f"{result.name}: {result.outcome} after {result.steps} steps: {result.reason}"
    return (
        f"{result.name}: finished, accuracy {result.accuracy:.3f}, reward {result.reward:.3f}, "
        f"{duration(result.seconds)} in steps"
    )


def _show(sweep: Sweep, results: Sequence[RunResult], *, as_json: bool) -> None:
    """Writes the table's files and prints it."""
    from megatron_real.compare import table as tables

    if sweep.out.is_dir():  # not where nothing has begun
        tables.write_table(sweep, results)
    if as_json:
        print(json.dumps(tables.as_json(sweep, results), indent=2))
        return

    _print_table(sweep, results)
    for result in results:
        if result.outcome in (RunOutcome.DIVERGED, RunOutcome.FAILED):
            print(_in_words(result))
    if sweep.out.is_dir():
        print(f"the same with every run: {sweep.out}/table.json and table.csv")


def _print_table(sweep: Sweep, results: Sequence[RunResult], file: TextIO | None = None) -> None:
    """Prints the tables of what there is so far; default: to standard output."""
    from megatron_real.compare.table import FIGURES, figure_table, runs_table, variant_rows

    rows = variant_rows(sweep, results)
    # A figure that no run has yet has no cells.
    tables = [runs_table(rows), *(figure_table(figure, rows) for figure in FIGURES)]
    text = "\n\n".join(table(cells) for cells in tables if cells)
    print(f"{text}\n", file=file or sys.stdout, flush=True)


def _description(sweep: Sweep, number: int) -> str:
    """Returns one run in the variables of the Slurm scripts.

    OUTCOME and OVERRIDES are read by examples/slurm/sweep.sh and words.sh.

    Raises:
        ValueError: the sweep has no run of that number.
    """
    if not 0 <= number < len(sweep.runs):
        raise ValueError(
            f"there is no run {number}; the sweep has {len(sweep.runs)}, from 0: "
            f"sbatch --array=0-{len(sweep.runs) - 1}"
        )

    run = sweep.runs[number]
    # A line for each, as `read` takes them in examples/slurm/sweep.sh: the first "=" ends the name.
    values = {
        "OUTCOME": str(read_result(run).outcome),
        "CONFIG": str(run.base),
        "RUN_DIR": run.config.trainer.run_dir,
        "MODEL": run.config.model.path,
        "TRAIN": run.config.data.train,
        "HELDOUT": run.config.data.heldout,
        "OVERRIDES": shlex.join(run.overrides),
    }
    return "\n".join(f"{name}={value}" for name, value in values.items())
