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
_CANONICAL = {
    spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings.split()
}
UNIT_NAMES = frozenset(_SPELLINGS) | frozenset(_CANONICAL)
"""Every spelling of a unit that is known as one, also where it is not marked as text."""
# Words that turn what stands before them into something else; no unit has one.
_TURNING_WORDS = frozenset([
    "not", "no", "isn", "is", "was", "wrong", "or", "and", "but", "nor", "neither", "either",
    "more", "less", "than", "greater", "fewer", "least", "most", "if", "false", "true", "except",
    "without", "minus", "plus", "times", "half", "twice", "maybe", "perhaps", "unless", "incorrect",
    "never", "only",
])  # fmt: skip

TRIGONOMETRIC = frozenset(("\\sin", "\\cos", "\\tan", "\\cot", "\\sec", "\\csc"))
"""Functions of an angle: the degrees after them are an argument, not a unit."""

_BASE = re.compile(r"_ (?:\{ )?(\w+)(?: \})?$")
_DIGITS = re.compile(r"-?[0-9][0-9A-F]*(\.[0-9A-F]+)?")
_NUMERALS = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "twelve": "12", "sixteen": "16",
}  # fmt: skip

_MAX_UNIT_WORDS = 4
_UNIT_MARKS = frozenset(["^", "{", "}", "/", "(", ")", "-", "."])
_MAX_UNIT_MARKS = 4
# What a number of a unit stands behind: cm^{2}, m^{-1}, \pmod{5}.
_BEFORE_NUMBER = frozenset(("^", "{", "-", "(", "\\pmod"))


def canonical_unit(words: Sequence[str]) -> str:
    """Returns one spelling of a unit.

    Known names are given by their abbreviation, others in the singular and in lower case.
    """
    canonical = []
    for word in words:
        lower = word.lower()
        if word in _SPELLINGS:
            canonical.append(word)
        elif word in _CANONICAL:
            canonical.append(_CANONICAL[word])
        # M is no spelling of m, but Meters is one of meters.
        elif lower in _CANONICAL:
            canonical.append(_CANONICAL[lower])
        elif len(lower) > 3 and lower.endswith("s"):
            canonical.append(lower[:-1])
        else:
            canonical.append(lower)
    return " ".join(canonical)


def split_unit(tokens: Sequence[Token]) -> tuple[list[Token], str]:
    """Splits 5 \\text{ cm}^2 into what is measured and the name of its unit.

    The latter is "" where there is none.
    """
    # A currency may stand before the number, and before or behind its sign.
    body = list(tokens)
    currency = ""
    if body and body[0].kind == "unit" and len(body) > 1:
        currency = body[0].text
        body = trim(body[1:])
    elif len(body) > 2 and body[0].text in "+-" and body[1].kind == "unit":
        currency = body[1].text
        body = [body[0], *trim(body[2:])]

    digits_and_base = _split_base(body)
    if digits_and_base is not None:
        return digits_and_base

    # The unit's first token, sought from the end, since a unit stands behind what it measures.
    start = len(body)
    num_words = 0
    for i in range(len(body) - 1, -1, -1):
        if _is_unit_word(body, i):
            start = i
            num_words += 1
        elif body[i].kind != "space" and not _is_mark_of_unit(body, i):
            break
    if num_words > _MAX_UNIT_WORDS:
        start = len(body)  # a sentence

    if any(token.text in TRIGONOMETRIC for token in body):
        return body, currency  # sin 30 degrees

    is_measured = any(
        token.kind == "number" or (token.kind == "command" and token.text != "\\angle")
        for token in body[:start]
    )
    if not is_measured:
        return list(tokens), currency  # words after a letter are no unit

    if start == len(body):
        return body, currency

    words = [
        token.text for token in body[start:] if token.kind != "space" and token.text not in "{}()"
    ]
    unit = canonical_unit([word for word in words if word != "of"])
    return trim(body[:start]), f"{currency} {unit}".strip()


def _split_base(body: Sequence[Token]) -> tuple[list[Token], str] | None:
    """Splits 1011_2 into its digits and their base; None where it is no such number."""
    texts = [token.text for token in body]
    if "_" not in texts[1:]:
        return None
    under = texts.index("_")
    base = _BASE.fullmatch(joined(body[under:]))
    digits = joined(body[:under]).replace(" ", "").strip("()")
    if not base or not _DIGITS.fullmatch(digits):
        return None
    number = [token for token in body[:under] if token.text not in "()"]
    return number, f"base {_NUMERALS.get(base[1], base[1])}"


def _is_unit_word(body: Sequence[Token], i: int) -> bool:
    """Returns whether a token is a unit, or a word that may be one."""
    token = body[i]
    if token.kind == "unit" or token.text == "\\pmod":
        return True
    if token.kind == "word":
        return token.text.lower() not in _TURNING_WORDS
    if token.kind != "letters" or i == 0 or token.text.lower() in _TURNING_WORDS:
        return False

    # Letters that nobody marked as text: 5cm is a length, 5ab a product, 5 apples are apples.
    is_known = token.text in UNIT_NAMES and len(token.text) > 1
    return is_known or (body[i - 1].kind == "space" and len(token.text) > 2)


def _is_mark_of_unit(body: Sequence[Token], i: int) -> bool:
    """Returns whether a token is an exponent, bracket or slash of a unit: cm^{2}, km/h, \\pmod{5}.

    A unit's word stands before it.
    """
    if body[i].kind == "number":
        before = next((token.text for token in reversed(body[:i]) if token.kind != "space"), "")
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
