"""Prepares the paper's training sets and benchmarks from their published files: one schema,
no duplicates, no leaks.

    # all eight, from the Hugging Face hub
    python tools/prepare_data.py --out data
    # some of them, from files on disk
    python tools/prepare_data.py --out data aime24=aime.parquet dapo=dapo/
    # another publisher's hub dataset
    python tools/prepare_data.py --out data aime25=math-ai/aime25

Writes NAME.jsonl for each, which `data.train`, `data.heldout` and `megatron-real eval --bench`
take; report.json with every count; leaks.jsonl with the training questions that a benchmark asks.
docs/evaluation.md says more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_real.prompts.prepare import Prepared, prepare
from megatron_real.prompts.sources import SOURCES


def main() -> int:
    """Returns 0, or 2 when a source could not be read."""
    parser = argparse.ArgumentParser(
        description="Prepares the paper's training sets and benchmarks."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that is written")
    parser.add_argument(
        "--keep-leaks", action="store_true", help="only report training questions of the benchmarks"
    )
    parser.add_argument(
        "--gram-size", type=int, default=8, help="tokens of an n-gram that near duplicates share"
    )
    parser.add_argument(
        "--gram-share", type=float, default=0.6, help="share of n-grams from which they are near"
    )
    parser.add_argument(
        "sources", nargs="*", metavar="NAME[=FILE|FOLDER|HUB_ID]", help="default: all of them"
    )
    options = parser.parse_args()
    asked = [word.partition("=")[::2] for word in options.sources] or [
        (source.name, "") for source in SOURCES
    ]
    try:
        done = prepare(
            dict(asked),
            options.out,
            keep_leaks=options.keep_leaks,
            gram_size=options.gram_size,
            gram_share=options.gram_share,
            say=print,
        )
    except ValueError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 2
    _show(done, options.out, options.keep_leaks)
    return 0


def _show(done: Prepared, out: Path, keep_leaks: bool) -> None:
    table = Table("source", "published", "read", "kept", "dropped, and why")
    for column in table.columns[1:4]:
        column.justify = "right"
    for name, counts in done.counts.items():
        reasons = [f"{count} {reason}" for reason, count in counts.dropped.most_common()]
        if counts.repeated:
            reasons.append(f"({counts.repeated} asked twice, kept)")
        table.add_row(
            name, str(counts.published), str(counts.read), str(counts.kept), ", ".join(reasons)
        )
    console = Console(soft_wrap=not sys.stdout.isatty())
    console.print(table)

    same = sum(leak.share == 1 for leak in done.leaks)
    fate = "dropped"
    if keep_leaks:
        fate = "kept"
    print(
        f"{same} training questions are a benchmark's, {len(done.leaks) - same} are near one; "
        f"{fate}, and listed in {out / 'leaks.jsonl'}"
    )
    # A leak into a benchmark that was not given stays unseen: that must not pass for none.
    if done.unchecked and any(
        source.split == "train" and source.name in done.counts for source in SOURCES
    ):
        print(f"not compared with {', '.join(done.unchecked)}: they were not among the sources")


if __name__ == "__main__":
    raise SystemExit(main())
