"""A run directory is looked at before anything of it changes; only the lock is taken first.

    claim.take()                  whose directory is it? what have earlier lives left?     reads, and takes the lock
    begins(...)                   resume, begin, begin anew, refuse, or nothing to do      reads
    claim.refuse(sentence)        the start is refused: status.json says so, nothing else changes
    Reporter.begin(...)           everything is accepted: from here on the directory is this life's

Loadable without torch.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_real.runs.changes import check_changes
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.lock import RunLock
from megatron_real.runs.saved import LATEST, Saved
from megatron_real.runs.status import State, read_status, write_status


class NothingToDo(Exception):
    """The run has finished already; says how to go on."""


@dataclass(frozen=True)
class Earlier:
    """What earlier lives of a run have left, as the first rank sees it."""

    config: Mapping[str, Any] | None = None
    """The configuration of the last life that was accepted; None where there was none."""
    status: Mapping[str, Any] = field(default_factory=dict)
    """status.json; empty where there is none."""
    steps: int = 0
    """Rows of metrics."""
    exported: bool = False
    """Trained weights are there."""

    @classmethod
    def read(cls, directory: RunDirectory) -> Earlier:
        """Reads a run directory, which need not exist.

        Raises:
            ValueError: it is a file, holds something else than a run, or its config.yaml is cut.
        """
        if not directory.path.exists():
            return cls()
        if not directory.path.is_dir():
            raise ValueError(f"{directory.path} is a file; give another trainer.run_dir")
        others = directory.foreign_files()
        if others:
            listed = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            raise ValueError(
                f"{directory.path} is not a run directory, and it is not empty ({listed}); give another trainer.run_dir"
            )
        try:
            steps = directory.metrics.read_bytes().count(b"\n")
        except FileNotFoundError:
            steps = 0
        config, status = _config(directory.config), read_status(directory.status)
        return cls(config, status, steps, exported=directory.weights.is_dir())

    @property
    def state(self) -> str:
        """The run's own state, whatever became of a start that was refused since."""
        status = self.status.get("before") or self.status
        return str(status.get("state", ""))


def _config(file: Path) -> dict[str, Any] | None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not file.is_file():
        return None
    try:
        values: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise ValueError(_cut(file, str(error).splitlines()[0])) from error
    if not isinstance(values, dict) or not isinstance(values.get("trainer"), dict):
        raise ValueError(_cut(file, "it has no section 'trainer'"))
    return dict(values)


def _cut(file: Path, problem: str) -> str:
    return (
        f"{file} is not a whole configuration ({problem}), so nobody knows what the run was made with; copy the "
        f"'config' of the last file in {file.parent / 'lives'} there, or give another trainer.run_dir"
    )


@dataclass(frozen=True)
class Beginning:
    """How a life begins. Everything in it has been checked, and nothing has been changed."""

    earlier: Earlier
    """What was there."""
    newest: Saved | None
    """The checkpoint that it goes on from; None: from the start."""
    changed: list[str]
    """A line for each setting that differs from the earlier life's."""

    @property
    def again(self) -> bool:
        """An earlier life ended before its first checkpoint: its steps are made again."""
        return self.newest is None and (self.earlier.config is not None or self.earlier.steps > 0)


def check_without_checkpoint(
    directory: RunDirectory, earlier: Earlier, config: Mapping[str, Any], lost: list[str]
) -> list[str]:
    """Whether a run may begin where no whole checkpoint is; a line for each setting that changed.

    Args:
        config: of this life.
        lost: a description of each checkpoint that is there or was there, and is not whole.

    Raises:
        ValueError: the steps of an earlier life would be lost, or a setting may not change.
    """
    path = directory.path
    if lost or (directory.checkpoints / LATEST).exists():
        reasons = "; ".join(lost) or f"{LATEST} names one that is not there"
        raise ValueError(
            f"no whole checkpoint of {path} is left ({reasons}), and its {earlier.steps} steps are not thrown away "
            f"unasked; bring a checkpoint back, or delete {path} to begin anew, or give another trainer.run_dir"
        )
    if earlier.config is None and not earlier.steps:
        return []
    every = earlier.config.get("checkpoint", {}).get("every") if earlier.config else 0
    if earlier.config is None or earlier.state == "finished" or (earlier.steps and not every):
        raise ValueError(
            f"{path} holds a run already, of {earlier.steps} steps and without a checkpoint to go on from; "
            "give another trainer.run_dir or delete it"
        )
    return check_changes(earlier.config, config, within_a_step=False)


class Claim:
    """This process's right to a run directory. Only the first rank has one.

    Example:
        claim = Claim(directory)
        earlier = claim.take(say)
        ...                         # checks
        claim.refuse("...")         # or Reporter.begin()
        claim.release()
    """

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self._lock = RunLock(directory.owners)
        self._made: list[Path] = []
        self._held = False

    def take(self, say: Callable[[str], None]) -> Earlier:
        """Takes the lock, and reads what is there.

        Raises:
            ValueError: the directory holds something else, or another run is using it.
        """
        path = self.directory.path
        Earlier.read(self.directory)  # a directory of other files does not even get a lock
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._lock.take(say)
        self._held = True
        return Earlier.read(self.directory)

    def refuse(self, sentence: str, state: State = "failed") -> None:
        """Says in status.json what became of this start; a directory that it made is gone again."""
        if not self._held:
            return  # the directory is another run's, or no run's
        if self.directory.path in self._made:
            with contextlib.suppress(OSError):  # an empty directory more does no harm
                self._remove()
        else:
            before = read_status(self.directory.status)
            with contextlib.suppress(OSError):  # the sentence is shown all the same
                write_status(
                    self.directory.status, state, sentence, before=before.get("before") or before
                )
        self.release()

    def _remove(self) -> None:
        """Removes the directory, which has nothing but this lock, while the lock is still held."""
        path = self.directory.path
        if [entry.name for entry in path.iterdir()] != [self.directory.owners.name]:
            return
        # A newcomer that waits for the lock must never see a part of it.
        doomed = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        path.rename(doomed)
        shutil.rmtree(doomed)
        for parent in self._made[1:]:
            parent.rmdir()

    def release(self) -> None:
        """Gives the directory back."""
        if self._held:
            self._held = False
            self._lock.release()
