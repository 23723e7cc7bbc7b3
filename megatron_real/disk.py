"""Files that are there as a whole or not at all, also after a crash of the machine.

The module needs no torch.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO


@contextmanager
def whole_file(
    path: Path, *, newline: str | None = None, errors: str = "strict"
) -> Iterator[TextIO]:
    """Yields a UTF-8 file to write. Until the end there is the old one of that name, or none.

    Args:
        path: the file, whose directory is made where it is missing.
        newline, errors: as of `open`.
    """
    with _whole(path, "w", encoding="utf-8", newline=newline, errors=errors) as file:
        yield file


@contextmanager
def whole_binary_file(path: Path) -> Iterator[BinaryIO]:
    """Yields a file of bytes to write. Until the end there is the old one of that name, or none."""
    with _whole(path, "wb") as file:
        yield file


@contextmanager
def _whole(path: Path, mode: str, **options: Any) -> Iterator[Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same directory: a rename replaces the old file at once only within one file system.
    new = path.with_name(f"{path.name}.new")
    with new.open(mode, **options) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())  # a rename must not outlive its contents
    new.replace(path)
    fsync(path.parent)  # the new name, which is the directory's


def write_whole(path: Path, text: str) -> None:
    """Replaces a file, as `whole_file` does, by this text."""
    with whole_file(path) as file:
        file.write(text)


def fsync(path: Path) -> None:
    """Brings a file to disk, or the names in a directory."""
    # Reading is all that a directory allows, and enough for fsync.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# A full disk, a used-up quota, and a file beyond the limit of `ulimit -f`.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_IN_WORDS = tuple(os.strerror(number) for number in _FULL)


def is_full_disk(error: BaseException | None) -> bool:
    """Whether there was no room: the error, or one that it was raised from, says so.

    Libraries wrap the system's error into their own, often by its words only.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if any(words in str(error) for words in _FULL_IN_WORDS):
            return True
        # `raise ... from` sets the cause, any other raise in an except clause the context.
        error = error.__cause__ or error.__context__
    return False
