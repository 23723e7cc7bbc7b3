"""Files that are there as a whole or not at all, also after a crash of the machine. Loadable without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def whole_file(path: Path, *, newline: str | None = None, errors: str = "strict") -> Iterator[TextIO]:
    """A UTF-8 file to write. Until the end there is the old one of that name, or none.

    Args:
        newline, errors: as of `open`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    with new.open("w", encoding="utf-8", newline=newline, errors=errors) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # a rename must not outlive its contents
    new.replace(path)
    fsync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file, as `whole_file` does, by this text."""
    with whole_file(path) as file:
        file.write(text)


def fsync(path: Path) -> None:
    """Brings a file to disk, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
