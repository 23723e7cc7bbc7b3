"""What an answer is read as: one of eight forms. docs/labels.md has the table."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction


@dataclass(frozen=True)
class Number:
    """A rational number that is written out: 5, 0.5, 3 1/2, 4.5e33, 0.\\overline{3}."""

    value: Fraction
    """Its exact value."""
    places: int | None = None
    """Decimal places where it is written as a decimal that may have been rounded; None where it is
    exact."""
    unit: str = ""
    """Canonical name of the unit, "" where there is none."""
    text: str = field(default="", compare=False)
    """The joined tokens."""

    @property
    def grouped(self) -> bool:
        """Whether commas were read as separators of thousands; they may separate a list."""
        return "," in self.text


@dataclass(frozen=True)
class Expression:
    """Mathematics for math-verify to compare."""

    latex: str
    """Tokens in one spelling, separated by spaces."""
    unit: str = ""
    """As for numbers."""


@dataclass(frozen=True)
class Words:
    """Text that is compared letter by letter: yes, HHT, infinitely many."""

    text: str
    """In lower case where it is more than one letter, single spaces."""
    latex: str = ""
    """The same as mathematics where it could be a product of letters; else ""."""
    unit: str = ""
    """A base, for digits that include letters."""


@dataclass(frozen=True)
class Choice:
    """One of several offered answers: (B), or E: a polygenic score."""

    letter: str
    """A to J."""
    content: Form | None
    """What the answer says beside the letter."""


@dataclass(frozen=True)
class Collection:
    """Several answers in one: a list, tuple, set, interval or ratio."""

    brackets: str
    """The opening and the closing one: "", "()", "[]", "[)", "(]", "{}", or "::" for a ratio."""
    items: tuple[Form, ...]
    """What is between the separators."""
    variable: str = ""
    """Whose interval it is, where an inequality said so."""
    unit: str = ""
    """As for numbers."""


@dataclass(frozen=True)
class Union:
    """Parts that are joined by \\cup, or by "or" between inequalities."""

    parts: tuple[Form, ...]
    """In the order of the text."""


@dataclass(frozen=True)
class Relation:
    """An equation, chain or inequality."""

    operators: tuple[str, ...]
    """[sides - 1] one name for each relation: =, <, <=, !=, \\to, ..."""
    sides: tuple[Form, ...]
    """[2..] what is related."""
    names: tuple[str, ...]
    """[sides] the text of each side, with single spaces."""


@dataclass(frozen=True)
class Unreadable:
    """No single mathematical answer: prose, or something that is not well formed."""

    text: str
    """The text itself."""
    kind: str
    """`prose`; `nothing`: NaN and the like; `empty`; or `broken`."""


Form = Number | Expression | Words | Choice | Collection | Union | Relation | Unreadable
"""What an answer is read as."""
