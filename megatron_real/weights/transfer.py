"""Writes a directory of planned files, safe against any crash.

Threads copy the pieces, and every byte has a checksum.

    .OUT.partial -> literals -> pieces, each noted in .OUT.journal when done -> checksums.json
        -> fsync -> rename to OUT

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
from typing import NamedTuple

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


class _WrittenRange(NamedTuple):
    """Consecutive bytes of a file, as the manifest has them."""

    file: str
    """Relative path."""
    offset: int
    """First byte."""
    num_bytes: int
    """How many."""
    crc: int
    """CRC-32 of them."""
    name: str
    """The tensor that they are; HEADER for what is none."""


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
        """Adds a whole small file."""
        self.sizes[path] = len(data)
        self.literals.append((path, 0, data))

    @property
    def num_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(target.piece.num_bytes for target in self.targets)

    def source_files(self) -> set[Path]:
        """Returns the files that the pieces are read from."""
        # A set of tensors first: those of a checkpoint stand in many pieces.
        tensors = set()
        for target in self.targets:
            tensors |= {span.tensor for span in target.piece.spans if span.tensor is not None}
        return {extent.file for tensor in tensors for extent in tensor.extents}

    def fingerprint(self) -> str:
        """Returns what tells whether a partial directory belongs to this very conversion.

        It covers the sources with their dates, and the plan.
        """
        digest = hashlib.sha256()
        for file in sorted(self.source_files()):
            status = file.stat()
            digest.update(f"{file.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
        # Headers have names, shapes and dtypes of everything: another plan has other literals.
        for literal in self.literals:
            digest.update(repr(literal).encode())

        for target in self.targets:
            piece = target.piece
            # Not the tensor's name: the file's bytes do not depend on it.
            rows = [
                (span.tensor and (span.tensor.dtype, span.tensor.extents), span.row, span.rows)
                for span in piece.spans
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
        """Bytes of one block.

        A thread holds a block, its cast and a gathered copy, each of up to twice the size.
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

    # Both with links followed, or a source could hide behind one.
    target = out.resolve()
    for source in sources:
        origin = source.resolve()
        # Replacing `out` would delete a source in it; a source around it would grow while it is
        # read.
        inside = source.is_dir() and target.is_relative_to(origin)
        if origin.is_relative_to(target) or inside:
            raise WeightsError(
                f"{out} and {source}, which is read, are one within the other; give another "
                f"directory"
            )

    for old in (out, _old_name(out)):
        if os.path.lexists(old):
            _refuse_foreign(old)


def _refuse_foreign(out: Path) -> None:
    """Raises WeightsError where a directory holds anything that no conversion wrote there."""
    remedy = "give another directory, or remove it yourself"
    if out.is_symlink() or not out.is_dir():
        raise WeightsError(f"{out} is no directory that a conversion wrote; {remedy}")
    if not any(out.iterdir()):
        return

    try:
        ranges = _read_manifest(out)
        written = {record.file for record in ranges} | {MANIFEST}
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
        for record in ranges:
            if record.name != HEADER:
                continue
            path = out / record.file
            try:
                unchanged = _crc(files, path, record.offset, record.num_bytes) == record.crc
            except WeightsError:
                unchanged = False
            if not unchanged:
                raise WeightsError(f"{path} was changed since a conversion wrote it; {remedy}")


