"""Writes a directory of planned files: pieces copied by threads, every byte checksummed, safe
against any crash.

    .OUT.partial -> literals -> pieces, each noted in .OUT.journal when done -> checksums.json -> fsync -> rename to OUT

A process that is killed leaves the partial directory and the journal; the same conversion run again
checks the pieces that the journal names against their checksums and makes only the others. OUT
itself appears whole or not at all. Deleted is only what a conversion wrote: an old OUT whose every
file its checksums.json names.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megatron_real.disk import fsync
from megatron_real.weights import WeightsError
from megatron_real.weights.stored import OpenFiles, Piece

MANIFEST = "checksums.json"
# What the manifest calls a range that is no tensor: headers and small files.
HEADER = "header"
# Larger blocks are not faster: this one stays in the processor's cache between read, checksum and
# write.
_BLOCK_BYTES = 2**20

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Where a piece goes."""

    file: str
    """Relative path."""
    offset: int
    """Its first byte there."""
    piece: Piece
    """What to write."""
    crc_offsets: tuple[int, ...] = ()
    """Where the file wants the CRC-32 of the piece's bytes."""


@dataclass
class Output:
    """The files of a directory to write."""

    sizes: dict[str, int] = field(default_factory=dict)
    """Relative path -> size in bytes."""
    literals: list[tuple[str, int, bytes]] = field(default_factory=list)
    """(relative path, offset, bytes): headers and small files."""
    targets: list[Target] = field(default_factory=list)
    """The pieces."""

    def add_file(self, path: str, data: bytes) -> None:
        """A whole small file."""
        self.sizes[path] = len(data)
        self.literals.append((path, 0, data))

    @property
    def num_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(target.piece.num_bytes for target in self.targets)

    def source_files(self) -> set[Path]:
        """The files that the pieces are read from."""
        tensors = {run.tensor for t in self.targets for run in t.piece.runs if run.tensor}
        return {chunk.file for tensor in tensors for chunk in tensor.chunks}

    def fingerprint(self) -> str:
        """Tells whether a partial directory belongs to this very conversion: sources, their dates,
        and the plan.
        """
        digest = hashlib.sha256()
        for file in sorted(self.source_files()):
            status = file.stat()
            digest.update(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
        for literal in self.literals:
            digest.update(repr(literal).encode())
        for target in self.targets:
            piece = target.piece
            rows = [
                (r.tensor and (r.tensor.dtype, r.tensor.chunks), r.row, r.rows) for r in piece.runs
            ]
            columns = (piece.first_column, piece.columns)
            digest.update(repr((target.file, target.offset, piece.dtype, rows, columns)).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Limits:
    """What a conversion may use."""

    workers: int = 2
    """Threads that copy."""
    max_memory: int = 2**30
    """Bytes of buffers over all threads; blocks are smaller than this asks for."""

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: a thread holds a block, its cast and a gathered copy, of up to twice
        the size.
        """
        return max(2**12, min(_BLOCK_BYTES, self.max_memory // (8 * self.workers)))


def check_target(out: Path, *, overwrite: bool, sources: Iterable[Path] = ()) -> None:
    """Checks that `out` may be made, or replaced, before anything is written.

    Args:
        out: directory to make.
        overwrite: replace it where it exists.
        sources: directories and files that are read.

    Raises:
        WeightsError: it exists and may not be replaced, holds what no conversion wrote, cannot be
            given its name at the end, or is a part of a source or around one.
    """
    out = out.absolute()
    if out.is_symlink():
        raise WeightsError(f"{out} is a link to {os.readlink(out)}; give the directory itself")
    if os.path.ismount(out):
        raise WeightsError(
            f"{out} is a mount point, which cannot be replaced; give a directory in it"
        )
    if out.exists() and not out.is_dir():
        raise WeightsError(f"{out} is a file; give another name for the directory")
    if out.exists() and not overwrite:
        raise WeightsError(
            f"{out} exists already; give another directory, or --overwrite to replace it"
        )
    for source in sources:
        _refuse_touching(out, source)
    for old in (out, _old_name(out)):
        if os.path.lexists(old):
            _refuse_foreign(old)


def _refuse_touching(out: Path, source: Path) -> None:
    target, origin = out.resolve(), source.resolve()
    if origin.is_relative_to(target) or (source.is_dir() and target.is_relative_to(origin)):
        raise WeightsError(
            f"{out} and {source}, which is read, are one within the other; give another directory"
        )


def _refuse_foreign(out: Path) -> None:
    """Raises WeightsError where a directory holds anything that no conversion wrote there."""
    remedy = "give another directory, or remove it yourself"
    if out.is_symlink() or not out.is_dir():
        raise WeightsError(f"{out} is no directory that a conversion wrote; {remedy}")
    if not any(out.iterdir()):
        return
    try:
        ranges = json.loads((out / MANIFEST).read_bytes())["ranges"]
        written = {str(path) for path, *_ in ranges} | {MANIFEST}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{out} has no readable {MANIFEST}, so that no conversion wrote it; {remedy}"
        ) from error
    for path in out.rglob("*"):
        name = str(path.relative_to(out))
        ours = name in written and path.is_file()
        if path.is_symlink() or not (ours or path.is_dir()):
            raise WeightsError(f"{out} holds {name}, which no conversion wrote; {remedy}")
    # Small files may have been edited since. Weights may not: they would take long to read.
    with OpenFiles() as files:
        for path, offset, num_bytes, crc, name in ranges:
            if name != HEADER:
                continue
            try:
                same = _crc(files, out / path, offset, num_bytes) == crc
            except WeightsError:
                same = False
            if not same:
                raise WeightsError(
                    f"{out / path} was changed since a conversion wrote it; {remedy}"
                )


def write_directory(
    output: Output,
    out: Path,
    *,
    limits: Limits,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Makes `out`.

    Returns how many bytes of pieces an earlier, interrupted run had already written.

    Args:
        output: the files.
        out: directory that appears when all is written.
        limits: threads and memory.
        overwrite: replace `out` where it exists.
        progress: called with the bytes of each piece that is done.

    Raises:
        WeightsError: `out` exists, too little disk space, an unreadable source, or another process
            is writing it.
    """
    check_target(out, overwrite=overwrite, sources=output.source_files())
    out = out.absolute()
    replaced = _identity(out)
    partial = out.with_name(f".{out.name}.partial")
    report = progress or (lambda _: None)
    try:
        if partial.is_symlink():
            raise WeightsError(f"{partial} is a link; remove it")
        made = [folder for folder in partial.parents if not folder.exists()]
        partial.mkdir(parents=True, exist_ok=True)
        with _journal(out) as journal:
            done = _resume(output, partial, journal)
            _check_space(output, partial, [_journal_file(out), *made])
            _write_literals(output, partial)
            for index in done:
                report(output.targets[index].piece.num_bytes)
            checksums = done | _copy(output, partial, done, journal, limits, report)
            _finish(output, partial, checksums)
            _publish(partial, out, replaced)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WeightsError(
                f"the disk of {out} is full; free some space and run the same command again, which keeps what is done"
            ) from error
        raise WeightsError(f"{error.filename or partial}: {error.strerror or error}") from error
    return sum(output.targets[index].piece.num_bytes for index in done)


def check_manifest(directory: Path, *, skip: Callable[[str], bool] | None = None) -> list[str]:
    """Reads the bytes that a manifest covers; returns a sentence for each range that is wrong.

    Args:
        directory: where the manifest is.
        skip: tells of a relative path whether it is left out.

    Raises:
        WeightsError: there is no manifest.
    """
    try:
        ranges = json.loads((directory / MANIFEST).read_bytes())["ranges"]
        covered = [(str(path), int(a), int(n), crc, str(name)) for path, a, n, crc, name in ranges]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{directory} has no readable {MANIFEST} ({error})") from error
    wrong = []
    with OpenFiles() as files:
        for path, offset, num_bytes, crc, name in covered:
            if skip is not None and skip(path):
                continue
            try:
                held = _crc(files, directory / path, offset, num_bytes)
            except WeightsError as error:
                wrong.append(str(error))
                continue
            if held != crc:
                wrong.append(
                    f"{path}: {name} has checksum {held:08x} but was written with {crc:08x}"
                )
    return wrong


@contextmanager
def _journal(out: Path) -> Iterator[int]:
    """The journal's descriptor, locked against a second conversion to `out`.

    Removed when all went well.
    """
    file = _journal_file(out)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield descriptor
        file.unlink()
    except BlockingIOError as error:
        raise WeightsError(f"another process is writing {out}; wait for it") from error
    finally:
        os.close(descriptor)


def _journal_file(out: Path) -> Path:
    return out.with_name(f".{out.name}.journal")


def _resume(output: Output, partial: Path, journal: int) -> dict[int, int]:
    """Piece -> checksum of what an earlier run of this conversion wrote.

    Anything else in `partial` is removed.
    """
    fingerprint = output.fingerprint()
    noted_so_far = os.pread(journal, os.fstat(journal).st_size, 0)
    whole = noted_so_far[: noted_so_far.rfind(b"\n") + 1]
    os.ftruncate(journal, len(whole))  # a line cut short would spoil the one that is appended next
    lines = whole.decode(errors="replace").splitlines()
    if lines[:1] != [fingerprint]:
        begun = bool(lines) and re.fullmatch(r"[0-9a-f]{64}", lines[0]) is not None
        if not begun and any(partial.iterdir()):
            raise WeightsError(
                f"{partial} is there, and no journal says that a conversion wrote it; remove it"
            )
        shutil.rmtree(partial)
        partial.mkdir()
        os.ftruncate(journal, 0)
        os.write(journal, f"{fingerprint}\n".encode())
        return {}
    done = {}
    with OpenFiles() as files:
        for line in lines[1:]:
            words = line.split()
            if len(words) != 3 or words[2] != ".":
                continue  # cut short by the kill
            index, noted = int(words[0]), int(words[1], 16)
            target = output.targets[index]
            try:
                if (
                    _crc(files, partial / target.file, target.offset, target.piece.num_bytes)
                    == noted
                ):
                    done[index] = noted
            except WeightsError:
                continue  # its file is gone or short: made again
    logger.info("resuming: %d of %d tensors are already there", len(done), len(output.targets))
    return done


def _check_space(output: Output, partial: Path, made: Sequence[Path]) -> None:
    """Raises WeightsError where the disk is too small; where nothing was begun, nothing is left.

    Args:
        output: what is to be written.
        partial: where it goes first.
        made: journal and parent directories that were made for it, the innermost first.
    """
    there = sum(f.stat().st_blocks * 512 for f in partial.rglob("*") if f.is_file())
    missing = sum(output.sizes.values()) - there - shutil.disk_usage(partial).free
    if missing > 0:
        if not there:
            partial.rmdir()
            for path in made:
                path.rmdir() if path.is_dir() else path.unlink()
        raise WeightsError(
            f"{sum(output.sizes.values()):,} bytes are needed in {partial.parent}, which has {missing:,} too few; "
            f"free some space or take another directory"
        )


def _write_literals(output: Output, partial: Path) -> None:
    for path, size in output.sizes.items():
        file = partial / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab") as stream:
            stream.truncate(size)
    for path, offset, data in output.literals:
        with open(partial / path, "r+b") as stream:
            stream.seek(offset)
            stream.write(data)


def _copy(
    output: Output,
    partial: Path,
    done: dict[int, int],
    journal: int,
    limits: Limits,
    report: Callable[[int], None],
) -> dict[int, int]:
    """Writes the pieces that are not `done`; piece -> checksum."""
    descriptors = {
        path: os.open(partial / path, os.O_WRONLY) for path in {t.file for t in output.targets}
    }
    stop = threading.Event()

    def note_crc(target: Target, crc: int) -> None:
        for offset in target.crc_offsets:
            _write(descriptors[target.file], memoryview(struct.pack("<I", crc)), offset)

    def copy(index: int, files: OpenFiles) -> tuple[int, int]:
        target = output.targets[index]
        descriptor, at, crc = descriptors[target.file], target.offset, 0
        for block in target.piece.blocks(files, limits.block_bytes):
            if stop.is_set():
                raise KeyboardInterrupt
            _write(descriptor, block, at)
            crc = zlib.crc32(block, crc)
            at += len(block)
        note_crc(target, crc)
        os.write(journal, f"{index} {crc:08x} .\n".encode())
        report(target.piece.num_bytes)
        return index, crc

    try:
        for index, crc in done.items():  # the literals, written anew, hold none
            note_crc(output.targets[index], crc)
        with OpenFiles() as files, ThreadPoolExecutor(limits.workers) as pool:
            waiting = [
                pool.submit(copy, i, files) for i in range(len(output.targets)) if i not in done
            ]
            try:
                wait(waiting, return_when=FIRST_EXCEPTION)
            finally:  # the first failure, or ctrl-C, ends the others at their next block
                if any(not f.done() or f.exception() for f in waiting):
                    stop.set()
                    pool.shutdown(cancel_futures=True)
            failed = [f.exception() for f in waiting if not f.cancelled() and f.exception()]
            for error in sorted(failed, key=lambda e: isinstance(e, KeyboardInterrupt)):
                raise error  # type: ignore[misc]
            return dict(future.result() for future in waiting)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _finish(output: Output, partial: Path, checksums: dict[int, int]) -> None:
    """Writes the manifest, then brings everything to disk."""
    ranges = [
        (t.file, t.offset, t.piece.num_bytes, checksums[i], t.piece.name)
        for i, t in enumerate(output.targets)
    ]
    with OpenFiles() as files:
        for path, offset, data in output.literals:
            ranges.append(
                (path, offset, len(data), _crc(files, partial / path, offset, len(data)), HEADER)
            )
    (partial / MANIFEST).write_text(
        json.dumps({"algorithm": "crc32", "ranges": sorted(ranges)}) + "\n"
    )
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fsync, [partial / path for path in (*output.sizes, MANIFEST)]))
    for directory in sorted({(partial / path).parent for path in output.sizes} | {partial}):
        fsync(directory)


