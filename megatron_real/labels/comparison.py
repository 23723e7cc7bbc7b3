r"""Whether two answers in normal form are the same. Algebra is math-verify's; the rest is what it ignores.

Two numbers are compared exactly, here. Two expressions go to math-verify, one value at a time: never a list, a relation
whose right side it would take, a unit that it would drop, or letters that it would multiply. What it calls equal numbers
must also agree relative to their size, since it rounds to six places.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

from megatron_real.labels.forms import (
    Choice,
    Collection,
    Expression,
    Form,
    Number,
    Relation,
    Union,
    Unreadable,
    Words,
)
from megatron_real.labels.intervals import is_name
from megatron_real.labels.normal_form import read

# Beyond so many items a list is compared in order: each pair may cost a call of math-verify.
_MAX_UNORDERED = 24
_RELATIVE_ERROR = 1e-12
_ROUNDED_RELATIVE_ERROR = 1e-6
_FEWEST_LETTERS_OF_A_WORD = 3


def same(gold: Form, answer: Form) -> bool:
    """Returns whether the answer says what the gold answer says.

    May take as long as algebra takes.
    """
    if isinstance(gold, Unreadable) or isinstance(answer, Unreadable):
        return isinstance(gold, Unreadable) and gold == answer and gold.kind == "prose"
    if isinstance(gold, Choice) or isinstance(answer, Choice):
        return _same_choice(gold, answer)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _same_relation(gold, answer)
    if isinstance(gold, Collection | Union) or isinstance(answer, Collection | Union):
        return _same_collection(gold, answer)
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _same_words(gold, answer)
    return _same_value(gold, answer)


def _same_choice(gold: Form, answer: Form) -> bool:
    """The letter decides; without one on both sides, what stands beside it.

    Two contents must not disagree.
    """
    if isinstance(gold, Choice) and isinstance(answer, Choice):
        contents = (gold.content, answer.content)
        agree = contents[0] is None or contents[1] is None or same(contents[0], contents[1])
        return gold.letter == answer.letter and agree
    choice, other = (gold, answer) if isinstance(gold, Choice) else (answer, gold)
    assert isinstance(choice, Choice), "one of the two is"
    if isinstance(other, Expression) and len(other.latex) == 1:
        return other.latex == choice.letter
    return choice.content is not None and same(choice.content, other)


def _same_relation(gold: Form, answer: Form) -> bool:
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _same_relations(gold, answer)
    relation, other = (gold, answer) if isinstance(gold, Relation) else (answer, gold)
    assert isinstance(relation, Relation), "one of the two is"
    if relation is gold and not all(_is_label(name) for name in relation.names[:-1]):
        return False  # a gold answer that is an equation is asked for as one
    return any(same(other, value) for value in _values(relation))


def _is_label(name: str) -> bool:
    """Whether a side names something without computing with variables: x, f(2), P(A), AB / CD."""
    segments = all(len(token) > 1 and token.isupper() for token in name.split() if token.isalpha())
    return segments or not _OPERATORS.intersection(name.split())


_OPERATORS = frozenset(("+", "-", "^", "/", "\\frac", "\\cdot", "\\sqrt"))


_VALUE_RELATIONS = frozenset(("=", "~", "equiv"))
_FUNCTION = re.compile(r"\\?[A-Za-z]( ')* \( \\?[A-Za-z] \)|y")


def _values(relation: Relation) -> list[Form]:
    """What an equation says that something is: its last side, where every other side names it or
    equals it.

    6 = 5 has no value, x = 5 and a + b = 5 have 5, and x^2 = 5 has none: it says what x is, and
    that is not 5. Of an approximation the first side is a value too, and no other: a chain of them
    would be a list of guesses.
    """
    if not _VALUE_RELATIONS.issuperset(relation.operators):
        return []
    *before, last = relation.sides
    numbers = [_is_numeric(side) for side in before]
    for side, name, numeric in zip(before, relation.names, numbers, strict=False):
        if numeric and not _agrees(side, last, exactly="~" not in relation.operators):
            return []
        if not numeric and _is_solvable(name):
            return []
    exact = [side for side, numeric in zip(before, numbers, strict=True) if numeric]
    return [last, *exact[:1]]


def _agrees(side: Form, last: Form, *, exactly: bool) -> bool:
    if exactly:
        return same(side, last)
    one, other = _approximate(side), _approximate(last)
    # One is the other rounded. A share of its size would let 99 and 100 through, two guesses for
    # the price of one.
    rounding = max(_rounding(side), _rounding(last))
    return one is not None and other is not None and abs(one - other) <= rounding


_WRITTEN_OUT = re.compile(
    r"[-+ ]*[0-9,]*(?:\.(?P<decimals>[0-9]+))?(?: \\cdot 10 \^ \{ (?P<exponent>(?:- )?[0-9]{1,4}) \})?"
)


def _rounding(form: Form) -> Fraction:
    """Half of the last place of a number that is written out, in which it may have been rounded; 0
    for other forms.
    """
    written = _WRITTEN_OUT.fullmatch(form.text) if isinstance(form, Number) else None
    if written is None:
        return Fraction(0)
    exponent = int((written["exponent"] or "0").replace(" ", ""))
    return _half_a_place(len(written["decimals"] or "") - exponent)


def _is_numeric(form: Form) -> bool:
    if isinstance(form, Expression):
        return not _letters(form.latex)
    return isinstance(form, Number)


def _letters(latex: str) -> set[str]:
    """The variables of an expression; e and i are numbers."""
    return {token for token in latex.split() if len(token) == 1 and token.isalpha()} - {"e", "i"}


_ARITHMETIC = re.compile(r"(?:[A-Za-z]|[0-9.]+|[-+/^(){}]|\\frac|\\sqrt|\\cdot| )+")


def _is_solvable(name: str) -> bool:
    """Whether a side holds one variable in arithmetic, so that the equation is a riddle and not an
    answer.
    """
    if is_name(name) or _FUNCTION.fullmatch(name):
        return False
    letters = [token for token in name.split() if token.isalpha()]
    return len(set(letters)) == 1 and len(letters[0]) == 1 and bool(_ARITHMETIC.fullmatch(name))


def _same_relations(gold: Relation, answer: Relation) -> bool:
    equations = set(gold.operators) | set(answer.operators) == {"="}
    if equations and _named(gold) and _named(answer):
        return _same_name(gold.names[0], answer.names[0]) and same(gold.sides[-1], answer.sides[-1])
    if gold.operators != answer.operators:
        return False
    if len(gold.sides) == len(answer.sides) and all(map(same, gold.sides, answer.sides)):
        return True
    if not equations or len(gold.sides) != 2:
        return False
    return _algebraically_equal(" = ".join(gold.names), " = ".join(answer.names))


def _named(relation: Relation) -> bool:
    return is_name(relation.names[0]) or bool(_FUNCTION.fullmatch(relation.names[0]))


def _same_name(one: str, other: str) -> bool:
    """y = 2x and f(x) = 2x describe the same graph."""
    functions = all(_FUNCTION.fullmatch(name) for name in (one, other))
    return one == other or (functions and "y" in (one, other))


def _same_collection(gold: Form, answer: Form) -> bool:
    gold, answer = _alike_collections(gold, answer)
    if isinstance(gold, Union) and isinstance(answer, Union):
        return _same_items(gold.parts, answer.parts, ordered=False)
    if not (isinstance(gold, Collection) and isinstance(answer, Collection)):
        return _one_item(gold, answer)
    if not _units_agree(gold.unit, answer.unit):
        return False
    if gold.variable and answer.variable and gold.variable != answer.variable:
        return False
    shapes = {gold.brackets.replace("{}", ""), answer.brackets.replace("{}", "")}
    if shapes == {""}:
        golds, answers, ordered = _without_names(gold.items, answer.items)
        return _same_items(golds, answers, ordered=ordered or _has_ellipsis(gold.items))
    if shapes == {"", "()"}:
        # (x, y) without its parentheses, but never an interval: -1, 1 is not (-1, 1) of an
        # inequality.
        bare = (
            not gold.variable
            and not answer.variable
            and "{}" not in (gold.brackets, answer.brackets)
        )
        golds, answers, _ = _without_names(gold.items, answer.items)
        return bare and _same_items(golds, answers, ordered=True)
    return len(shapes) == 1 and _same_items(gold.items, answer.items, ordered=True)


def _alike_collections(gold: Form, answer: Form) -> tuple[Form, Form]:
    """1,234 beside a list is a list, and intervals with commas between them are a union."""
    if isinstance(gold, Number) and gold.grouped:
        gold = read(gold.text, groups=False)
    if isinstance(answer, Number) and answer.grouped:
        answer = read(answer.text, groups=False)
    if isinstance(gold, Union):
        return gold, _as_union(answer)
    return (_as_union(gold), answer) if isinstance(answer, Union) else (gold, answer)


def _as_union(form: Form) -> Form:
    if isinstance(form, Collection) and form.brackets == "":
        return Union(form.items)
    return form


_VALUES = (Number, Expression)


def _one_item(gold: Form, answer: Form) -> bool:
    """{5} is 5, and 3:2 is 3/2."""
    for collection, other in ((gold, answer), (answer, gold)):
        if not isinstance(collection, Collection) or isinstance(other, Collection | Union):
            continue
        if collection.brackets in ("", "{}") and len(collection.items) == 1:
            return same(collection.items[0], other)
        if collection.brackets == "::" and not collection.unit and isinstance(other, _VALUES):
            return _same_value(_quotient(collection), other)
    return False


def _quotient(ratio: Collection) -> Expression:
    over, under = (_latex(item) for item in ratio.items)
    return Expression(f"\\frac {{ {over} }} {{ {under} }}")


def _without_names(
    golds: Sequence[Form], answers: Sequence[Form]
) -> tuple[Sequence[Form], Sequence[Form], bool]:
    """x = 3, y = 5 beside 3, 5: the values, in the order of the names.

    Names on both sides stay, and are compared.
    """
    named = [_names(golds), _names(answers)]
    if all(named) or not any(named):
        return golds, answers, False
    names = named[0] or named[1]
    values = [
        [i.sides[-1] if isinstance(i, Relation) else i for i in items] for items in (golds, answers)
    ]
    return values[0], values[1], len(set(names)) > 1


def _names(items: Sequence[Form]) -> list[str]:
    """The names of a list of assignments; none where one of them is something else."""
    relations = [
        i for i in items if isinstance(i, Relation) and set(i.operators) == {"="} and _named(i)
    ]
    return [relation.names[0] for relation in relations] if len(relations) == len(items) else []


def _has_ellipsis(items: Sequence[Form]) -> bool:
    return any(isinstance(item, Expression) and "\\ldots" in item.latex for item in items)


def _same_items(golds: Sequence[Form], answers: Sequence[Form], *, ordered: bool) -> bool:
    if len(golds) != len(answers):
        return False
    if ordered or len(golds) > _MAX_UNORDERED:
        return all(map(same, golds, answers))
    left = list(answers)
    for gold in golds:
        # Equal forms first: they cost nothing.
        match = next((a for a in left if a == gold), None) or next(
            (a for a in left if same(gold, a)), None
        )
        if match is None:
            return False
        left.remove(match)
    return True


def _same_words(gold: Form, answer: Form) -> bool:
    if isinstance(gold, Words) and isinstance(answer, Words):
        if not _units_agree(gold.unit, answer.unit):
            return False
        if gold.text == answer.text:
            return True
        long = len(gold.text) >= _FEWEST_LETTERS_OF_A_WORD
        return long and gold.text.casefold() == answer.text.casefold()
    words, other = (gold, answer) if isinstance(gold, Words) else (answer, gold)
    assert isinstance(words, Words), "one of the two is"
    if not words.latex or not isinstance(other, Expression):
        return False
    return _units_agree(words.unit, other.unit) and _algebraically_equal(words.latex, other.latex)


def _units_agree(one: str, other: str) -> bool:
    """A unit that one side leaves out is the question's."""
    return one == other or not one or not other


