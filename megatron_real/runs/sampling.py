"""The chunks of an unfinished step on disk: RUN/rollouts/chunk-STEP-DRAW-FIRST.parquet.

rollout/source.py draws them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_real.config import Config, to_plain
from megatron_real.config.sources import data_sources
from megatron_real.exchange import Exchange
from megatron_real.records import Prompt, Rollout
from megatron_real.rollout.origin import Origin
from megatron_real.rollout.source import ChunkName
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.ranks import Ranks
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
        "rollout.replay",
        "labels.workers",
        "labels.sandbox",
        "labels.max_failed_share",
        "labels.permute",
    )
)


class ChunkFiles:
    """Keeps whole chunks, and hands them out again only where they were drawn as they would be drawn now."""

    def __init__(
        self,
        directory: RunDirectory,
        ranks: Ranks,
        say: Callable[[str], None],
        *,
        begun_step: int | None = None,
    ) -> None:
        """
        Args:
            directory: of the run.
            ranks: all of the run's.
            say: shows a sentence.
            begun_step: one that an earlier life has made updates of; its chunks came back with the
                checkpoint.
        """
        self._directory = directory
        self._ranks = ranks
        self._exchange = Exchange(ranks.rank, ranks.world, ranks.group)
        self._say = say
        self._begun_step = begun_step

    def read(
        self, name: ChunkName, prompts: Sequence[Prompt], origin: Origin
    ) -> list[Rollout] | None:
        """The kept rollouts of a chunk, which the first rank holds; None where they are to be drawn. Collective.

        The first rank alone looks for the file and judges it: all ranks must go the same way.

        Raises:
            ValueError: of a step that is partly trained on, the file is damaged or the prompts are others now.
        """
        kept: list[Rollout] = []

        def read() -> bool:
            rollouts = self._read(name, prompts, origin)
            if rollouts is None:
                return False
            for rollout in rollouts:
                # The prompts of a step that is begun may have other names now: all ranks must know
                # the same ones.
                prompt = dataclasses.replace(rollout.prompt, uid=prompts[rollout.group].uid)
                kept.append(dataclasses.replace(rollout, prompt=prompt))
            return True

        if not self._ranks.on_first(read):
            return None
        return self._exchange.share(kept, prompts)

    def write(self, name: ChunkName, origin: Origin, rollouts: Sequence[Rollout]) -> None:
        """Keeps a chunk. The first rank writes, and every rank gives it what it holds. Collective."""
        whole = self._exchange.to_first(rollouts)
        if self._ranks.first:
            file = self._directory.chunk(name.step, name.draw, name.first_prompt)
            write_chunk(file, whole, step=name.step, origin=origin)

    def _read(
        self, name: ChunkName, prompts: Sequence[Prompt], origin: Origin
    ) -> list[Rollout] | None:
        file = self._directory.saved_chunk(name.step, name.draw, name.first_prompt)
        if not file.is_file():
            return None
        try:
            before, rollouts = read_chunk(file)
        except ValueError as error:
            if name.step == self._begun_step:
                raise  # what the step has been trained on cannot be drawn again
            self._say(f"step {name.step}: {error}; its rollouts are drawn again")
            return None
        if name.step == self._begun_step:
            # These rollouts are partly trained on: the weights have moved since, and what they were drawn and labelled
            # under stays. Only their prompts must be those that the rest of the step counts on.
            if [p.token_ids for p in prompts] != _questions(rollouts):
                raise ValueError(
                    f"{file} answers other prompts than step {name.step} asks, and the step is partly "
                    "trained on; use the same data"
                )
            changed = []
        else:
            changed = ["nothing says under what"] if before is None else before.differences(origin)

        if changed:
            self._say(
                f"step {name.step}: {len(rollouts)} rollouts on disk were drawn otherwise, and are drawn again: "
                f"{'; '.join(changed)}"
            )
            return None
        self._say(f"step {name.step}: {len(rollouts)} rollouts are on disk and not sampled again")
        return rollouts


def _questions(rollouts: Sequence[Rollout]) -> list[tuple[int, ...]]:
    """[groups] the tokens of each group's prompt."""
    by_group = {rollout.group: rollout.prompt.token_ids for rollout in rollouts}
    return [by_group[group] for group in sorted(by_group)]


def settings_of_rollouts(config: Config) -> dict[str, Any]:
    """Returns what a draw's rollouts and their labels depend on, by the names of the configuration.

    The values are plain JSON. A verifier of the user's own counts by what its file holds. A value
    that was given as an interpolation, such as `${oc.env:NAME}`, may be a secret and changes with
    the environment: it stands here as it was given, and as a digest.
    """
    written = to_plain(config)
    settings: dict[str, Any] = {}
    for section in ("rollout", "labels"):
        values = json.loads(json.dumps(asdict(getattr(config, section))))
        for name, value in values.items():
            given = written[section][name]
            settings[f"{section}.{name}"] = value if value == given else f"{given} {_digest(value)}"
    for name in _WITHOUT_EFFECT_ON_ROLLOUTS:
        settings.pop(name, None)
    own = Path(config.labels.verifier.rpartition(":")[0])
    if own.is_file():
        settings["the file of labels.verifier"] = _digest(own.read_text(encoding="utf-8"))
    for name, source in data_sources(config.data).items():
        if source.verifier:
            file = Path(source.verifier.rpartition(":")[0])
            held = _digest(file.read_text(encoding="utf-8")) if file.is_file() else ""
            settings[f"data.sources.{name}.verifier"] = f"{source.verifier} {held}".strip()
    return settings


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]
