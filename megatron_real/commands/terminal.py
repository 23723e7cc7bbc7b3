"""How commands speak: sentences on standard error, once for all ranks, under the program's name."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

REFUSED = 2
"""Exit code where the input was refused, before anything was written."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT, as shells have it."""

EXIT_CODES = {
    0: "Done, or there was nothing left to do.",
    1: (
        "The run failed, or a check of `plan`, `doctor`, `convert verify` and the like found "
        "something."
    ),
    REFUSED: "The input was refused. One sentence says what is wrong, and no run was changed.",
    75: "The run stopped early with everything saved. Start the same command again.",
    INTERRUPTED: "Ctrl-C. The run has saved where it could; the same command goes on.",
}
"""Exit code -> what it says, for the reference of the documentation.

75 is supervision.stop.EXIT_AGAIN.
"""


def is_first_rank() -> bool:
    """Returns whether this process speaks for the job: the first rank, or a process by itself."""
    return os.environ.get("RANK", "0") == "0"


def say(sentence: object) -> None:
    """Writes a sentence to standard error, on the first rank only."""
    if is_first_rank():
        print(f"megatron-real: {sentence}", file=sys.stderr, flush=True)


def refuse(error: ValueError) -> int:
    """Says why the input is refused; returns the exit code."""
    say(error)
    return REFUSED


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns columns as wide as their widest cell, the first flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def hanging(text: str, indent: int) -> str:
    """Returns `text` folded to the terminal's width, its later lines indented.

    It stays one line where it goes to a file, which is searched by lines.
    """
    width = shutil.get_terminal_size(fallback=(10_000, 24)).columns
    return textwrap.fill(
        text,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
