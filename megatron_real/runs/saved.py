"""Checkpoints on disk: their names, what makes one whole, and which are kept.

A checkpoint is written under a temporary name, every file of it is fsynced, its manifest is written
last, and only then does it get its name. So a directory of that name that differs from its manifest
was damaged afterwards: it is set aside (never deleted) and the one before it is used. Loadable
without torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_real.disk import fsync, write_whole

MANIFEST = "manifest.json"
LATEST = "latest"
# step_12, or step_12_update_2 within the step after it.
_NAME = re.compile(r"step_(\d+)(?:_update_(\d+))?")
_UNFINISHED = ".partial"
"""Ends the name of a checkpoint that is being written."""
_DOOMED = ".deleted"
"""Ends the name of a checkpoint that is being deleted: half of one must not look like a whole."""
_DAMAGED = ".damaged"
_STALE_SECONDS = 60.0
"""How long another machine may take to show a file that the first rank sees: an NFS client keeps
attributes so long."""


class UnreadableCheckpoint(ValueError):
    """A checkpoint is there and cannot be read now. It may be whole, so nothing is touched."""


@dataclass(frozen=True, order=True)
class Position:
    """How far a run has come.

    Example: Position(12, 2) is after 12 steps and two updates of the 13th.
    """

    step: int
    """Steps that are done."""
    update: int = 0
    """Updates of the step after them that are done."""

    def __str__(self) -> str:
        return f"step_{self.step}" + (f"_update_{self.update}" if self.update else "")


@dataclass(frozen=True)
class Saved:
    """One checkpoint on disk."""

    path: Path
    """Its directory."""
    position: Position
    """Where in the run it was taken."""

    def manifest(self) -> dict[str, Any]:
        """Returns what was written when it was complete; {} where there is none or it is cut.

        Raises:
            UnreadableCheckpoint: it is there and cannot be read.
        """
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        except OSError as error:
            raise _unreadable(self.path / MANIFEST, error) from error
        # A cut or foreign manifest counts as none: the checkpoint is then incomplete, and no error.
        if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
            return {}
        return manifest

    def incomplete(self) -> str:
        """Returns what is wrong with the names and sizes of its files, "" if nothing.

        Raises:
            UnreadableCheckpoint: a file is there and its size cannot be read.
        """
        # An empty table counts as cut, too: a checkpoint without files cannot be whole.
        files = self.manifest().get("files", {})
        if not files:
            return f"{MANIFEST} is missing or cut"

        # By name, so that of several problems the same one is told each time.
        for name, (size, _) in sorted(files.items()):
            try:
                present = (self.path / name).stat().st_size
            except FileNotFoundError:
                return f"{name} is missing"
            except OSError as error:
                raise _unreadable(self.path / name, error) from error
            if present != size:
                return f"{name} has {present} bytes instead of {size}"

        return ""

    def corrupt(self, files: Mapping[str, Sequence[Any]], *, part: int = 0, parts: int = 1) -> str:
        """Returns which file has another content than when it was written, "" if none.

        Args:
            files: of the manifest, all of them there according to `incomplete`.
            part, parts: every `parts`-th file is read, so that ranks can share the work.

        Raises:
            UnreadableCheckpoint: a file cannot be read, or this machine does not see it.
        """
        for name in sorted(files)[part::parts]:
            file = self.path / name
            # This machine may not see yet what another one sees.
            ends = time.monotonic() + _STALE_SECONDS
            # Existence alone is waited for. A file that is there and differs is damaged, however
            # long one waits.
            while not file.exists() and time.monotonic() < ends:
                time.sleep(0.2)

            try:
                digest = checksum(file)
            except OSError as error:
                raise _unreadable(file, error) from error
            if digest != files[name][1]:
                return f"{name} has another checksum than when it was written"

        return ""

    def damage(self) -> str:
        """Returns what is wrong with it, "" if nothing. Reads every file."""
        return self.incomplete() or self.corrupt(self.manifest()["files"])


def _unreadable(file: Path, error: OSError) -> UnreadableCheckpoint:
    return UnreadableCheckpoint(
        f"{file} cannot be read ({error.strerror or error}); nothing was changed: see to it that "
        "this process may read it, then start the same command again"
    )


def checksum(file: Path) -> str:
    """Returns the SHA-256 of a file's content."""
    with file.open("rb") as stream:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(stream, "sha256").hexdigest()

        # Python 3.10's hashlib reads no files.
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def saved(folder: Path) -> list[Saved]:
    """Returns the checkpoints of a folder, the newest first, whole or not.

    Raises:
        UnreadableCheckpoint: the folder is there and cannot be listed.
    """
    checkpoints = []
    try:
        for path in folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if name and path.is_dir():
                checkpoints.append(Saved(path, Position(int(name[1]), int(name[2] or 0))))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(folder, error) from error
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.position, reverse=True)


