"""`megatron-real labels`: how a verifier judges known answers, and which golds nobody can match.

    megatron-real labels check FILE [--verifier math_verify] [--json]
    megatron-real labels golds FILE [--split NAME] [--json]

FILE of `check` is JSONL of rows with completion, gold (text or a list), expected (a status, or true
and false) and perhaps kind and id; of `golds`, any file of problems that a run can train on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_real.commands.terminal import hanging, input_checks
from megatron_real.labels.golds import kind_of, unmatchable
from megatron_real.labels.pool import Check, VerifierPool
from megatron_real.labels.verifiers import check_name
from megatron_real.prompts.rows import read_rows

SUMMARY = "measure a verifier on known answers, and find gold answers nobody can match"
EXAMPLES = """\
examples:
  megatron-real labels check answers.jsonl
  megatron-real labels golds data/train.jsonl

exit codes: 0 all as expected, 1 a row was judged otherwise, 2 the input was
refused
"""

_MAX_SHOWN = 20
_MAX_GOLD = 60  # characters of a gold answer: one without spaces still fits a line of 80 columns


@dataclass(frozen=True)
class Known:
    """A completion and the status that its check should have."""

    name: str
    """The row's id, or its line."""
    kind: str
    """The row's kind, or what the gold answer is read as."""
    completion: str
    """The whole text."""
    golds: tuple[str, ...]
    """Accepted gold answers."""
    expected: str
    """A status; `ok` and `not ok` where the row says true and false."""

    def is_met(self, status: str) -> bool:
        """Returns whether a check ended as it should."""
        if self.expected == "not ok":
            return status != "ok"
        return status == self.expected


@dataclass
class Tally:
    """Counts of the rows of one kind, or of all."""

    rows: int = 0
    """Rows checked."""
    as_expected: int = 0
    """Rows whose status was the expected one."""
    false_positives: int = 0
    """`ok` where it should not have been."""
    false_negatives: int = 0
    """Anything but `ok` where that was expected."""

    def add(self, known: Known, status: str) -> None:
        """Counts one row."""
        self.rows += 1
        self.as_expected += known.is_met(status)
        self.false_positives += status == "ok" and known.expected != "ok"
        self.false_negatives += status != "ok" and known.expected == "ok"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    commands = parser.add_subparsers(dest="what", required=True)
    check = commands.add_parser("check", help="a verifier over rows whose verdict is known")
    check.add_argument("file", help="JSONL of completion, gold, expected and perhaps kind")
    check.add_argument("--verifier", default="math_verify", help="as labels.verifier")
    check.add_argument("--workers", type=int, default=2, help="verifier processes")
    check.add_argument("--timeout-seconds", type=float, default=10.0, help="of one check")
    check.add_argument("--memory-mib", type=int, default=1024, help="of one worker")
    check.add_argument("--require-think", action="store_true", help="as labels.require_think")
    check.add_argument("--no-box", action="store_true", help="as labels.require_boxed=false")

    golds = commands.add_parser("golds", help="gold answers of a data set that nobody can match")
    golds.add_argument("file", help="problems: JSONL, parquet, or a saved HF dataset")
    golds.add_argument("--split", default="", help="of a folder that has several")

    for command in (check, golds):
        command.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Runs one of the commands.

    Returns:
        The exit code: 0 done, 1 a row was judged otherwise than expected, 2 the input was refused.
    """
    with input_checks():
        if options.what == "check":
            return _check(options)
        return _golds(options)


def known_rows(path: Path) -> list[Known]:
    """Returns the rows of a file for `labels check`.

    Raises:
        ValueError: there is no such file, or a line is none of its rows; names the line.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no file {str(path)!r}; give JSONL of completion, gold and expected"
        )
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(_known(json.loads(line), number))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is no object with completion, gold and expected ({error})"
            ) from error
    if not rows:
        raise ValueError(f"{str(path)!r} is empty; give JSONL of completion, gold and expected")
    return rows