def write_directory(
    output: Output,
    out: Path,
    *,
    limits: Limits,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Writes the files of a directory, which gets its name when all of them are on disk.

    Args:
        output: the files.
        out: directory that appears when all is written.
        limits: threads and memory.
        overwrite: replace `out` where it exists.
        progress: called with the bytes of each piece that is done.

    Returns:
        How many bytes of pieces an earlier, interrupted run had already written.

    Raises:
        WeightsError: `out` exists, too little disk space, an unreadable source, or another process
            is writing it.
    """
    check_target(out, overwrite=overwrite, sources=output.source_files())
    out = out.absolute()
    # This very directory may be replaced at the end, and none that somebody makes meanwhile.
    replaced = _identity(out)
    partial = out.with_name(f".{out.name}.partial")
    report = progress or (lambda _: None)

    try:
        if partial.is_symlink():
            raise WeightsError(f"{partial} is a link; remove it")

        # For a disk that turns out too small: then these go again.
        made = [folder for folder in partial.parents if not folder.exists()]
        partial.mkdir(parents=True, exist_ok=True)
        with _journal(out) as journal:
            done = _resume(output, partial, journal)
            _check_space(output, partial, [_journal_file(out), *made])

            # Headers and small files are written anew each time: quicker than checking them.
            for path, size in output.sizes.items():
                file = partial / path
                file.parent.mkdir(parents=True, exist_ok=True)
                with open(file, "ab") as stream:
                    # Opened to append: what an earlier run has written stays.
                    stream.truncate(size)
            for path, offset, data in output.literals:
                with open(partial / path, "r+b") as stream:
                    stream.seek(offset)
                    stream.write(data)

            for index in done:
                report(output.targets[index].piece.num_bytes)
            # The pieces of an earlier run are counted at once, the others as they are done.
            checksums = done | _copy(output, partial, done, journal, limits, report)
            _finish(output, partial, checksums)
            _publish(partial, out, replaced)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WeightsError(
                f"the disk of {out} is full; free some space and run the same command again, which "
                f"keeps what is done"
            ) from error

        raise WeightsError(f"{error.filename or partial}: {error.strerror or error}") from error
    return sum(output.targets[index].piece.num_bytes for index in done)


def check_manifest(directory: Path, *, skip: Callable[[str], bool] | None = None) -> list[str]:
    """Reads the bytes that a manifest covers and compares their checksums.

    Args:
        directory: where the manifest is.
        skip: says of a relative path whether it is left out.

    Returns:
        A sentence for each range that is wrong.

    Raises:
        WeightsError: there is no manifest.
    """
    try:
        ranges = _read_manifest(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{directory} has no readable {MANIFEST} ({error})") from error

    problems = []
    with OpenFiles() as files:
        for record in ranges:
            if skip is not None and skip(record.file):
                continue
            try:
                path = directory / record.file
                checksum = _crc(files, path, record.offset, record.num_bytes)
            except WeightsError as error:
                problems.append(str(error))
                continue
            if checksum != record.crc:
                problems.append(
                    f"{record.file}: {record.name} has checksum {checksum:08x} but was written "
                    f"with {record.crc:08x}"
                )
    return problems


def _read_manifest(directory: Path) -> list[_WrittenRange]:
    """Returns what the manifest of a directory says of each range.

    Raises:
        OSError, ValueError, KeyError, TypeError: there is none, or it cannot be read as one.
    """
    manifest = json.loads((directory / MANIFEST).read_bytes())
    ranges = []
    for file, offset, num_bytes, crc, name in manifest["ranges"]:
        ranges.append(_WrittenRange(str(file), int(offset), int(num_bytes), crc, str(name)))
    return ranges


@contextmanager
def _journal(out: Path) -> Iterator[int]:
    """Yields the journal's descriptor, locked against a second conversion to `out`.

    The journal is removed when all went well.
    """
    file = _journal_file(out)
    # O_APPEND: threads add lines at once, and none overwrites another's. O_NOFOLLOW: a link of this
    # name, which another user may have made, is refused.
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644)
    try:
        # The lock ends with the process, also where it is killed.
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
    """Returns piece -> checksum of what an earlier run of this conversion wrote.

    Anything else in `partial` is removed.
    """
    fingerprint = output.fingerprint()
    journalled = os.pread(journal, os.fstat(journal).st_size, 0)
    whole_lines = journalled[: journalled.rfind(b"\n") + 1]
    # A line cut short would spoil the one that is appended next.
    os.ftruncate(journal, len(whole_lines))
    lines = whole_lines.decode(errors="replace").splitlines()

    # Another plan's journal: what it names is of no use. Without a journal the files are not ours.
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
            fields = line.split()
            if len(fields) != 3 or fields[2] != ".":
                continue  # cut short by the kill
            index = int(fields[0])
            noted = int(fields[1], 16)
            target = output.targets[index]
            file = partial / target.file
            try:
                checksum = _crc(files, file, target.offset, target.piece.num_bytes)
            except WeightsError:
                continue  # its file is gone or short: made again
            if checksum == noted:
                done[index] = noted
    logger.info("resuming: %d of %d tensors are already there", len(done), len(output.targets))
    return done


def _check_space(output: Output, partial: Path, made: Sequence[Path]) -> None:
    """Raises WeightsError where the disk is too small; where nothing was begun, nothing is left.

    Args:
        output: what is to be written.
        partial: where it goes first.
        made: journal and parent directories that were made for it, the innermost first.
    """
    needed = sum(output.sizes.values())
    # Blocks, not sizes: a file that was only truncated to its size takes no space yet.
    there = sum(f.stat().st_blocks * 512 for f in partial.rglob("*") if f.is_file())
    missing = needed - there - shutil.disk_usage(partial).free
    if missing > 0:
        if not there:
            partial.rmdir()
            for path in made:
                if path.is_dir():
                    path.rmdir()
                else:
                    path.unlink()
        raise WeightsError(
            f"{needed:,} bytes are needed in {partial.parent}, which has {missing:,} too few; "
            f"free some space or take another directory"
        )


def _copy(
    output: Output,
    partial: Path,
    done: dict[int, int],
    journal: int,
    limits: Limits,
    report: Callable[[int], None],
) -> dict[int, int]:
    """Writes the pieces that are not `done`.

    Args:
        output: the plan.
        partial: directory that has the files, at their full size.
        done: piece -> checksum of those that are there.
        journal: descriptor that each finished piece is noted in.
        limits: threads and memory.
        report: called with the bytes of each piece.

    Returns:
        Piece -> checksum of those that were written.
    """
    paths = {target.file for target in output.targets}
    descriptors = {path: os.open(partial / path, os.O_WRONLY) for path in paths}
    stop = threading.Event()

    def note_crc(target: Target, crc: int) -> None:
        for offset in target.crc_offsets:
            _write(descriptors[target.file], memoryview(struct.pack("<I", crc)), offset)

    def copy(index: int, files: OpenFiles) -> tuple[int, int]:
        target = output.targets[index]
        descriptor = descriptors[target.file]
        offset = target.offset
        crc = 0
        for block in target.piece.blocks(files, limits.block_bytes):
            if stop.is_set():
                raise KeyboardInterrupt

            _write(descriptor, block, offset)
            crc = zlib.crc32(block, crc)
            offset += len(block)

        # The journal last: a piece that it names is whole, with its checksum in the file. The dot
        # tells a whole line from one that a kill cut short.
        note_crc(target, crc)
        os.write(journal, f"{index} {crc:08x} .\n".encode())
        report(target.piece.num_bytes)
        return index, crc

    try:
        # The literals were written anew, and hold zeros where these checksums belong.
        for index, crc in done.items():
            note_crc(output.targets[index], crc)

        with OpenFiles() as files, ThreadPoolExecutor(limits.workers) as pool:
            missing = [index for index in range(len(output.targets)) if index not in done]
            futures = [pool.submit(copy, index, files) for index in missing]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # The first failure, or ctrl-C, ends the others at their next block.
                if any(not future.done() or future.exception() for future in futures):
                    stop.set()
                    pool.shutdown(cancel_futures=True)

            ended = [future.exception() for future in futures if not future.cancelled()]
            errors = [error for error in ended if error is not None]
            # The KeyboardInterrupts are those of threads that were stopped; another is the cause.
            for error in sorted(errors, key=lambda error: isinstance(error, KeyboardInterrupt)):
                raise error
            return dict(future.result() for future in futures)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _finish(output: Output, partial: Path, checksums: dict[int, int]) -> None:
    """Writes the manifest, then brings everything to disk."""
    ranges = []
    for index, target in enumerate(output.targets):
        piece = target.piece
        ranges.append(
            _WrittenRange(target.file, target.offset, piece.num_bytes, checksums[index], piece.name)
        )
    with OpenFiles() as files:
        for path, offset, data in output.literals:
            crc = _crc(files, partial / path, offset, len(data))
            ranges.append(_WrittenRange(path, offset, len(data), crc, HEADER))
    # Sorted: equal conversions write equal manifests.
    manifest = {"algorithm": "crc32", "ranges": sorted(ranges)}
    (partial / MANIFEST).write_text(json.dumps(manifest) + "\n")

    # Files before the directories that name them.
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
    # Left by a conversion that was killed between the two renames.
    if os.path.lexists(old):
        _refuse_foreign(old)
        shutil.rmtree(old)
    if replaced is not None:
        # Out of the way first: rename() replaces no directory that has files.
        out.rename(old)
    partial.rename(out)
    fsync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old_name(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def _identity(out: Path) -> tuple[int, int] | None:
    """Returns device and inode of a directory, None where nothing has that name."""
    try:
        status = out.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_dev, status.st_ino


def _write(descriptor: int, block: memoryview, offset: int) -> None:
    """Writes all of a block, which one system call need not do."""
    done = 0
    while done < len(block):
        done += os.pwrite(descriptor, block[done:], offset + done)


def _crc(files: OpenFiles, file: Path, offset: int, num_bytes: int) -> int:
    """Returns the CRC-32 of a range of a file."""
    # One buffer for all blocks.
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, num_bytes)))
    crc = 0
    for done in range(0, num_bytes, _BLOCK_BYTES):
        block = buffer[: min(_BLOCK_BYTES, num_bytes - done)]
        files.read_into(file, offset + done, block)
        crc = zlib.crc32(block, crc)
    return crc
