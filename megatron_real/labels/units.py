"""Units of an answer.

They are compared by name, each spelling by the one that stands for it, and never converted.

A base (1011_2) and a modulus (2 mod 5) are units too: left out they are the question's, and two
must agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_real.labels.tokens import Token, joined, trim

_SPELLINGS = {
    "m": "meter meters metre metres",
    "cm": "centimeter centimeters centimetre centimetres",
    "mm": "millimeter millimeters millimetre millimetres",
    "km": "kilometer kilometers kilometre kilometres",
    "ft": "foot feet",
    "in": "inch inches",
    "mi": "mile miles",
    "yd": "yard yards",
    "g": "gram grams gm",
    "kg": "kilogram kilograms kgs",
    "mg": "milligram milligrams",
    "lb": "lbs pound-mass",
    "l": "L liter liters litre litres",
    "ml": "mL milliliter milliliters millilitre millilitres",
    "s": "sec secs second seconds",
    "min": "mins minute minutes",
    "h": "hr hrs hour hours",
    "ms": "millisecond milliseconds",
    "day": "days",
    "year": "years yr yrs",
    "mph": "",
    "kph": "kmh",
    "Hz": "hertz",
    "J": "joule joules",
    "N": "newton newtons",
    "W": "watt watts",
    "Pa": "pascal pascals",
    "eV": "",
    "K": "kelvin kelvins",
    "mol": "mole moles",
    "cent": "cents",
    "dollar": "dollars USD usd",
    "pound": "pounds GBP",
    "euro": "euros EUR",
    "yen": "",
    "rupee": "rupees Rs",
    "percent": "percentage pct",
    "degree": "degrees deg",
    "radian": "radians rad",
    "am": "AM a.m.",
    "pm": "PM p.m.",
    "sq": "square squared",
    "cu": "cubic cubed",
    "unit": "units",
}
_CANONICAL = {other: name for name, others in _SPELLINGS.items() for other in others.split()}
UNIT_NAMES = frozenset(_SPELLINGS) | frozenset(_CANONICAL)
"""Every spelling of a unit that is known as one, also where it is not marked as text."""


def canonical_unit(words: Sequence[str]) -> str:
    """Returns one spelling of a unit: known names by their abbreviation, others in the singular and
    in lower case.
    """
    return " ".join(_canonical_word(word) for word in words)


def _canonical_word(word: str) -> str:
    if word in _SPELLINGS:
        return word
    if word in _CANONICAL:
        return _CANONICAL[word]
    lower = word.lower()
    if lower in _CANONICAL:
        return _CANONICAL[lower]
    return lower[:-1] if len(lower) > 3 and lower.endswith("s") else lower


# Words that turn what stands before them into something else; no unit has one.
_TURNING_WORDS = frozenset([
    "not", "no", "isn", "is", "was", "wrong", "or", "and", "but", "nor", "neither", "either",
    "more", "less", "than", "greater", "fewer", "least", "most", "if", "false", "true", "except",
    "without", "minus", "plus", "times", "half", "twice", "maybe", "perhaps", "unless", "incorrect",
    "never", "only",
])  # fmt: skip


def split_unit(tokens: Sequence[Token]) -> tuple[list[Token], str]:
    """Splits 5 \\text{ cm}^2 into what is measured and the name of its unit.

    The latter is "" where there is none.
    """
    body = list(tokens)
    before = ""
    if body and body[0].kind == "unit" and len(body) > 1:
        before = body[0].text
        body = trim(body[1:])
    elif len(body) > 2 and body[0].text in "+-" and body[1].kind == "unit":
        before = body[1].text
        body = [body[0], *trim(body[2:])]
    base = _base(body)
    if base:
        return base
    start = _where_unit_begins(body)
    if any(token.text in TRIGONOMETRIC for token in body):
        start = len(body)  # sin 30 degrees
    elif not any(_is_measured(token) for token in body[:start]):
        start = 0  # words after a letter are no unit
    if start == 0 or start == len(body):
        return list(tokens) if start == 0 else body, before
    words = [t.text for t in body[start:] if t.kind != "space" and t.text not in "{}()"]
    spelled = canonical_unit([word for word in words if word != "of"])
    return trim(body[:start]), " ".join(part for part in (before, spelled) if part)


TRIGONOMETRIC = frozenset(("\\sin", "\\cos", "\\tan", "\\cot", "\\sec", "\\csc"))
"""Functions of an angle: the degrees after them are an argument, not a unit."""
_BASE = re.compile(r"_ (?:\{ )?(\w+)(?: \})?$")


def _is_measured(token: Token) -> bool:
    return token.kind == "number" or (token.kind == "command" and token.text != "\\angle")


def _base(body: Sequence[Token]) -> tuple[list[Token], str] | None:
    """1011_2: digits and their base."""
    under = next((i for i, token in enumerate(body) if token.text == "_"), 0)
    if not under:
        return None
    base = _BASE.fullmatch(joined(body[under:]))
    digits = joined(body[:under]).replace(" ", "").strip("()")
    if not base or not re.fullmatch(r"-?[0-9][0-9A-F]*(\.[0-9A-F]+)?", digits):
        return None
    return [
        t for t in body[:under] if t.text not in "()"
    ], f"base {_NUMERALS.get(base[1], base[1])}"


_NUMERALS = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "twelve": "12", "sixteen": "16",
}  # fmt: skip


def _where_unit_begins(body: Sequence[Token]) -> int:
    """Index of the first token of a unit at the end; len(body) where there is none."""
    start = len(body)
    words = 0
    for i in range(len(body) - 1, -1, -1):
        if _is_unit_word(body, i):
            start = i
            words += 1
        elif body[i].kind != "space" and not _is_in_unit(body, i):
            break
    return start if 0 < words <= _MAX_UNIT_WORDS else len(body)


def _is_unit_word(body: Sequence[Token], i: int) -> bool:
    token = body[i]
    if token.kind == "unit" or token.text == "\\pmod":
        return True
    if token.kind == "word":
        return token.text.lower() not in _TURNING_WORDS
    if token.kind != "letters" or i == 0 or token.text.lower() in _TURNING_WORDS:
        return False
    known = token.text in UNIT_NAMES and len(token.text) > 1
    return known or (body[i - 1].kind == "space" and len(token.text) > 2)


_MAX_UNIT_WORDS = 4
_UNIT_MARKS = frozenset(["^", "{", "}", "/", "(", ")", "-", "."])
_MAX_UNIT_MARKS = 4
_BEFORE_NUMBER = frozenset(("^", "{", "-", "(", "\\pmod"))


def _is_in_unit(body: Sequence[Token], i: int) -> bool:
    """Exponents, brackets and slashes of a unit: cm^{2}, km/h, \\pmod{5}.

    A unit's word stands before them.
    """
    if body[i].kind == "number":
        before = next((t.text for t in reversed(body[:i]) if t.kind != "space"), "")
        if before not in _BEFORE_NUMBER:
            return False  # 15 % 5
    elif body[i].text not in _UNIT_MARKS:
        return False
    for j in range(i - 1, max(i - 1 - _MAX_UNIT_MARKS, -1), -1):
        if _is_unit_word(body, j):
            return True
        if body[j].text not in _UNIT_MARKS and body[j].kind not in ("space", "number"):
            return False
    return False
