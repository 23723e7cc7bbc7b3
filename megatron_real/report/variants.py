"""What a report needs of run directories: the runs and their variants.

Runs that differ in their seed are of one variant.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_real.runs.run_records import RunRecords

_OF_ONE_RUN = (("trainer", "seed"), ("trainer", "run_dir"))
"""Settings in which runs of one variant may differ."""


@dataclass(frozen=True)
class Run:
    """One run directory, read once."""

    name: str
    """The name of its directory; VARIANT/seed-N for OUT/VARIANT/seed-N, a run of a sweep."""
    records: RunRecords
    """Its files."""
    config: Mapping[str, Any]
    """config.yaml of the newest life."""
    status: Mapping[str, Any]
    """status.json."""
    steps: Sequence[Mapping[str, Any]]
    """One row for each step that is done, in order."""
    evaluations: Sequence[Mapping[str, Any]]
    """One row for each evaluation on held-out problems, in order."""
    lives: Sequence[Mapping[str, Any]]
    """What each life was started with, in order."""


@dataclass(frozen=True)
class Variant:
    """Runs whose configurations differ in nothing but the seed."""

    name: str
    """The name of its run; of several runs, the beginning of their names."""
    runs: Sequence[Run]
    """One or more runs."""


def read_run(path: str) -> Run:
    """Reads a run directory.

    Raises:
        ValueError: it is no run directory, or has no readable config.yaml.
    """
    records = RunRecords(path)
    directory = records.directory
    config = directory.read_config("give the directory of a run that has begun")

    # A life that is being written, or was cut, is left out: the report is of what can be read.
    lives: list[Mapping[str, Any]] = []
    for file in sorted(directory.lives.glob("life-*.json")):
        try:
            life = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(life, dict):
            lives.append(life)

    # The runs of a sweep are VARIANT/seed-N: their own names would be alike.
    absolute = directory.path.resolve()
    name = absolute.name
    if re.fullmatch(r"seed-\d+", name):
        name = f"{absolute.parent.name}/{name}"

    return Run(
        name=name,
        records=records,
        config=config,
        status=records.status(),
        steps=[row for row in records.metrics() if isinstance(row.get("step"), int)],
        evaluations=[row for row in records.evaluations() if isinstance(row.get("step"), int)],
        lives=lives,
    )


def variants_of(runs: Sequence[Run]) -> list[Variant]:
    """Returns the variants in the order of their first runs."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        # A copy, by way of JSON: the run's own configuration keeps its seed and its directory.
        settings = json.loads(json.dumps(run.config, default=str))
        for section, name in _OF_ONE_RUN:
            settings.get(section, {}).pop(name, None)
        # A dictionary is no key; the text of one with sorted names is the same for equal settings.
        members.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    return [Variant(_name(same), same) for same in members.values()]


def _name(runs: Sequence[Run]) -> str:
    """Returns the name of the variant of these runs."""
    if len(runs) == 1:
        return runs[0].name
    # The common prefix is one of characters and not of directories: names end with the seed.
    common = os.path.commonprefix([run.name for run in runs]).rstrip("-_.")  # noqa: RUF071
    common = common.removesuffix("/seed")
    return f"{common or runs[0].name} ({len(runs)} runs)"
