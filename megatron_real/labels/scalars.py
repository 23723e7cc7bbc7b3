"""A single value out of tokens: a number that is written out, an expression for algebra, or words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_real.labels.forms import Expression, Form, Number, Unreadable, Words
from megatron_real.labels.tokens import Token
from megatron_real.labels.units import TRIGONOMETRIC

_MAX_EXPONENT = 1000
_DECIMAL = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_SIGNED = re.compile(r"(?P<sign>(?:[-+] )*)(?P<rest>.*)", re.DOTALL)
_PLAIN = re.compile(_DECIMAL)
_SCIENTIFIC = re.compile(
    rf"(?P<m>{_DECIMAL}) (?:[eE] (?P<e>(?:[-+] )?[0-9]+)|\\cdot 10 \^ \{{ (?P<t>(?:[-+] )?[0-9]+) \}})"
)
_POWER_OF_TEN = re.compile(r"10 \^ \{ (?P<t>(?:[-+] )?[0-9]+) \}")
_FRACTION = re.compile(
    rf"(?:(?P<whole>[0-9]+) )?(?:\\frac \{{ (?P<s>- )?(?P<a>{_DECIMAL}) \}} \{{ (?P<b>{_DECIMAL}) \}}"
    rf"|(?P<c>{_DECIMAL}) / (?P<d>{_DECIMAL}))"
)
_RECURRING = re.compile(
    r"(?P<whole>[0-9]*) \. (?P<fixed>[0-9]+ )?(?:\\overline \{ (?P<bar>[0-9]+) \}"
    r"|\\dot \{ (?P<one>[0-9]) \}(?: (?P<mid>[0-9]+))?(?: \\dot \{ (?P<two>[0-9]) \})?)"
    r"|(?P<start>[0-9]*\.[0-9]+) (?:\\overline \{ (?P<bar2>[0-9]+) \}"
    r"|\\dot \{ (?P<one2>[0-9]) \}(?: (?P<mid2>[0-9]+))?(?: \\dot \{ (?P<two2>[0-9]) \})?)"
)


def read_number(text: str) -> Number | None:
    """Returns the number that joined tokens write out; None where they are no such number."""
    signed = _SIGNED.fullmatch(text.replace(",", ""))
    assert signed is not None, "every text has a rest"
    sign = -1 if signed["sign"].count("-") % 2 else 1
    rest = signed["rest"]
    if _PLAIN.fullmatch(rest):
        return _decimal(rest, 0, sign)
    if match := _SCIENTIFIC.fullmatch(rest):
        return _decimal(match["m"], int((match["e"] or match["t"]).replace(" ", "")[:9]), sign)
    if match := _POWER_OF_TEN.fullmatch(rest):
        return _decimal("1", int(match["t"].replace(" ", "")[:9]), sign)
    if match := _FRACTION.fullmatch(rest):
        over, under = Fraction(match["a"] or match["c"]), Fraction(match["b"] or match["d"])
        whole = match["whole"]
        if not under or (whole and (over >= under or match["s"])):
            return None
        return Number(sign * (int(whole or 0) + over / under) * (-1 if match["s"] else 1))
    if match := _RECURRING.fullmatch(rest):
        return _recurring(match, sign)
    return None


def _decimal(digits: str, exponent: int, sign: int) -> Number | None:
    if abs(exponent) > _MAX_EXPONENT:
        return None
    places = len(digits.partition(".")[2])
    significant = len(digits.replace(".", "").lstrip("0"))
    value = sign * Fraction(digits if digits[0] != "." else f"0{digits}") * Fraction(10) ** exponent
    return Number(value, places - exponent if min(places, significant) >= ROUNDED_PLACES else None)


ROUNDED_PLACES = 6
"""A decimal of so many places, and significant digits, may be a rounded one: 0.333333 is 1/3,
0.3333 is not."""


def _recurring(match: re.Match[str], sign: int) -> Number | None:
    start = match["start"] or f"{match['whole'] or '0'}.{(match['fixed'] or '').strip()}"
    whole, _, fixed = start.partition(".")
    period = match["bar"] or match["bar2"] or ""
    if not period:
        first, last = match["one"] or match["one2"], match["two"] or match["two2"] or ""
        middle = match["mid"] or match["mid2"] or ""
        if middle and not last:
            return None
        period = first + middle + last
    repeated = Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
    return Number(sign * (Fraction(f"{whole or '0'}.{fixed or '0'}") + repeated))


_LABEL = re.compile(r"[A-Za-z]+[0-9]+[A-Za-z0-9]*")


def expression_or_words(tokens: Sequence[Token], body: Sequence[Token], unit: str) -> Form:
    """Returns what a value is that is no number.

    Args:
        tokens: the whole value.
        body: the same without its unit.
        unit: the unit.
    """
    kinds = {token.kind for token in body} - {"space"}
    compact = "".join(token.text for token in body)
    if kinds <= {"letters"} and len(compact) > 1:
        runs = compact.split()
        separator = "" if all(len(run) == 1 for run in runs) else " "
        return Words(separator.join(runs), _product(body), unit)
    if unit.startswith("base") or (_LABEL.fullmatch(compact) and kinds <= {"letters", "number"}):
        return Words(compact, "", unit)
    angle = any(token.text in TRIGONOMETRIC for token in body)
    if "word" not in kinds and ("unit" not in kinds or angle):
        return Expression(_latex(body), unit)
    words = [token.text for token in tokens if token.kind != "space"]
    if len(words) == 1 and len(words[0]) == 1 and words[0].isascii():
        return Expression(words[0])  # \\text{E}
    if all(token.kind in ("word", "letters", "unit") for token in tokens if token.kind != "space"):
        text = " ".join(words)
        if len(words) <= MAX_ANSWER_WORDS:
            return Words(text if len(text) == 1 else text.lower())
    return Unreadable(" ".join(words).lower(), "prose")


MAX_ANSWER_WORDS = 5
"""More words are prose, which nobody writes twice in the same way."""


_MAX_FACTORS = 6


def _product(body: Sequence[Token]) -> str:
    """Letters as the product that they may be; "" where they are more likely a word or a sequence."""
    letters = "".join(token.text for token in body if token.kind != "space")
    once = len(set(letters)) == len(letters)
    return " ".join(letters) if once and len(letters) <= _MAX_FACTORS else ""


_E_NOTATION = re.compile(rf"((?:{_DECIMAL})) [eE] ((?:[-+] )?[0-9]+)")
_DEGREES = re.compile(rf"({_DECIMAL}) degree")


def _latex(body: Sequence[Token]) -> str:
    """The tokens as LaTeX that math-verify's parser reads in one way only."""
    texts: list[str] = []
    for token in body:
        if token.kind == "letters":
            texts += list(token.text)
        elif token.kind != "space":
            texts.append(token.text.replace(",", "") if token.kind == "number" else token.text)
    text = " ".join(texts)
    text = _E_NOTATION.sub(lambda m: f"{m[1]} \\cdot 10 ^ {{ {m[2]} }}", text)
    text = _DEGREES.sub(lambda m: f"\\frac {{ {m[1]} \\pi }} {{ 180 }}", text)
    text = _DECIMALS.sub(_exact, text)
    return text.replace("+ - ", "- ").removeprefix("+ ")


_DECIMALS = re.compile(r"[0-9]*\.[0-9]+")


def _exact(match: re.Match[str]) -> str:
    """A decimal as a fraction, unless it has so many places that it may be a rounded one."""
    number = _decimal(match[0], 0, 1)
    if number is None or number.places is not None:
        return match[0]
    over, under = number.value.numerator, number.value.denominator
    return str(over) if under == 1 else f"\\frac {{ {over} }} {{ {under} }}"
