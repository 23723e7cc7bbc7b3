"""A single value out of tokens: a number that is written out, an expression, or words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_real.labels.forms import Expression, Form, Number, Unreadable, Words
from megatron_real.labels.tokens import Token
from megatron_real.labels.units import TRIGONOMETRIC

ROUNDED_PLACES = 6
"""A decimal of so many places, and significant digits, may be a rounded one: 0.333333 is 1/3,
0.3333 is not."""
MAX_ANSWER_WORDS = 5
"""More words are prose, which nobody writes twice in the same way."""

# Beyond this the exact value has too many digits to compute with.
_MAX_EXPONENT = 1000
_DECIMAL = r"[0-9]+(?:\.[0-9]+)?|\.[0-9]+"
_SIGNED = re.compile(r"(?P<sign>(?:[-+] )*)(?P<rest>.*)", re.DOTALL)
_PLAIN = re.compile(_DECIMAL)
_SCIENTIFIC = re.compile(
    rf"(?P<m>{_DECIMAL}) (?:[eE] (?P<e>(?:[-+] )?[0-9]+)"
    r"|\\cdot 10 \^ \{ (?P<t>(?:[-+] )?[0-9]+) \})"
)
_POWER_OF_TEN = re.compile(r"10 \^ \{ (?P<t>(?:[-+] )?[0-9]+) \}")
_FRACTION = re.compile(
    r"(?:(?P<whole>[0-9]+) )?"
    rf"(?:\\frac \{{ (?P<s>- )?(?P<a>{_DECIMAL}) \}} \{{ (?P<b>{_DECIMAL}) \}}"
    rf"|(?P<c>{_DECIMAL}) / (?P<d>{_DECIMAL}))"
)
_RECURRING = re.compile(
    r"(?P<whole>[0-9]*) \. (?P<fixed>[0-9]+ )?(?:\\overline \{ (?P<bar>[0-9]+) \}"
    r"|\\dot \{ (?P<one>[0-9]) \}(?: (?P<mid>[0-9]+))?(?: \\dot \{ (?P<two>[0-9]) \})?)"
    r"|(?P<start>[0-9]*\.[0-9]+) (?:\\overline \{ (?P<bar2>[0-9]+) \}"
    r"|\\dot \{ (?P<one2>[0-9]) \}(?: (?P<mid2>[0-9]+))?(?: \\dot \{ (?P<two2>[0-9]) \})?)"
)
_LABEL = re.compile(r"[A-Za-z]+[0-9]+[A-Za-z0-9]*")
_MAX_FACTORS = 6
_E_NOTATION = re.compile(rf"((?:{_DECIMAL})) [eE] ((?:[-+] )?[0-9]+)")
_DEGREES = re.compile(rf"({_DECIMAL}) degree")
_WITH_POINT = re.compile(r"[0-9]*\.[0-9]+")


def read_number(text: str) -> Number | None:
    """Returns the number that joined tokens write out; None where they are no such number."""
    signed = _SIGNED.fullmatch(text.replace(",", ""))
    assert signed is not None, "every text has a rest"
    sign = 1
    if signed["sign"].count("-") % 2:
        sign = -1

    rest = signed["rest"]
    if _PLAIN.fullmatch(rest):
        return _decimal(rest, 0, sign)
    # int() of millions of digits takes minutes: nine of them are beyond every bound already.
    if match := _SCIENTIFIC.fullmatch(rest):
        exponent = int((match["e"] or match["t"]).replace(" ", "")[:9])
        return _decimal(match["m"], exponent, sign)
    if match := _POWER_OF_TEN.fullmatch(rest):
        return _decimal("1", int(match["t"].replace(" ", "")[:9]), sign)
    if match := _FRACTION.fullmatch(rest):
        return _fraction(match, sign)
    if match := _RECURRING.fullmatch(rest):
        return _recurring(match, sign)
    return None


def _decimal(digits: str, exponent: int, sign: int) -> Number | None:
    """Returns sign * digits * 10^exponent; None where its exact value would be too long."""
    if abs(exponent) > _MAX_EXPONENT:
        return None
    if digits[0] == ".":
        digits = f"0{digits}"
    value = sign * Fraction(digits) * Fraction(10) ** exponent

    num_places = len(digits.partition(".")[2])
    num_significant = len(digits.replace(".", "").lstrip("0"))
    if min(num_places, num_significant) < ROUNDED_PLACES:
        return Number(value)
    return Number(value, num_places - exponent)


def _fraction(match: re.Match[str], sign: int) -> Number | None:
    """Returns the value of 3/4, \\frac{3}{4} or 1 \\frac{3}{4}.

    None where it has none, or where a whole number stands before what is no proper fraction: that
    is a product, if it is anything.
    """
    numerator = Fraction(match["a"] or match["c"])
    denominator = Fraction(match["b"] or match["d"])
    if denominator == 0:
        return None
    if match["whole"] and (numerator >= denominator or match["s"]):
        return None

    value = int(match["whole"] or 0) + numerator / denominator
    if match["s"]:
        value = -value
    return Number(sign * value)


def _recurring(match: re.Match[str], sign: int) -> Number | None:
    """Returns the value of 0.1\\overline{6} or 0.1\\dot{6}; None where the dots mark no period."""
    start = match["start"] or f"{match['whole'] or '0'}.{(match['fixed'] or '').strip()}"
    whole, _, fixed = start.partition(".")

    period = match["bar"] or match["bar2"] or ""
    if not period:
        first = match["one"] or match["one2"]
        last = match["two"] or match["two2"] or ""
        middle = match["mid"] or match["mid2"] or ""
        if middle and not last:
            return None  # a period of several digits has a dot over its first and its last
        period = first + middle + last

    # 0.1(6) is 0.1 + 6 / (10 * 9).
    repeated = Fraction(int(period), 10 ** len(fixed) * (10 ** len(period) - 1))
    return Number(sign * (Fraction(f"{whole or '0'}.{fixed or '0'}") + repeated))


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
        separator = " "
        if all(len(run) == 1 for run in runs):
            separator = ""
        # Letters that each occur once may also be a product; more of them are a word.
        letters = "".join(runs)
        product = ""
        if len(set(letters)) == len(letters) and len(letters) <= _MAX_FACTORS:
            product = " ".join(letters)
        return Words(separator.join(runs), product, unit)

    # Digits that include letters, and names such as A1.
    if unit.startswith("base") or (_LABEL.fullmatch(compact) and kinds <= {"letters", "number"}):
        return Words(compact, "", unit)

    has_angle = any(token.text in TRIGONOMETRIC for token in body)
    if "word" not in kinds and ("unit" not in kinds or has_angle):
        return Expression(_latex(body), unit)

    words = [token.text for token in tokens if token.kind != "space"]
    if len(words) == 1 and len(words[0]) == 1 and words[0].isascii():
        return Expression(words[0])  # \\text{E}

    is_text = all(
        token.kind in ("word", "letters", "unit") for token in tokens if token.kind != "space"
    )
    if not is_text or len(words) > MAX_ANSWER_WORDS:
        return Unreadable(" ".join(words).lower(), "prose")

    text = " ".join(words)
    if len(text) > 1:
        text = text.lower()
    return Words(text)


def _latex(body: Sequence[Token]) -> str:
    """Returns the tokens as LaTeX that math-verify's parser reads in one way only."""
    texts: list[str] = []
    for token in body:
        if token.kind == "letters":
            texts += list(token.text)
        elif token.kind == "number":
            texts.append(token.text.replace(",", ""))
        elif token.kind != "space":
            texts.append(token.text)

    text = " ".join(texts)
    text = _E_NOTATION.sub(lambda match: f"{match[1]} \\cdot 10 ^ {{ {match[2]} }}", text)
    text = _DEGREES.sub(lambda match: f"\\frac {{ {match[1]} \\pi }} {{ 180 }}", text)
    text = _WITH_POINT.sub(_exact, text)
    return text.replace("+ - ", "- ").removeprefix("+ ")


def _exact(match: re.Match[str]) -> str:
    """Returns a decimal as a fraction, unless it has so many places that it may be rounded."""
    number = _decimal(match[0], 0, 1)
    if number is None or number.places is not None:
        return match[0]
    numerator = number.value.numerator
    denominator = number.value.denominator
    if denominator == 1:
        return str(numerator)
    return f"\\frac {{ {numerator} }} {{ {denominator} }}"
