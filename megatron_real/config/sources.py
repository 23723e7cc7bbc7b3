"""The training sets of `data.sources`: each with its own path, weight, suffix and verifier."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_real.config.schema import DataConfig


@dataclass(frozen=True)
class SourceConfig:
    """One training set of several."""

    path: str
    """As data.train."""
    split: str = ""
    """As data.train_split."""
    weight: float = 1.0
    """Its share of the prompts that are drawn, relative to the others' weights."""
    suffix: str | None = None
    """As data.suffix; None: that one."""
    verifier: str = ""
    """As labels.verifier; "": that one."""


def data_sources(data: DataConfig) -> dict[str, SourceConfig]:
    """Returns the training sets by name; none where data.train is the only one.

    Raises:
        ValueError: a set has no path, an unknown setting or a wrong value, or data.train is given
            too.
    """
    if data.sources and (data.train or data.train_split):
        raise ValueError(
            f"data.train = {data.train!r} and data.sources are both given; name it among "
            "data.sources, or leave one out"
        )
    return {name: _source(name, values) for name, values in data.sources.items()}


def _source(name: str, values: Any) -> SourceConfig:
    """Makes one training set of plain values.

    Raises:
        ValueError: it has no path, an unknown setting or a wrong value.
    """
    key = f"data.sources.{name}"
    if not isinstance(values, Mapping) or not values.get("path"):
        raise ValueError(f"{key} has no path; give {key}.path=FILE")

    known = {field.name for field in dataclasses.fields(SourceConfig)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"unknown key {key}.{unknown[0]}; it takes {', '.join(sorted(known))}")

    # True is an int, and no weight.
    weight = values.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"{key}.weight = {weight!r}; give a number above 0")

    for text in ("path", "split", "suffix", "verifier"):
        if not isinstance(values.get(text, ""), str):
            raise ValueError(f"{key}.{text} = {values[text]!r}; give text")
    return SourceConfig(**{**values, "weight": float(weight)})