def _same_value(gold: Form, answer: Form) -> bool:
    """Two numbers or expressions, with their units."""
    assert isinstance(gold, Number | Expression) and isinstance(answer, Number | Expression), (
        "values"
    )
    if gold.unit == answer.unit:
        return _same_magnitude(gold, answer)
    bare = (replace(gold, unit=""), replace(answer, unit=""))
    units = {gold.unit, answer.unit}
    if units == {"percent", ""}:
        scaled = [
            _scaled(form, "\\frac { 1 } { 100 }", Fraction(1, 100)) for form in (gold, answer)
        ]
        return _same_magnitude(*bare) or _same_magnitude(scaled[0], scaled[1])
    if "degree" in units and (
        units == {"degree", "radian"} or "\\pi" in _latex(gold) + _latex(answer)
    ):
        turned = [
            _scaled(form, "\\frac { \\pi } { 180 }", None)
            if form.unit == "degree"
            else replace(form, unit="")
            for form in (gold, answer)
        ]
        return units <= {"degree", "radian", ""} and _same_magnitude(turned[0], turned[1])
    return _units_agree(gold.unit, answer.unit) and _same_magnitude(*bare)


def _scaled(form: Number | Expression, factor: str, value: Fraction | None) -> Number | Expression:
    """The form times a factor, without its unit, where it has one; else as it is."""
    if not form.unit:
        return form
    if isinstance(form, Number) and value is not None:
        return Number(form.value * value)
    return Expression(f"( {_latex(form)} ) \\cdot {factor}")


