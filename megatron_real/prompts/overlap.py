"""Questions that are the same, or nearly: for deduplication, and against training on the
benchmarks.

Two questions are the same when their tokens are: words, numbers, operators and single letters of
scripts without spaces, after case, spacing, fonts and the looks of the formulas are taken away.
They are near when the shorter one shares at least `share` of its n-grams of `size` tokens with the
other: reworded beginnings, changed numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

# LaTeX that only changes the looks of a formula.
_LOOKS = re.compile(
    r"\\(left|right|displaystyle|textstyle|limits|quad|qquad|text|mathrm|mathbf|mathit|mathbb|operatorname|big|Big)"
    r"(?![a-zA-Z])|\\[,;:! ]"
)
_SYNONYMS = (
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\cdot", "*"),
    ("\\times", "*"),
    ("\\leq", "\\le"),
)
_TOKEN = re.compile(r"[a-z]+|\d+|[^\W\d_a-z]|[-+*/=<>^!%]")


@lru_cache(maxsize=1 << 16)  # DAPO's file asks each question a hundred times
def tokens(question: str) -> tuple[str, ...]:
    """What of a question counts.

    Example: tokens("Find $\\\\left(x+1\\\\right)^2$.") -> ("find", "x", "+", "1", "^", "2")
    """
    text = unicodedata.normalize("NFKC", _LOOKS.sub(" ", question))
    for one, other in _SYNONYMS:
        text = text.replace(one, other)
    return tuple(_TOKEN.findall(text.lower()))


# Braces that only hold the text of a command, or a single token, group nothing.
_TEXT_BRACES = re.compile(r"\\(?:text|mathrm|mathbf|mathit|mathbb|operatorname)\s*\{([^{}]*)\}")
_LONE_BRACES = re.compile(r"\{\s*(\w+|\\[a-zA-Z]+)\s*\}")
_GROUPED_TOKEN = re.compile(r"[a-z]+|\d+|[^\W\d_a-z]|[-+*/=<>^!%(){}\[\]]")


@lru_cache(maxsize=1 << 16)
def identity(question: str) -> tuple[str, ...]:
    r"""Returns what equal questions have in common: their tokens with the brackets that group them.

    \sqrt{16}+9 and \sqrt{16+9} have the same tokens, and are two questions.
    """
    text = _LONE_BRACES.sub(r" \1 ", _TEXT_BRACES.sub(r" \1 ", question))
    text = unicodedata.normalize("NFKC", _LOOKS.sub(" ", text))
    for one, other in _SYNONYMS:
        text = text.replace(one, other)
    return tuple(_GROUPED_TOKEN.findall(text.lower()))


@dataclass(frozen=True)
class Match:
    """A question that is a known one, or close to it."""

    name: str
    """Name of the known question."""
    share: float
    """1.0: the same question, or wholly part of it; else the n-grams shared by the two, of the
    shorter one's."""


class Index:
    """Known questions, to look others up in.

    Example:
        index = Index({"aime24/0": "Find the least ..."}, size=8, share=0.6)
        match = index.closest("Determine the least ...")
    """

    def __init__(self, questions: Mapping[str, str], *, size: int, share: float) -> None:
        """Raises ValueError for a size or share that makes no sense."""
        if size < 1 or not 0 < share <= 1:
            raise ValueError(
                f"n-grams of {size} tokens and a share of {share}: give a size >= 1 and a share in (0, 1]"
            )
        self._size, self._share = size, share
        self._names_of: dict[tuple[str, ...], set[str]] = defaultdict(set)
        self._same: dict[tuple[str, ...], str] = {}
        self._count: dict[str, int] = {}
        for name, question in questions.items():
            found = tokens(question)
            if self._same.setdefault(found, name) != name:
                continue  # asked before
            grams = self._grams(found)
            self._count[name] = len(grams)
            for gram in grams:
                self._names_of[gram].add(name)

    def closest(self, question: str) -> Match | None:
        """The known question that this one is nearest to; None when none is near."""
        found = tokens(question)
        if found in self._same:
            return Match(self._same[found], 1.0)
        grams = self._grams(found)
        shared: dict[str, int] = defaultdict(int)
        for gram in grams:
            for name in self._names_of.get(gram, ()):
                shared[name] += 1
        shares = {
            name: count / min(self._count[name], len(grams)) for name, count in shared.items()
        }
        near = [(share, name) for name, share in shares.items() if share >= self._share]
        return Match(max(near)[1], max(near)[0]) if near else None

    def _grams(self, found: tuple[str, ...]) -> set[tuple[str, ...]]:
        """None for a question of fewer tokens than `size`: too short to be near, though it can be
        the same.
        """
        return {found[i : i + self._size] for i in range(len(found) - self._size + 1)}
