"""How commands speak: sentences on standard error, once for all ranks, under the program's name."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_real.errors import ExpectedEnd, Refused


def is_first_rank() -> bool:
    """Returns whether this process speaks for the job: the first rank, or a process by itself."""
    return os.environ.get("RANK", "0") == "0"


def say(sentence: object, *, on_every_rank: bool = True) -> None:
    """Writes a sentence to standard error.

    The first rank speaks for all where the sentence is one of every rank's.
    """
    if is_first_rank() or not on_every_rank:
        print(f"megatron-real: {sentence}", file=sys.stderr, flush=True)


@contextmanager
def input_checks() -> Iterator[None]:
    """A ValueError in here refuses the command's input: the command line says its sentence."""
    try:
        yield
    # Some are ValueErrors too, and have their own sentence and exit code.
    except ExpectedEnd:
        raise
    except ValueError as error:
        raise Refused(str(error)) from error


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns columns as wide as their widest cell, the first flush left, the others right."""
    # Every row has all columns: a missing cell would shift those after it.
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
    # Without a terminal the fallback counts: no line is that long.
    width = shutil.get_terminal_size(fallback=(10_000, 24)).columns
    return textwrap.fill(
        text,
        width,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