def _same_magnitude(gold: Number | Expression, answer: Number | Expression) -> bool:
    if isinstance(gold, Number) and isinstance(answer, Number):
        return _same_number(gold, answer)
    for number, other in ((gold, answer), (answer, gold)):
        if (
            isinstance(number, Number)
            and number.places is not None
            and isinstance(other, Expression)
        ):
            value = _approximate(other)
            return value is not None and abs(value - number.value) <= _half_a_place(number.places)
    if isinstance(gold, Expression) and isinstance(answer, Expression):
        if gold.latex == answer.latex:
            return True
        if is_name(gold.latex) and is_name(answer.latex) and "i" not in (gold.latex, answer.latex):
            return False  # math-verify compares symbols without their case
    return _algebraically_equal(_latex(gold), _latex(answer))


def _same_number(gold: Number, answer: Number) -> bool:
    """Exactly, or to the places of a decimal that may have been rounded."""
    if gold.value == answer.value:
        return True
    places = [number.places for number in (gold, answer) if number.places is not None]
    return bool(places) and abs(gold.value - answer.value) <= _half_a_place(min(places))


def _half_a_place(places: int) -> Fraction:
    return Fraction(1, 2) / Fraction(10) ** places


def _latex(form: Form) -> str:
    if isinstance(form, Number):
        sign = "- " if form.value < 0 else ""
        over, under = abs(form.value.numerator), form.value.denominator
        return f"{sign}{over}" if under == 1 else f"{sign}\\frac {{ {over} }} {{ {under} }}"
    if isinstance(form, Expression):
        return form.latex
    return form.latex if isinstance(form, Words) else ""