def set_aside(checkpoint: Saved) -> Path:
    """Gives a damaged checkpoint another name, which is returned; nothing of it is deleted."""
    path = checkpoint.path
    aside = _free_name(path.with_name(path.name + _DAMAGED))
    path.rename(aside)
    return aside


def set_aside_before(folder: Path) -> list[str]:
    """Returns the names of damaged checkpoints that earlier lives have set aside."""
    return sorted(path.name for path in folder.glob(f"step_*{_DAMAGED}*"))


def temporary(folder: Path, position: Position) -> Path:
    """Returns the path that a checkpoint has while it is written."""
    return folder / f"{position}{_UNFINISHED}"


def left_behind(folder: Path) -> list[Path]:
    """Returns what writers and deleters that died have left."""
    return sorted([*folder.glob(f"step_*{_UNFINISHED}"), *folder.glob(f"step_*{_DOOMED}*")])


def clean(folder: Path) -> tuple[list[str], list[str]]:
    """Deletes what `left_behind` finds.

    Returns:
        The names that are gone, and a sentence for each that could not be deleted.
    """
    deleted = []
    failures = []
    for path in left_behind(folder):
        failure = _delete(path)
        if failure:
            failures.append(failure)
        else:
            deleted.append(path.name)
    return deleted, failures


def commit(
    folder: Path,
    position: Position,
    digests: Mapping[str, Sequence[Any]],
    header: Mapping[str, Any],
) -> Saved:
    """Gives a completely written checkpoint its name.

    Args:
        folder: of the run's checkpoints.
        position: where in the run it was taken.
        digests: file name -> (bytes, checksum), every file but the manifest; all are fsynced.
        header: what else the manifest holds.
    """
    partial = temporary(folder, position)
    final = folder / str(position)
    files = {name: list(digest) for name, digest in digests.items()}
    write_whole(partial / MANIFEST, json.dumps({**header, "files": files}, indent=1))
    # The names of its files are on disk before its own is.
    fsync(partial)

    if final.is_symlink() or final.exists():
        # The same position, reached again after a resume from before it.
        # Out of the way, not deleted first: a crash in between leaves one of the two whole.
        doomed = _free_name(final.with_name(f"{final.name}{_DOOMED}"))
        final.rename(doomed)
        partial.rename(final)
        _delete(doomed)
    else:
        partial.rename(final)

    # Until now a power cut could take the new name back.
    fsync(folder)
    return Saved(final, position)


def name_latest(folder: Path, position: Position) -> None:
    """Writes the name of the newest checkpoint, for people and scripts.

    A run itself looks at the checkpoints.
    """
    write_whole(folder / LATEST, f"{position}\n")


def retire(
    folder: Path, *, keep: int, keep_every: int, keep_best: bool
) -> tuple[list[Position], list[str]]:
    """Deletes the checkpoints that need not be kept.

    Kept are the `keep` newest, those after every `keep_every`-th step (0: none for that reason),
    the one with the best held-out accuracy, the newest of equals, and links: whoever moved a
    checkpoint elsewhere wants to keep it.

    Returns:
        The positions that are gone, and a sentence for each that could not be deleted.
    """
    present = saved(folder)
    kept = {checkpoint.position for checkpoint in present[:keep]}
    ratings = []
    for checkpoint in present:
        position = checkpoint.position
        if checkpoint.path.is_symlink():
            kept.add(position)
        if keep_every and not position.update and position.step % keep_every == 0:
            kept.add(position)
        # A checkpoint of before the first evaluation has no accuracy.
        rating = checkpoint.manifest().get("accuracy")
        if rating is not None:
            # Of equal accuracies the larger position wins: the newest.
            ratings.append((float(rating), position))
    if ratings and keep_best:
        kept.add(max(ratings)[1])

    gone = []
    failures = []
    for checkpoint in present:
        if checkpoint.position in kept:
            continue

        # Renamed first: half of a deleted checkpoint must not look like a whole one.
        doomed = _free_name(checkpoint.path.with_name(f"{checkpoint.path.name}{_DOOMED}"))
        try:
            checkpoint.path.rename(doomed)
        except OSError as error:
            failures.append(f"{checkpoint.path.name} could not be deleted: {error}")
            continue

        gone.append(checkpoint.position)
        failure = _delete(doomed)
        if failure:
            failures.append(failure)

    return gone, failures


def _delete(path: Path) -> str:
    """Deletes a directory, or a link but not what it points to.

    Returns:
        A sentence about why that failed, or "".
    """
    try:
        # rmtree refuses a link, and what it points to is not ours to delete.
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        return f"{path.name} could not be deleted: {error}"
    return ""


def sync_files(files: Iterable[Path]) -> None:
    """Brings files that are written already to the disk; missing ones are left out."""
    for file in files:
        if file.exists():
            fsync(file)


def _free_name(path: Path) -> Path:
    free = path
    number = 1
    while free.exists() or free.is_symlink():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
