"""The chunks of an unfinished step on disk: RUN/rollouts/chunk-STEP-DRAW-FIRST.parquet.

rollout/source.py draws them. On several nodes a chunk is written in parts, and each node reads its
share of them again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_real.config import Config, to_plain
from megatron_real.config.sources import data_sources
from megatron_real.parallel.exchange import Exchange
from megatron_real.parallel.ranks import EveryRankError, Ranks
from megatron_real.records import Prompt, Rollout
from megatron_real.rollout.origin import Origin
from megatron_real.rollout.source import ChunkName
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.parts import Part, part_files, write_parts
from megatron_real.runs.rollouts import read_chunk, write_chunk

# Settings of the sections `rollout` and `labels` that do not change what is drawn or how it is
# labelled: how fast, where and in which pieces. Whatever is not named here counts, so that a new
# setting is not forgotten.
_WITHOUT_EFFECT_ON_ROLLOUTS = frozenset(
    (
        "rollout.num_servers",
        "rollout.servers",
        "rollout.server_host",
        "rollout.server_start_seconds",
        "rollout.request_timeout_seconds",
        "rollout.kv_cache_mib",
        "rollout.max_sequences",
        "rollout.max_lag",
        "rollout.sleep_level",
        "rollout.offload_optimizer",
        "rollout.sync",
        "rollout.num_prompts",
        "rollout.allow_truncated_sampling",
        "rollout.batch_size",
        "rollout.mismatch_bound",
        "rollout.retries",
        "rollout.refill_rounds",
        "rollout.chunk_prompts",
        "rollout.keep_steps",
        "rollout.keep_every",
        "rollout.keep_groups",
        "rollout.replay",
        "labels.workers",
        "labels.sandbox",
        "labels.max_failed_share",
        "labels.permute",
    )
)


@dataclass(frozen=True)
class _Reading:
    """What a rank has read of a kept chunk, without the rollouts: every rank gets it."""

    num_rollouts: int = 0
    """Number of rollouts that this rank has read."""
    damaged: str = ""
    """Which file is no file of rollouts, and why; empty where none is damaged."""
    changed: tuple[str, ...] = ()
    """What has changed since the rollouts were drawn, in words."""
    groups: frozenset[int] = frozenset()
    """The rollouts' groups, counted from the chunk's first."""


class ChunkFiles:
    """Keeps whole chunks.

    A chunk is handed out again only where it was drawn as it would be drawn now.
    """

    def __init__(
        self,
        directory: RunDirectory,
        ranks: Ranks,
        say: Callable[[str], None],
        *,
        begun_step: int | None = None,
    ) -> None:
        """Keeps the chunks of one run.

        Args:
            directory: the run's directory.
            ranks: all ranks of the run.
            say: shows a sentence.
            begun_step: the step of which an earlier life has made some updates; its chunks came
                back with the checkpoint.
        """
        self._directory = directory
        self._ranks = ranks
        self._exchange = Exchange(
            ranks.rank, ranks.world, ranks.group, ranks_per_node=ranks.per_node
        )
        self._say = say
        if not ranks.first:
            # The first rank speaks for all.
            self._say = lambda sentence: None
        self._begun_step = begun_step

    def read(
        self, name: ChunkName, prompts: Sequence[Prompt], origin: Origin
    ) -> list[Rollout] | None:
        """Returns the kept rollouts of a chunk, held by the ranks that have read them. Collective.

        The first rank reads a file, and the first rank of each node its share of parts. All ranks
        must go the same way: they use a chunk only where all of it is as it would be drawn now.

        Returns:
            None where the rollouts are to be drawn.

        Raises:
            ValueError: the step is partly trained on, and the file is damaged or its prompts are
                not the present ones.
        """
        # The first rank alone looks for it: file systems of other nodes lag behind.
        file = self._directory.saved_chunk(name.step, name.draw, name.first_prompt)
        if not self._ranks.on_first(file.exists):
            return None

        own: list[Rollout] = []
        # `every` is collective and gives all ranks all readings, so that all take the
        # same branch below.
        readings = self._ranks.every(lambda: self._read(file, name, prompts, origin, into=own))
        count = sum(reading.num_rollouts for reading in readings)
        damaged = next((reading.damaged for reading in readings if reading.damaged), "")
        changed = next((reading.changed for reading in readings if reading.changed), ())
        if not count and not damaged:
            damaged = f"{file} is empty; it holds no rollout to train on"

        if damaged:
            self._say(f"step {name.step}: {damaged}; its rollouts are drawn again")
            return None
        if changed:
            self._say(
                f"step {name.step}: {count} rollouts on disk were drawn otherwise, and are drawn "
                f"again: {'; '.join(changed)}"
            )
            return None

        # A node's share may be empty; together the ranks must have a group for every prompt.
        groups = frozenset[int]().union(*(reading.groups for reading in readings))
        if len(groups) != len(prompts):
            raise _other_prompts(file, name.step)

        self._say(f"step {name.step}: {count} rollouts are on disk and not sampled again")
        # Each rank holds what it has read. The others learn the facts of it; no tokens are sent.
        return self._exchange.share(own, prompts)

    def write(self, name: ChunkName, origin: Origin, rollouts: Sequence[Rollout]) -> None:
        """Keeps a chunk. Collective.

        The first rank of a node writes what the ranks of the node hold.
        """
        file = self._directory.chunk(name.step, name.draw, name.first_prompt)

        def write(own: list[Rollout], part: Part) -> None:
            write_chunk(file, own, step=name.step, origin=origin, part=part)

        write_parts(file, self._exchange, rollouts, write)

    def _read(
        self,
        file: Path,
        name: ChunkName,
        prompts: Sequence[Prompt],
        origin: Origin,
        *,
        into: list[Rollout],
    ) -> _Reading:
        """Reads this rank's share of a chunk's parts, and judges it.

        Args:
            into: gets the rollouts.
        """
        exchange = self._exchange
        if not exchange.first_of_node:
            # The ranks of a node share its disk or its link: one of them reads for all.
            return _Reading()

        begun = name.step == self._begun_step
        changed: list[str] = []
        try:
            # A run may have other nodes than the one before it.
            for part in part_files(file)[exchange.node :: exchange.num_nodes]:
                before, rollouts = read_chunk(part)
                into += rollouts
                # Parts of a chunk have one origin, so the answer of the last one holds for
                # all of them.
                changed = ["nothing says under what"]
                if before is not None:
                    changed = before.differences(origin)
        except ValueError as error:
            if begun:
                raise  # what the step has been trained on cannot be drawn again

            return _Reading(damaged=str(error))

        if begun:
            # These rollouts are partly trained on: the weights have moved since, and what the
            # rollouts were drawn and labelled under stays. Only their prompts must be those that
            # the rest of the step counts on.
            changed = []
            for rollout in into:
                place = rollout.group
                tokens = rollout.prompt.token_ids
                if place >= len(prompts) or tokens != prompts[place].token_ids:
                    raise _other_prompts(file, name.step)
        elif changed:
            return _Reading(len(into), changed=tuple(changed))

        # The prompts of a step that is begun may have other names now: all ranks must know the
        # same ones.
        for i, rollout in enumerate(into):
            prompt = dataclasses.replace(rollout.prompt, uid=prompts[rollout.group].uid)
            into[i] = dataclasses.replace(rollout, prompt=prompt)
        return _Reading(len(into), groups=frozenset(rollout.group for rollout in into))


def _other_prompts(file: Path, step: int) -> ValueError:
    return EveryRankError(
        f"{file} answers other prompts than step {step} asks, and the step is partly trained on; "
        "use the same data"
    )


def settings_of_rollouts(config: Config) -> dict[str, Any]:
    """Returns what a draw's rollouts and their labels depend on, by the names of the configuration.

    The values are plain JSON. A verifier of the user's own counts by what its file holds. A value
    that was given as an interpolation, such as `${oc.env:NAME}`, may be a secret and changes with
    the environment: it stands here as it was given, and as a digest.
    """
    written = to_plain(config)
    settings: dict[str, Any] = {}
    for section in ("rollout", "labels"):
        # Through JSON once, as they are compared with values that were read from a file's header.
        values = json.loads(json.dumps(asdict(getattr(config, section))))
        for name, value in values.items():
            given = written[section][name]
            if value != given:
                value = f"{given} {_digest(value)}"
            settings[f"{section}.{name}"] = value
    for name in _WITHOUT_EFFECT_ON_ROLLOUTS:
        settings.pop(name, None)

    # A verifier is FILE:FUNCTION, or the name of one of ours, which is no file.
    own = Path(config.labels.verifier.rpartition(":")[0])
    if own.is_file():
        settings["the file of labels.verifier"] = _digest(own.read_text(encoding="utf-8"))
    for name, source in data_sources(config.data).items():
        if source.verifier:
            described = source.verifier
            file = Path(source.verifier.rpartition(":")[0])
            if file.is_file():
                described += f" {_digest(file.read_text(encoding='utf-8'))}"
            settings[f"data.sources.{name}.verifier"] = described

    return settings


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]
