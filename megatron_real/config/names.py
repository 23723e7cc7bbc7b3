"""Sentences about names that are not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_MAX_LISTED = 40
"""Known names that a sentence lists; of more than these it lists only the nearest five."""


def closest(name: str, known: Iterable[str], count: int = 5) -> list[str]:
    """Returns the `count` known names that resemble `name` most, the nearest first."""

    def likeness(candidate: str) -> float:
        return difflib.SequenceMatcher(None, candidate, name).ratio()

    # Sorted by name first: of equal likeness the order is always the same.
    return sorted(sorted(known), key=likeness, reverse=True)[:count]


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of a sentence about the unknown `name`.

    It says the known name that resembles it, else all of them, or the nearest five of many.
    """
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    if len(names) > _MAX_LISTED:
        return f"; the nearest of {len(names)} names are {', '.join(closest(name, names))}"
    return f"; known here: {', '.join(sorted(names))}"
