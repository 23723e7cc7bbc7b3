"""Files of JSON rows that grow by one row at a time.

A row that was cut never spoils the next one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Adds a row, on a line of its own whatever the file ends with."""
    line = json.dumps(row) + "\n"
    # "a+": every write goes to the end, wherever the file is read before; one write for
    # a whole row.
    with file.open("a+b") as rows:
        # A row that an earlier process could not finish must not take this one with it.
        if rows.seek(0, os.SEEK_END) > 0:
            rows.seek(-1, os.SEEK_END)
            if rows.read(1) != b"\n":
                line = "\n" + line
        rows.write(line.encode())


def read_rows(file: Path) -> tuple[list[dict[str, Any]], int]:
    """The rows of a file that need not exist, and how many lines are not rows."""
    if not file.exists():
        return [], 0

    rows = []
    broken = 0
    for line in file.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # broken UTF-8 among them
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            broken += 1

    return rows, broken


def drop_cut_row(file: Path) -> bool:
    """Removes a last row that has no end; whether there was one."""
    if not file.exists():
        return False
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    # rfind gives -1 where no row is whole, so that nothing is left.
    if whole == len(content):
        return False
    os.truncate(file, whole)
    return True
