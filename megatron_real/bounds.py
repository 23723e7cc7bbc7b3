"""Bounds of settings, written where the setting is declared.

    tau: Annotated[float, Positive] = 0.5
    top_p: Annotated[float, Share] = 1.0
    clip_high: Annotated[float, AtLeast(1.0)] = 1.28
    max_length: Annotated[int | None, Positive] = None    # None is always within its bound

`check_bounds` reads them from any dataclass, sections within sections included, so that a setting
that is added needs no second place that knows its limits. This module imports nothing of the
project.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class Bound(Protocol):
    """What a setting's value must satisfy."""

    def holds(self, value: Any) -> bool:
        """Whether `value`, which has the setting's type, is within the bound."""

    @property
    def demand(self) -> str:
        """The second half of an error's sentence, for example `must be above 0`."""


@dataclass(frozen=True)
class Above:
    """Finite numbers above `low`."""

    low: float
    """Not included."""

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and value > self.low

    @property
    def demand(self) -> str:
        return f"must be above {self.low:g}"


@dataclass(frozen=True)
class AtLeast:
    """Finite numbers from `low` on."""

    low: float
    """Included."""
    meaning: str = ""
    """What `low` itself stands for, for example `off`."""

    def holds(self, value: float) -> bool:
        return math.isfinite(value) and value >= self.low

    @property
    def demand(self) -> str:
        low = f"{self.low:g}"
        if self.meaning:
            low += f" ({self.meaning})"
        return f"must be {low} or above"


@dataclass(frozen=True)
class Between:
    """Numbers from `low` to `high`."""

    low: float
    """Included unless `above_low`."""
    high: float
    """Included unless `below_high`."""
    above_low: bool = False
    """Leaves out `low` itself."""
    below_high: bool = False
    """Leaves out `high` itself."""

    def holds(self, value: float) -> bool:
        if self.above_low and value == self.low:
            return False
        if self.below_high and value == self.high:
            return False
        # NaN is in no interval: no comparison with it is true.
        return self.low <= value <= self.high

    @property
    def demand(self) -> str:
        left = "["
        if self.above_low:
            left = "("
        right = "]"
        if self.below_high:
            right = ")"
        return f"must lie in {left}{self.low:g}, {self.high:g}{right}"


@dataclass(frozen=True)
class OneOf:
    """A few values, where they come from a table and a Literal would repeat it."""

    choices: Sequence[Any]
    """The values."""

    def holds(self, value: Any) -> bool:
        return value in self.choices

    @property
    def demand(self) -> str:
        return f"takes one of {', '.join(map(str, self.choices))}"


Positive = Above(0)
"""Finite and above 0."""

NonNegative = AtLeast(0)
"""Finite, 0 or above."""

ZeroIsOff = AtLeast(0, "off")
"""Finite, 0 or above, where 0 switches something off."""

Share = Between(0, 1, above_low=True)
"""In (0, 1]."""


def check_bounds(section: Any, prefix: str = "") -> None:
    """Checks every setting of a dataclass, and of the dataclasses below it, against its bounds.

    Args:
        section: an instance of a dataclass whose fields are annotated as in this module's
            docstring.
        prefix: what comes before a field's name in errors, for example `rollout.`.

    Raises:
        ValueError: a setting is out of bounds; names it, its value and what it must be.
    """
    every_hint = hints(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        name = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{name}.")
            continue
        if value is None:
            continue

        hint = every_hint[field.name]
        # An annotation may hold other things than bounds.
        bounds = [mark for mark in getattr(hint, "__metadata__", ()) if hasattr(mark, "holds")]
        for bound in bounds:
            if not bound.holds(value):
                or_null = ""
                if type(None) in typing.get_args(plain_hint(hint)):
                    or_null = ", or null"
                raise ValueError(f"{name} is {value}; it {bound.demand}{or_null}")


def plain_hint(hint: Any) -> Any:
    """Returns the type in an annotation, without its bounds."""
    if hasattr(hint, "__metadata__"):
        return hint.__origin__
    return hint


def hints(cls: Any) -> dict[str, Any]:
    """Returns field of the dataclass `cls` -> its annotation, bounds included."""
    # A cached function takes hashable arguments only, which for a type checker no class of
    # dataclasses is.
    return _hints(cls)


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(cls)}
    # Without include_extras the bounds would be taken off.
    every_hint = typing.get_type_hints(cls, include_extras=True)
    return {name: hint for name, hint in every_hint.items() if name in names}
