"""A run directory is looked at before anything of it changes; only the lock is taken first.

    claim.take()            whose directory is it, what have earlier lives left? (takes the lock)
    begins(...)             resume, begin, begin anew, refuse, or nothing to do (reads only)
    claim.refuse(sentence)  the start is refused: status.json says so, nothing else changes
    Reporter.begin(...)     everything is accepted: from here on the directory is this life's

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

from megatron_real.errors import State
from megatron_real.runs.changes import check_changes
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.lock import RunLock
from megatron_real.runs.saved import LATEST, Saved
from megatron_real.runs.status import read_status, write_status


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
    """Whether trained weights are there."""

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
            listed = ", ".join(others[:3])
            if len(others) > 3:
                listed += ", ..."
            raise ValueError(
                f"{directory.path} is not a run directory, and it is not empty ({listed}); "
                "give another trainer.run_dir"
            )

        try:
            # A row that was cut has no end of line and is no step.
            steps = directory.metrics.read_bytes().count(b"\n")
        except FileNotFoundError:
            steps = 0

        return cls(
            config=_config(directory.config),
            status=read_status(directory.status),
            steps=steps,
            exported=directory.weights.is_dir(),
        )

    @property
    def state(self) -> str:
        """The run's own state, whatever became of a start that was refused since."""
        status = self.status.get("before") or self.status
        return str(status.get("state", ""))


def _config(file: Path) -> dict[str, Any] | None:
    """Returns the configuration of an earlier life; None where there is no file.

    Raises:
        ValueError: it is cut, or is no configuration.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not file.is_file():
        return None

    values: Any = None
    problem = "it has no section 'trainer'"
    cause: Exception | None = None
    try:
        values = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        problem = str(error).splitlines()[0]
        cause = error

    if isinstance(values, dict) and isinstance(values.get("trainer"), dict):
        return dict(values)

    raise ValueError(
        f"{file} is not a whole configuration ({problem}), so nobody knows what the run was made "
        f"with; copy the 'config' of the last file in {file.parent / 'lives'} there, or give "
        "another trainer.run_dir"
    ) from cause


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
        """Whether an earlier life ended before its first checkpoint: its steps are made again."""
        return self.newest is None and (self.earlier.config is not None or self.earlier.steps > 0)


def check_without_checkpoint(
    directory: RunDirectory, earlier: Earlier, config: Mapping[str, Any], lost: list[str]
) -> list[str]:
    """Checks that a run may begin where no whole checkpoint is.

    Args:
        directory: of the run.
        earlier: what earlier lives have left in it.
        config: of this life.
        lost: a description of each checkpoint that is there or was there, and is not whole.

    Returns:
        A line for each setting that changed.

    Raises:
        ValueError: the steps of an earlier life would be lost, or a setting may not change.
    """
    path = directory.path
    if lost or (directory.checkpoints / LATEST).exists():
        reasons = "; ".join(lost) or f"{LATEST} names one that is not there"
        raise ValueError(
            f"no whole checkpoint of {path} is left ({reasons}), and its {earlier.steps} steps are "
            f"not thrown away unasked; bring a checkpoint back, or delete {path} to begin anew, or "
            "give another trainer.run_dir"
        )
    if earlier.config is None and not earlier.steps:
        return []

    # A run that would have saved was killed before its first checkpoint: it may begin anew. One
    # that was to save nothing has in its steps all that there is of it.
    every = 0
    if earlier.config:
        every = earlier.config.get("checkpoint", {}).get("every")
    if earlier.config is None or earlier.state == "finished" or (earlier.steps and not every):
        raise ValueError(
            f"{path} holds a run already, of {earlier.steps} steps and without a checkpoint to go "
            "on from; give another trainer.run_dir or delete it"
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

        Args:
            say: called with a sentence about an earlier owner.

        Raises:
            ValueError: the directory holds something else, or another run is using it.
        """
        # Read before too: a directory of other files does not even get a lock.
        path = self.directory.path
        Earlier.read(self.directory)
        # From the innermost outwards: in this order they can be removed again.
        self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._lock.take(say)
        self._held = True
        return Earlier.read(self.directory)

    def refuse(self, sentence: str, state: State = "failed") -> None:
        """Says in status.json what became of this start; a directory that it made is gone again."""
        if not self._held:
            # The directory is another run's, or no run's.
            return

        path = self.directory.path
        if path in self._made:
            # The directory is removed while the lock, which is all that it has, is still held. It
            # is renamed first: a newcomer that waits for the lock must never see a part of it.
            # Where that fails, an empty directory more does no harm.
            with contextlib.suppress(OSError):
                names = [entry.name for entry in path.iterdir()]
                if names == [self.directory.owners.name]:
                    doomed = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
                    path.rename(doomed)
                    shutil.rmtree(doomed)
                    for parent in self._made[1:]:
                        parent.rmdir()
        else:
            # Several refused starts in a row keep the run's own status, not each other's.
            status = read_status(self.directory.status)
            before = status.get("before") or status
            # The sentence is shown whether or not it can be written.
            with contextlib.suppress(OSError):
                write_status(self.directory.status, state, sentence, before=before)
        self.release()

    def release(self) -> None:
        """Gives the directory back."""
        if self._held:
            self._held = False
            self._lock.release()