def _known(row: Any, number: int) -> Known:
    """Returns what a line of the file says.

    Raises:
        KeyError, TypeError: it lacks something, or is no object.
    """
    golds = row["gold"]
    if not isinstance(golds, list):
        golds = [golds]
    golds = tuple(str(gold) for gold in golds)

    expected = row["expected"]
    # `is`, because 1 == True, and a 1 is no verdict.
    if expected is True:
        expected = "ok"
    elif expected is False:
        expected = "not ok"
    return Known(
        name=str(row.get("id", number)),
        kind=str(row.get("kind") or kind_of(golds[0])),
        completion=str(row["completion"]),
        golds=golds,
        expected=str(expected),
    )


def _check(options: argparse.Namespace) -> int:
    check_name(options.verifier)
    rows = known_rows(Path(options.file))
    with VerifierPool(
        options.verifier,
        workers=options.workers,
        timeout_seconds=options.timeout_seconds,
        memory_mib=options.memory_mib,
        require_think=options.require_think,
        require_boxed=not options.no_box,
    ) as pool:
        started = time.monotonic()
        # Timed with the pool started: a run starts its pool once.
        checks = [Check(row.completion, row.golds) for row in rows]
        # In the order of the rows, whichever worker is done first.
        statuses = [outcome.status for outcome in pool.run(checks)]
        seconds = time.monotonic() - started

    tallies: dict[str, Tally] = {}
    total = Tally()
    unexpected = []
    for row, status in zip(rows, statuses, strict=True):
        # By kind too: a verifier may be perfect on numbers, and useless on intervals.
        tallies.setdefault(row.kind, Tally()).add(row, status)
        total.add(row, status)
        if not row.is_met(status):
            unexpected.append((row, status))

    if options.json:
        report = {
            "rows": total.rows,
            "accuracy": total.as_expected / total.rows,
            "false_positives": total.false_positives,
            "false_negatives": total.false_negatives,
            "seconds": seconds,
            "kinds": {kind: asdict(tally) for kind, tally in tallies.items()},
            "others": [{**asdict(row), "status": status} for row, status in unexpected],
        }
        print(json.dumps(report))
    else:
        _show(tallies, total, unexpected, seconds)

    if unexpected:
        return 1
    return 0


def _show(
    tallies: dict[str, Tally],
    total: Tally,
    unexpected: Sequence[tuple[Known, str]],
    seconds: float,
) -> None:
    """Prints the counts by kind, and the first of the rows that were judged otherwise."""
    table = Table("kind", box=SIMPLE, padding=0)
    for column in ("rows", "right", "false positives", "false negatives"):
        table.add_column(column, justify="right")
    for kind, tally in tallies.items():
        # The fields of a Tally are in the order of the columns.
        table.add_row(kind, *map(str, vars(tally).values()))
    table.add_section()
    table.add_row("all", *map(str, vars(total).values()))

    # Into a file as wide as the table is, not as wide as the terminal that is not there.
    width: int | None = 120
    if sys.stdout.isatty():
        width = None
    console = Console(width=width)
    console.print(table)
    accuracy = total.as_expected / total.rows
    console.print(
        f"accuracy {accuracy:.4f} in {seconds:.1f} s, {total.rows / seconds:.0f} checks/s",
        highlight=False,
    )

    for row, status in unexpected[:_MAX_SHOWN]:
        # Without markup: a completion may hold what rich takes for it.
        console.print(
            f"{row.name}: {status}, expected {row.expected}: {row.completion[-60:]!r} for "
            f"{row.golds!r}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def _golds(options: argparse.Namespace) -> int:
    rows = read_rows(options.file, split=options.split)
    problems = unmatchable((row.uid, row.answers) for row in rows)
    kinds = Counter(kind_of(row.answers[0]) for row in rows)

    if options.json:
        report = {
            "rows": len(rows),
            "kinds": kinds,
            "unmatchable": [asdict(problem) for problem in problems],
        }
        print(json.dumps(report))
        return 0

    for kind, count in kinds.most_common():
        print(f"{count:8d}  {kind}")

    print(
        hanging(
            f"{len(problems)} of {len(rows)} problems have a gold answer that no completion is "
            "likely to match",
            2,
        )
    )
    for problem in problems[:_MAX_SHOWN]:
        gold = repr(problem.golds[0][:_MAX_GOLD])
        print(hanging(f"  {problem.uid}: {problem.reason}: {gold}", 4))
    return 0