def is_readable(form: Form) -> bool:
    """Returns whether an answer says something that can be compared, also where it is prose that no
    gold answer says.
    """
    if isinstance(form, Unreadable):
        return form.kind in ("prose", "nothing")
    if isinstance(form, Collection | Union | Relation):
        parts = {Collection: "items", Union: "parts", Relation: "sides"}[type(form)]
        return all(is_readable(part) for part in getattr(form, parts))
    return (
        not isinstance(form, Expression)
        or form.latex == "\\ldots"
        or _parsed(form.latex) is not None
    )


# The parser reads X as x: capitals get an index of their own.
_CAPITAL = re.compile(r"(?<!\S)([A-Z])(?!\S)(?: _ \{ ([0-9]+) \}| _ ([0-9]+))?")
_CAPITAL_MARK = "9909"
_NAMES_ARE_WORDS = frozenset(("\\overline", "\\mathbb", "\\text"))
_TWO_NUMBERS = re.compile(r"[0-9.]+ [0-9.]")


@lru_cache(maxsize=256)
def _parsed(latex: str) -> Any | None:
    """The sympy expression; None where math-verify's grammar does not know it."""
    from latex2sympy2_extended import latex2sympy

    if _TWO_NUMBERS.search(latex):
        return None  # the parser adds them
    if not _NAMES_ARE_WORDS.intersection(latex.split()):
        latex = _CAPITAL.sub(_with_mark, latex)
    complex_numbers = "i" in latex.split()
    try:
        return latex2sympy(
            latex, is_real=not complex_numbers, convert_degrees=False, normalization_config=None
        )
    except Exception:  # the grammar raises plain Exceptions, and sympy whatever it likes
        return None


def _with_mark(match: re.Match[str]) -> str:
    # e is Euler's number, whatever its index.
    letter = "q" if match[1] == "E" else match[1].lower()
    return f"{letter} _ {{ {_CAPITAL_MARK}{match[2] or match[3] or ''} }}"


