"""`megatron-real labels`: how a verifier judges known answers, and which gold answers nobody can match.

    megatron-real labels check FILE [--verifier math_verify] [--json]
    megatron-real labels golds FILE [--split NAME] [--json]

FILE of `check` is JSONL of rows with completion, gold (text or a list), expected (a status, or true and false) and
perhaps kind and id; of `golds`, any file of problems that a run can train on.
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

from megatron_real.commands.terminal import refuse
from megatron_real.labels.golds import kind_of, unmatchable
from megatron_real.labels.pool import Check, VerifierPool
from megatron_real.labels.verifiers import check_name
from megatron_real.prompts.rows import read_rows

SUMMARY = "measure a verifier on known answers, and find gold answers nobody can match"
EXAMPLES = """\
examples:
  megatron-real labels check answers.jsonl
  megatron-real labels golds data/train.jsonl

exit codes: 0 all as expected, 1 a row was judged otherwise, 2 the input was refused
"""

_MAX_SHOWN = 20


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
        return status != "ok" if self.expected == "not ok" else status == self.expected


@dataclass
class Tally:
    """What became of the rows of one kind."""

    rows: int = 0
    """Rows checked."""
    as_expected: int = 0
    """Those whose status was the expected one."""
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
    what = parser.add_subparsers(dest="what", required=True)
    check = what.add_parser("check", help="a verifier over rows whose verdict is known")
    check.add_argument("file", help="JSONL of completion, gold, expected and perhaps kind")
    check.add_argument("--verifier", default="math_verify", help="as labels.verifier")
    check.add_argument("--workers", type=int, default=2, help="verifier processes")
    check.add_argument("--timeout-seconds", type=float, default=10.0, help="of one check")
    check.add_argument("--memory-mib", type=int, default=1024, help="of one worker")
    check.add_argument("--require-think", action="store_true", help="as labels.require_think")
    check.add_argument("--no-box", action="store_true", help="as labels.require_boxed=false")
    golds = what.add_parser("golds", help="gold answers of a data set that nobody can match")
    golds.add_argument("file", help="problems: JSONL, parquet, or a saved HF dataset")
    golds.add_argument("--split", default="", help="of a folder that has several")
    for each in (check, golds):
        each.add_argument("--json", action="store_true", help="print one JSON object")


def run(options: argparse.Namespace) -> int:
    """Runs one of the commands. Returns 0, 1 where a row was judged otherwise than expected, 2 for a refusal."""
    try:
        return _check(options) if options.what == "check" else _golds(options)
    except ValueError as error:
        return refuse(error)


def known_rows(path: Path) -> list[Known]:
    """Returns the rows of a file for `labels check`.

    Raises:
        ValueError: there is no such file, or a line is none of its rows; names the line.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no file {str(path)!r}; give JSONL of completion, gold and expected"
        )
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(_known(json.loads(line), number))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is no object with completion, gold and expected ({error})"
            ) from error
    if not found:
        raise ValueError(f"{str(path)!r} is empty; give JSONL of completion, gold and expected")
    return found


def _known(row: Any, number: int) -> Known:
    listed = row["gold"] if isinstance(row["gold"], list) else [row["gold"]]
    golds = tuple(str(gold) for gold in listed)
    expected = row["expected"]
    if isinstance(expected, bool):
        expected = "ok" if expected else "not ok"
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
        statuses = [o.status for o in pool.run([Check(row.completion, row.golds) for row in rows])]
        seconds = time.monotonic() - started
    tallies: dict[str, Tally] = {}
    for row, status in zip(rows, statuses, strict=True):
        tallies.setdefault(row.kind, Tally()).add(row, status)
    others = [
        (row, status) for row, status in zip(rows, statuses, strict=True) if not row.is_met(status)
    ]
    total = _total(list(tallies.values()))
    if options.json:
        report = {
            "rows": total.rows,
            "accuracy": total.as_expected / total.rows,
            "false_positives": total.false_positives,
            "false_negatives": total.false_negatives,
            "seconds": seconds,
            "kinds": {kind: asdict(tally) for kind, tally in tallies.items()},
            "others": [{**asdict(row), "status": status} for row, status in others],
        }
        print(json.dumps(report))
    else:
        _show(tallies, total, others, seconds)
    return 1 if others else 0


def _total(tallies: Sequence[Tally]) -> Tally:
    return Tally(
        rows=sum(tally.rows for tally in tallies),
        as_expected=sum(tally.as_expected for tally in tallies),
        false_positives=sum(tally.false_positives for tally in tallies),
        false_negatives=sum(tally.false_negatives for tally in tallies),
    )


def _show(
    tallies: dict[str, Tally], total: Tally, others: Sequence[tuple[Known, str]], seconds: float
) -> None:
    table = Table("kind", box=SIMPLE, padding=0)
    for column in ("rows", "right", "false positives", "false negatives"):
        table.add_column(column, justify="right")
    for kind, tally in tallies.items():
        table.add_row(kind, *map(str, vars(tally).values()))
    table.add_section()
    table.add_row("all", *map(str, vars(total).values()))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    accuracy = total.as_expected / total.rows
    console.print(
        f"accuracy {accuracy:.4f} in {seconds:.1f} s, {total.rows / seconds:.0f} checks/s",
        highlight=False,
    )
    for row, status in others[:_MAX_SHOWN]:
        shown = f"{row.name}: {status}, expected {row.expected}: {row.completion[-60:]!r} for {row.golds!r}"
        console.print(shown, highlight=False, markup=False, soft_wrap=True)


def _golds(options: argparse.Namespace) -> int:
    rows = read_rows(options.file, split=options.split)
    found = unmatchable((row.uid, row.answers) for row in rows)
    kinds = Counter(kind_of(row.answers[0]) for row in rows)
    if options.json:
        print(
            json.dumps(
                {"rows": len(rows), "kinds": kinds, "unmatchable": [asdict(f) for f in found]}
            )
        )
        return 0
    for kind, count in kinds.most_common():
        print(f"{count:8d}  {kind}")
    print(
        f"{len(found)} of {len(rows)} problems have a gold answer that no completion is likely to match"
    )
    for each in found[:_MAX_SHOWN]:
        print(f"  {each.uid}: {each.reason}: {each.golds[0][:80]!r}")
    return 0
