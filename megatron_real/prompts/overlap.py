"""Questions that are the same, or nearly.

This serves deduplication, and keeps training clear of the benchmarks.

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
    r"\\(left|right|displaystyle|textstyle|limits|quad|qquad|text|mathrm|mathbf|mathit|mathbb"
    r"|operatorname|big|Big)(?![a-zA-Z])|\\[,;:! ]"
)
_SYNONYMS = (
    ("\\dfrac", "\\frac"),
    ("\\tfrac", "\\frac"),
    ("\\cdot", "*"),
    ("\\times", "*"),
    ("\\leq", "\\le"),
)
# Words, numbers, single letters of other scripts, operators. Everything else only separates.
_TOKEN = re.compile(r"[a-z]+|\d+|[^\W\d_a-z]|[-+*/=<>^!%]")
# Braces that only hold the text of a command, or a single token, group nothing.
_TEXT_BRACES = re.compile(r"\\(?:text|mathrm|mathbf|mathit|mathbb|operatorname)\s*\{([^{}]*)\}")
_LONE_BRACES = re.compile(r"\{\s*(\w+|\\[a-zA-Z]+)\s*\}")
_GROUPED_TOKEN = re.compile(r"[a-z]+|\d+|[^\W\d_a-z]|[-+*/=<>^!%(){}\[\]]")


@lru_cache(maxsize=1 << 16)  # DAPO's file asks each question a hundred times
def tokens(question: str) -> tuple[str, ...]:
    """Returns what of a question counts.

    Example: tokens("Find $\\\\left(x+1\\\\right)^2$.") -> ("find", "x", "+", "1", "^", "2")
    """
    return tuple(_TOKEN.findall(_plain(question)))


@lru_cache(maxsize=1 << 16)
def identity(question: str) -> tuple[str, ...]:
    r"""Returns what equal questions have in common: their tokens with the brackets that group them.

    \sqrt{16}+9 and \sqrt{16+9} have the same tokens, and are two questions.
    """
    text = _TEXT_BRACES.sub(r" \1 ", question)
    text = _LONE_BRACES.sub(r" \1 ", text)
    return tuple(_GROUPED_TOKEN.findall(_plain(text)))


def _plain(text: str) -> str:
    """Returns a question without case, fonts and the looks of its formulas."""
    # NFKC makes plain letters and digits of mathematical and full-width ones.
    text = unicodedata.normalize("NFKC", _LOOKS.sub(" ", text))
    for spelling, common in _SYNONYMS:
        text = text.replace(spelling, common)
    return text.lower()


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
        """Takes the known questions by name.

        Args:
            questions: by name.
            size: tokens of an n-gram.
            share: of the n-grams, from which two questions are near.

        Raises:
            ValueError: a size or share that makes no sense.
        """
        if size < 1 or not 0 < share <= 1:
            raise ValueError(
                f"n-grams of {size} tokens and a share of {share}: give a size >= 1 and a share in "
                "(0, 1]"
            )
        self._size = size
        self._share = share
        # A question's tokens -> its name; a name -> its number of n-grams; an n-gram -> who has it.
        self._name_of: dict[tuple[str, ...], str] = {}
        self._num_grams: dict[str, int] = {}
        self._names_with: dict[tuple[str, ...], set[str]] = defaultdict(set)

        for name, question in questions.items():
            question_tokens = tokens(question)
            if question_tokens in self._name_of:
                continue  # the same question under another name
            self._name_of[question_tokens] = name
            grams = self._grams(question_tokens)
            self._num_grams[name] = len(grams)
            for gram in grams:
                self._names_with[gram].add(name)

    def closest(self, question: str) -> Match | None:
        """Returns the known question that this one is nearest to; None when none is near."""
        question_tokens = tokens(question)
        if question_tokens in self._name_of:
            return Match(self._name_of[question_tokens], 1.0)

        grams = self._grams(question_tokens)
        num_shared: dict[str, int] = defaultdict(int)
        for gram in grams:
            for name in self._names_with.get(gram, ()):
                num_shared[name] += 1

        near: list[tuple[float, str]] = []
        for name, count in num_shared.items():
            # Neither number is 0: the two questions share an n-gram.
            share = count / min(self._num_grams[name], len(grams))
            if share >= self._share:
                near.append((share, name))

        if not near:
            return None
        # Of equally near ones the last by name: the result does not depend on any order.
        share, name = max(near)
        return Match(name, share)

    def _grams(self, question_tokens: tuple[str, ...]) -> set[tuple[str, ...]]:
        """Returns the n-grams of a question.

        A question of fewer tokens than `size` has none: it is too short to be near another one,
        though it can be the same.
        """
        num_grams = len(question_tokens) - self._size + 1
        return {question_tokens[i : i + self._size] for i in range(num_grams)}