def _publish(partial: Path, out: Path, replaced: tuple[int, int] | None) -> None:
    """Gives the finished directory its name; an old one of that name is removed afterwards.

    Args:
        partial: the finished directory.
        out: its name.
        replaced: identity of the directory that was checked and may go; None for none.

    Raises:
        WeightsError: something else has that name by now.
    """
    if _identity(out) != replaced:
        raise WeightsError(
            f"{out} is not what it was when the conversion began, and is left alone; the finished "
            f"weights are in {partial}: remove {out.name} and run the same command again"
        )
    if replaced is not None:
        _refuse_foreign(out)
    old = _old_name(out)
    if os.path.lexists(old):  # of a conversion that was killed between the two renames
        _refuse_foreign(old)
        shutil.rmtree(old)
    if replaced is not None:
        out.rename(old)
    partial.rename(out)
    fsync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old_name(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def _identity(out: Path) -> tuple[int, int] | None:
    """Device and inode of a directory, None where nothing has that name."""
    try:
        status = out.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def _write(descriptor: int, block: memoryview, offset: int) -> None:
    done = 0
    while done < len(block):
        done += os.pwrite(descriptor, block[done:], offset + done)


def _crc(files: OpenFiles, file: Path, offset: int, num_bytes: int) -> int:
    block, crc = memoryview(bytearray(min(_BLOCK_BYTES, num_bytes))), 0
    for at in range(0, num_bytes, _BLOCK_BYTES):
        part = block[: min(_BLOCK_BYTES, num_bytes - at)]
        files.read_into(file, offset + at, part)
        crc = zlib.crc32(part, crc)
    return crc