def _algebraically_equal(gold: str, answer: str) -> bool:
    """math-verify's verdict on two values or equations, guarded."""
    from math_verify import verify

    one, other = _parsed(gold), _parsed(answer)
    if one is None or other is None:
        return False
    if "\\sqrt { - " in gold + answer:
        one, other = _with_imaginary(one), _with_imaginary(other)
    if gold.count("'") != answer.count("'"):
        return False  # the parser drops primes
    try:
        if _differ_at_a_point(one, other):
            return False
        if _equal_to_many_digits(one, other):
            return True
    except _NoValueError:
        return False  # algebra takes seconds on what has no value
    # Its own timeout is SIGALRM; the worker's clock ends what never returns.
    if not verify(one, other, timeout_seconds=None):
        return False
    try:
        return _relatively_equal(one, other)
    except _NoValueError:
        return False


def _with_imaginary(expression: Any) -> Any:
    import sympy

    return expression.subs(
        {symbol: sympy.I for symbol in expression.free_symbols if symbol.name == "i"}
    )


# Where unequal expressions are told apart without algebra, which takes sympy a hundred times as
# long.
_POINTS = (
    Fraction(7310, 9973),
    Fraction(13109, 9941),
    Fraction(20011, 9929),
    Fraction(27103, 9923),
)
_CLEAR_DIFFERENCE = 1e-6
_FEW_DIGITS = 15


def _differ_at_a_point(one: Any, other: Any) -> bool:
    """Whether two expressions have clearly different finite values for some values of their
    variables.
    """
    import sympy

    if not all(isinstance(each, sympy.Expr) for each in (one, other)):
        return False
    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    if len(symbols) > len(_POINTS):
        return False
    point = {
        symbol: sympy.Rational(*value.as_integer_ratio())
        for symbol, value in zip(symbols, _POINTS, strict=False)
    }
    values = [_decimal(each, _FEW_DIGITS, point) for each in (one, other)]
    if not all(value is not None and value.is_number and value.is_finite for value in values):
        return False
    size = max(abs(value) for value in values)
    return bool(size and abs(values[0] - values[1]) > _CLEAR_DIFFERENCE * size)


_MANY_DIGITS = 40
_SAME_TO_MANY_DIGITS = 1e-30


def _equal_to_many_digits(one: Any, other: Any) -> bool:
    """Whether two exact constants agree to 30 digits: logarithms of other bases, which simplify
    leaves apart.
    """
    import sympy

    both = (one, other)
    if not all(isinstance(e, sympy.Expr) and e.is_number and not e.has(sympy.Float) for e in both):
        return False
    values = [_decimal(each, _MANY_DIGITS) for each in both]
    if not all(value is not None and value.is_finite for value in values):
        return False
    size = max(abs(value) for value in values)
    return bool(size and abs(values[0] - values[1]) <= _SAME_TO_MANY_DIGITS * size)


def _relatively_equal(one: Any, other: Any) -> bool:
    """Two numbers that were called equal also agree relative to their size."""
    import sympy

    both = (one, other)
    if not all(isinstance(each, sympy.Expr) and each.is_number and each.is_finite for each in both):
        return True
    values = [_decimal(each, 30) for each in both]
    if None in values:
        return False  # nothing confirms it
    size = max(abs(value) for value in values)
    rounded = any(each.has(sympy.Float) for each in both)
    bound = _ROUNDED_RELATIVE_ERROR if rounded else _RELATIVE_ERROR
    return bool(size == 0 or abs(values[0] - values[1]) <= bound * size)


def _approximate(form: Form) -> Fraction | None:
    """The value of a number, or of an expression without variables, to 30 digits."""
    import sympy

    if isinstance(form, Number):
        return form.value
    parsed = _parsed(form.latex) if isinstance(form, Expression) else None
    if not isinstance(parsed, sympy.Expr) or not parsed.is_number or not parsed.is_real:
        return None
    try:
        value = _decimal(parsed, 30)
    except _NoValueError:
        return None
    return (
        Fraction(str(value)) if value is not None and value.is_Float and value.is_finite else None
    )


class _NoValueError(Exception):
    """Such an answer is wrong.

    A failed check would be no negative, and an answer must not be able to choose that.
    """


def _decimal(expression: Any, digits: int, point: Mapping[Any, Any] | None = None) -> Any:
    """The value of a sympy expression, of its variables at `point`; None where it is no number, as
    of an integral.

    Raises:
        _NoValueError: sympy fails on it, as on a sum that diverges.
    """
    import sympy

    try:
        value = sympy.N(expression.subs(point or {}), digits)
    except MemoryError:
        raise
    except Exception as error:  # sympy raises whatever it likes
        raise _NoValueError from error
    return value if all(atom.is_number for atom in value.atoms()) else None
