"""Checkpoints on disk: their names, what makes one whole, which is the newest good one, and which are kept.

A checkpoint is written under a temporary name, every file of it is fsynced, its manifest is written last, and only then
does it get its name. So a directory of that name that differs from its manifest was damaged afterwards: it is set aside
(never deleted) and the one before it is used. Loadable without torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_real.disk import fsync, write_whole

MANIFEST = "manifest.json"
LATEST = "latest"
_NAME = re.compile(r"step_(\d+)(?:_update_(\d+))?")
_UNFINISHED, _DAMAGED = ".partial", ".damaged"


@dataclass(frozen=True, order=True)
class Position:
    """How far a run has come. Example: Position(12, 2) is after 12 steps and two updates of the 13th."""

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
        """What was written when it was complete; {} where there is none or it is cut."""
        try:
            found = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and isinstance(found.get("files"), dict) else {}

    def damage(self, *, part: int = 0, parts: int = 1) -> str:
        """What is wrong with it, "" if nothing. Every `parts`-th file is read, so that ranks can share the work."""
        files: Mapping[str, Sequence[Any]] = self.manifest().get("files", {})
        if not files:
            return f"{MANIFEST} is missing or cut"
        for name in sorted(files)[part::parts]:
            size, digest = files[name]
            try:
                if (self.path / name).stat().st_size != size:
                    return f"{name} has {(self.path / name).stat().st_size} bytes instead of {size}"
                if checksum(self.path / name) != digest:
                    return f"{name} has another checksum than when it was written"
            except OSError as error:
                return f"{name}: {error.strerror}"
        return ""


def checksum(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)


def _sha256(stream: Any) -> str:
    """For Python 3.10, whose hashlib reads no files."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def saved(folder: Path) -> list[Saved]:
    """The checkpoints of a folder, the newest first, whole or not."""
    names = [(path, _NAME.fullmatch(path.name)) for path in (folder.iterdir() if folder.is_dir() else ())]
    found = [Saved(path, Position(int(m[1]), int(m[2] or 0))) for path, m in names if m and path.is_dir()]
    return sorted(found, key=lambda one: one.position, reverse=True)


def newest_whole(
    folder: Path, damage: Callable[[Saved], str], say: Callable[[str], None], *, first: bool = True
) -> Saved | None:
    """The newest checkpoint that `damage` finds nothing wrong with. The others are set aside, which is said.

    Args:
        first: this is the rank that renames and says; every rank gets the same answer from `damage`.
    """
    for one in saved(folder):
        wrong = damage(one)
        if not wrong:
            return one
        if first:
            aside = _free_name(one.path.with_name(one.path.name + _DAMAGED))
            one.path.rename(aside)
            say(f"WARNING: checkpoint {one.position} is damaged: {wrong}. It is now {aside.name}; using an older one")
    return None


def temporary(folder: Path, position: Position) -> Path:
    """The name that a checkpoint has while it is written."""
    return folder / f"{position}{_UNFINISHED}"


def clean(folder: Path) -> list[str]:
    """Deletes what a writer that died has left behind, and returns the names."""
    left = sorted(folder.glob(f"step_*{_UNFINISHED}")) if folder.is_dir() else []
    for path in left:
        shutil.rmtree(path)
    return [path.name for path in left]


def commit(folder: Path, position: Position, digests: Mapping[str, Sequence[Any]], header: Mapping[str, Any]) -> Saved:
    """Gives a completely written checkpoint its name.

    Args:
        digests: file name -> (bytes, checksum), every file but the manifest; all are fsynced.
        header: what else the manifest holds.
    """
    partial, final = temporary(folder, position), folder / str(position)
    write_whole(partial / MANIFEST, json.dumps({**header, "files": {k: list(v) for k, v in digests.items()}}, indent=1))
    fsync(partial)
    if final.exists():  # the same position, reached again after a resume from before it
        shutil.rmtree(final)
    partial.rename(final)
    write_whole(folder / LATEST, f"{position}\n")
    return Saved(final, position)


def retire(folder: Path, *, keep: int, keep_every: int, keep_best: bool) -> list[Position]:
    """Deletes the checkpoints that need not be kept, and returns their positions.

    Kept are the `keep` newest, those after every `keep_every`-th step (0: none for that reason), and the one with the
    best held-out accuracy, the newest of equals.
    """
    present = saved(folder)
    kept = {one.position for one in present[:keep]}
    kept |= {p.position for p in present if keep_every and not p.position.update and p.position.step % keep_every == 0}
    rated = [(float(rating), one.position) for one in present if (rating := one.manifest().get("accuracy")) is not None]
    kept |= {max(rated)[1]} if rated and keep_best else set()
    gone = [one for one in present if one.position not in kept]
    for one in gone:
        doomed = one.path.with_name(f"{one.path.name}{_UNFINISHED}")  # half deleted, it must not look like a checkpoint
        one.path.rename(doomed)
        shutil.rmtree(doomed)
    return [one.position for one in gone]


def sync_files(files: Iterable[Path]) -> None:
    """Brings files that are written already to the disk; missing ones are left out."""
    for file in files:
        if file.exists():
            fsync(file)


def _free_name(path: Path) -> Path:
    number = 1
    while (free := path if number == 1 else path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return free
