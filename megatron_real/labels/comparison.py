r"""Whether two answers in normal form are the same.

Two numbers are compared exactly, here. Algebra is math-verify's, one value or equation at a time:
never a list, a relation whose right side it would take, a unit that it would drop, or letters that
it would multiply. What it calls equal numbers must also agree relative to their size, since it
rounds to six places.
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
# Of exact values, and of those with a decimal in them that may be rounded.
_RELATIVE_ERROR = 1e-12
_ROUNDED_RELATIVE_ERROR = 1e-6
_FEWEST_LETTERS_OF_A_WORD = 3

_OPERATORS = frozenset(("+", "-", "^", "/", "\\frac", "\\cdot", "\\sqrt"))
_VALUE_RELATIONS = frozenset(("=", "~", "equiv"))
_FUNCTION = re.compile(r"\\?[A-Za-z]( ')* \( \\?[A-Za-z] \)|y")
_ARITHMETIC = re.compile(r"(?:[A-Za-z]|[0-9.]+|[-+/^(){}]|\\frac|\\sqrt|\\cdot| )+")
_WRITTEN_OUT = re.compile(
    r"[-+ ]*[0-9,]*(?:\.(?P<decimals>[0-9]+))?"
    r"(?: \\cdot 10 \^ \{ (?P<exponent>(?:- )?[0-9]{1,4}) \})?"
)

# The parser reads X as x: capitals get an index of their own.
_CAPITAL = re.compile(r"(?<!\S)([A-Z])(?!\S)(?: _ \{ ([0-9]+) \}| _ ([0-9]+))?")
_CAPITAL_MARK = "9909"
_NAMES_ARE_WORDS = frozenset(("\\overline", "\\mathbb", "\\text"))
_TWO_NUMBERS = re.compile(r"[0-9.]+ [0-9.]")

# Where unequal expressions are told apart without algebra, which takes sympy a hundred times as
# long.
_POINTS = (
    Fraction(7310, 9973),
    Fraction(13109, 9941),
    Fraction(20011, 9929),
    Fraction(27103, 9923),
)
# A share of the larger value, as are the other bounds.
_CLEAR_DIFFERENCE = 1e-6
# Digits of a first look, of a value, and of two exact values that are called equal.
_FEW_DIGITS = 15
_DIGITS = 30
_MANY_DIGITS = 40
_SAME_TO_MANY_DIGITS = 1e-30


def same(gold: Form, answer: Form) -> bool:
    """Returns whether the answer says what the gold answer says.

    May take as long as algebra takes.
    """
    if isinstance(gold, Unreadable) or isinstance(answer, Unreadable):
        # A gold answer in prose equals itself, word by word.
        return isinstance(gold, Unreadable) and gold == answer and gold.kind == "prose"
    if isinstance(gold, Choice) or isinstance(answer, Choice):
        return _same_choice(gold, answer)

    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _same_relations(gold, answer)
    if isinstance(gold, Relation):
        # A gold answer that is an equation is asked for as one: only a name may be left out.
        return all(map(_is_label, gold.names[:-1])) and _is_a_value(answer, gold)
    if isinstance(answer, Relation):
        return _is_a_value(gold, answer)

    if isinstance(gold, Collection | Union) or isinstance(answer, Collection | Union):
        return _same_collection(gold, answer)
    if isinstance(gold, Words) or isinstance(answer, Words):
        return _same_words(gold, answer)
    return _same_value(gold, answer)


def _same_choice(gold: Form, answer: Form) -> bool:
    """Compares two forms, at least one of which is a choice.

    The letter decides; without one on both sides, what stands beside it. Two contents must not
    disagree.
    """
    if isinstance(gold, Choice) and isinstance(answer, Choice):
        if gold.letter != answer.letter:
            return False
        if gold.content is None or answer.content is None:
            return True
        return same(gold.content, answer.content)

    if isinstance(gold, Choice):
        choice = gold
        beside = answer
    else:
        assert isinstance(answer, Choice), "one of the two is"
        choice = answer
        beside = gold

    # A lone letter is read as an expression.
    if isinstance(beside, Expression) and len(beside.latex) == 1:
        return beside.latex == choice.letter
    return choice.content is not None and same(choice.content, beside)


def _is_label(name: str) -> bool:
    """Returns whether a side names something without computing with variables.

    Such are x, f(2), P(A), and AB / CD, which names segments.
    """
    words = [token for token in name.split() if token.isalpha()]
    if all(len(word) > 1 and word.isupper() for word in words):
        return True
    return _OPERATORS.isdisjoint(name.split())


def _is_a_value(form: Form, relation: Relation) -> bool:
    """Returns whether a form is what an equation says that something is.

    That is its last side, where every other side names it or equals it: 6 = 5 has no value, x = 5
    and a + b = 5 have 5, and x^2 = 5 has none: it says what x is, and that is not 5. Of an
    approximation the first side is a value too, and no other: a chain of them would be a list of
    guesses.
    """
    if not _VALUE_RELATIONS.issuperset(relation.operators):
        return False
    *sides_before, last = relation.sides

    values = [last]
    # The last name is that of the value itself: it has no partner here.
    for side, name in zip(sides_before, relation.names, strict=False):
        is_constant = isinstance(side, Number)
        if isinstance(side, Expression):
            letters = {token for token in side.latex.split() if len(token) == 1 and token.isalpha()}
            # e and i are numbers, whatever else they may stand for.
            is_constant = letters <= {"e", "i"}
        if is_constant:
            if "~" in relation.operators:
                agrees = _is_rounded(side, last)
            else:
                agrees = same(side, last)
            if not agrees:
                return False
            values.append(side)
        elif _is_solvable(name):
            return False

    return any(same(form, value) for value in values[:2])


def _is_rounded(side: Form, last: Form) -> bool:
    """Returns whether one of two numbers may be the other one rounded to its last place.

    A share of its size instead would let 99 and 100 through, two guesses for the price of one.
    """
    value = _approximate(side)
    last_value = _approximate(last)
    if value is None or last_value is None:
        return False
    # The coarser of the two is the one that was rounded.
    return abs(value - last_value) <= max(_rounding(side), _rounding(last))


def _rounding(form: Form) -> Fraction:
    """Returns half of the last place of a number that is written out; 0 for other forms."""
    if not isinstance(form, Number):
        return Fraction(0)
    match = _WRITTEN_OUT.fullmatch(form.text)
    if match is None:
        return Fraction(0)
    num_places = len(match["decimals"] or "")
    # 1.50e3 is known to tens: the exponent moves the last place.
    exponent = int((match["exponent"] or "0").replace(" ", ""))
    return _half_a_place(num_places - exponent)


def _is_solvable(name: str) -> bool:
    """Returns whether a side holds one variable in arithmetic.

    Then the equation is a riddle and not an answer.
    """
    if is_name(name) or _FUNCTION.fullmatch(name):
        return False
    letters = [token for token in name.split() if token.isalpha()]
    return len(set(letters)) == 1 and len(letters[0]) == 1 and bool(_ARITHMETIC.fullmatch(name))


def _same_relations(gold: Relation, answer: Relation) -> bool:
    are_equations = set(gold.operators) | set(answer.operators) == {"="}
    if are_equations and _defines_a_name(gold) and _defines_a_name(answer):
        names = (gold.names[0], answer.names[0])
        # y = 2x and f(x) = 2x describe the same graph.
        are_graphs = "y" in names and all(_FUNCTION.fullmatch(name) for name in names)
        if names[0] != names[1] and not are_graphs:
            return False
        return same(gold.sides[-1], answer.sides[-1])

    if gold.operators != answer.operators:
        return False
    if len(gold.sides) == len(answer.sides) and all(map(same, gold.sides, answer.sides)):
        return True

    # Two equations may still have the same solutions: 2x = 4y and x = 2y.
    if not are_equations or len(gold.sides) != 2:
        return False
    return _algebraically_equal(" = ".join(gold.names), " = ".join(answer.names))


def _defines_a_name(relation: Relation) -> bool:
    return is_name(relation.names[0]) or bool(_FUNCTION.fullmatch(relation.names[0]))


def _same_collection(gold: Form, answer: Form) -> bool:
    """Compares two forms, at least one of which is a collection or a union."""
    # 1,234 beside a list is a list, and intervals with commas between them are a union.
    if isinstance(gold, Number) and gold.grouped:
        gold = read(gold.text, groups=False)
    if isinstance(answer, Number) and answer.grouped:
        answer = read(answer.text, groups=False)

    if isinstance(gold, Union):
        answer = _as_union(answer)
    elif isinstance(answer, Union):
        gold = _as_union(gold)

    if isinstance(gold, Union) and isinstance(answer, Union):
        return _same_items(gold.parts, answer.parts, ordered=False)
    if not (isinstance(gold, Collection) and isinstance(answer, Collection)):
        return _same_as_single_value(gold, answer) or _same_as_single_value(answer, gold)
    if not _units_agree(gold.unit, answer.unit):
        return False
    if gold.variable and answer.variable and gold.variable != answer.variable:
        return False

    shapes = {gold.brackets.replace("{}", ""), answer.brackets.replace("{}", "")}
    if shapes == {""}:
        golds, answers, is_ordered = _without_names(gold.items, answer.items)
        # What an ellipsis stands for depends on what is before it.
        has_ellipsis = any(
            isinstance(item, Expression) and "\\ldots" in item.latex for item in gold.items
        )
        return _same_items(golds, answers, ordered=is_ordered or has_ellipsis)

    if shapes == {"", "()"}:
        # (x, y) without its parentheses, but never an interval: -1, 1 is not (-1, 1) of an
        # inequality.
        if gold.variable or answer.variable or "{}" in (gold.brackets, answer.brackets):
            return False
        golds, answers, _ = _without_names(gold.items, answer.items)
        return _same_items(golds, answers, ordered=True)

    return len(shapes) == 1 and _same_items(gold.items, answer.items, ordered=True)


def _as_union(form: Form) -> Form:
    if isinstance(form, Collection) and form.brackets == "":
        return Union(form.items)
    return form


def _same_as_single_value(collection: Form, single: Form) -> bool:
    """Returns whether a collection says one value, and that is `single`: {5} is 5, 3:2 is 3/2."""
    if not isinstance(collection, Collection) or isinstance(single, Collection | Union):
        return False
    if collection.brackets in ("", "{}") and len(collection.items) == 1:
        return same(collection.items[0], single)
    if collection.brackets == "::" and not collection.unit:
        if not isinstance(single, Number | Expression):
            return False
        left, right = (_latex(item) for item in collection.items)
        return _same_value(Expression(f"\\frac {{ {left} }} {{ {right} }}"), single)
    return False


def _without_names(
    golds: Sequence[Form], answers: Sequence[Form]
) -> tuple[Sequence[Form], Sequence[Form], bool]:
    """Takes the names from assignments on one side only: x = 3, y = 5 beside 3, 5.

    Names on both sides stay, and are compared.

    Returns:
        The gold answer's items, the answer's, and whether their order says which is which.
    """
    gold_names = _assigned_names(golds)
    answer_names = _assigned_names(answers)
    if bool(gold_names) == bool(answer_names):
        return golds, answers, False

    names = gold_names or answer_names
    return _values(golds), _values(answers), len(set(names)) > 1


def _values(items: Sequence[Form]) -> list[Form]:
    """Returns the items, of an equation the last side alone."""
    return [item.sides[-1] if isinstance(item, Relation) else item for item in items]


def _assigned_names(items: Sequence[Form]) -> list[str]:
    """Returns the names of a list of assignments; none where one of them is something else."""
    names: list[str] = []
    for item in items:
        if not isinstance(item, Relation) or set(item.operators) != {"="}:
            return []
        if not _defines_a_name(item):
            return []
        names.append(item.names[0])
    return names


def _same_items(golds: Sequence[Form], answers: Sequence[Form], *, ordered: bool) -> bool:
    if len(golds) != len(answers):
        return False
    if ordered or len(golds) > _MAX_UNORDERED:
        return all(map(same, golds, answers))

    # Each answer is taken by one gold answer only: 1, 1 is not 1, 2.
    unmatched = list(answers)
    for gold in golds:
        # Equal forms first: they cost nothing.
        if gold in unmatched:
            unmatched.remove(gold)
            continue
        match = next((answer for answer in unmatched if same(gold, answer)), None)
        if match is None:
            return False
        unmatched.remove(match)
    return True


def _same_words(gold: Form, answer: Form) -> bool:
    """Compares two forms, at least one of which is words."""
    if isinstance(gold, Words) and isinstance(answer, Words):
        if not _units_agree(gold.unit, answer.unit):
            return False
        if gold.text == answer.text:
            return True
        # Short words keep their case: mA is not Ma.
        is_long = len(gold.text) >= _FEWEST_LETTERS_OF_A_WORD
        return is_long and gold.text.casefold() == answer.text.casefold()

    if isinstance(gold, Words):
        words = gold
        value = answer
    else:
        assert isinstance(answer, Words), "one of the two is"
        words = answer
        value = gold
    # Letters that may also be a product, such as ab, beside one that is written as one.
    if not words.latex or not isinstance(value, Expression):
        return False
    return _units_agree(words.unit, value.unit) and _algebraically_equal(words.latex, value.latex)


def _units_agree(gold_unit: str, answer_unit: str) -> bool:
    """Returns whether two units may be the same. One that a side leaves out is the question's."""
    return gold_unit == answer_unit or not gold_unit or not answer_unit


def _same_value(gold: Form, answer: Form) -> bool:
    """Compares two numbers or expressions, with their units."""
    assert isinstance(gold, Number | Expression), "the other forms are compared before"
    assert isinstance(answer, Number | Expression), "the other forms are compared before"

    if gold.unit == answer.unit:
        return _same_magnitude(gold, answer)

    bare_gold = replace(gold, unit="")
    bare_answer = replace(answer, unit="")
    units = {gold.unit, answer.unit}
    if units == {"percent", ""}:
        # 50% is 50, where the question asks for percents, and 1/2, where it does not.
        if _same_magnitude(bare_gold, bare_answer):
            return True
        return _same_magnitude(_without_percent(gold), _without_percent(answer))

    has_pi = "\\pi" in _latex(gold) + _latex(answer)
    if "degree" in units and (units == {"degree", "radian"} or has_pi):
        if not units <= {"degree", "radian", ""}:
            return False
        return _same_magnitude(_in_radians(gold), _in_radians(answer))
    return _units_agree(gold.unit, answer.unit) and _same_magnitude(bare_gold, bare_answer)


def _without_percent(form: Number | Expression) -> Number | Expression:
    """Returns percents as a share, and a form without a unit as it is."""
    if not form.unit:
        return form
    if isinstance(form, Number):
        return Number(form.value / 100)
    return Expression(f"( {_latex(form)} ) \\cdot \\frac {{ 1 }} {{ 100 }}")


def _in_radians(form: Number | Expression) -> Number | Expression:
    """Returns an angle without its unit, after degrees were made radians."""
    if form.unit != "degree":
        return replace(form, unit="")
    return Expression(f"( {_latex(form)} ) \\cdot \\frac {{ \\pi }} {{ 180 }}")


def _same_magnitude(gold: Number | Expression, answer: Number | Expression) -> bool:
    """Compares two numbers or expressions, whatever their units.

    Numbers are compared exactly, or to the places of a decimal that may have been rounded.
    """
    if isinstance(gold, Number) and isinstance(answer, Number):
        if gold.value == answer.value:
            return True
        # Only a decimal that may be rounded has places; the coarser of two decides.
        places = [number.places for number in (gold, answer) if number.places is not None]
        return bool(places) and abs(gold.value - answer.value) <= _half_a_place(min(places))

    # A rounded number beside an expression: by its value, without algebra.
    for number, expression in ((gold, answer), (answer, gold)):
        if not isinstance(number, Number) or number.places is None:
            continue
        if isinstance(expression, Expression):
            value = _approximate(expression)
            return value is not None and abs(value - number.value) <= _half_a_place(number.places)

    if isinstance(gold, Expression) and isinstance(answer, Expression):
        if gold.latex == answer.latex:
            return True
        if is_name(gold.latex) and is_name(answer.latex) and "i" not in (gold.latex, answer.latex):
            return False  # math-verify compares symbols without their case
    return _algebraically_equal(_latex(gold), _latex(answer))


def _half_a_place(places: int) -> Fraction:
    return Fraction(1, 2) / Fraction(10) ** places


def _latex(form: Form) -> str:
    """Returns a form as the parser takes it; "" for what has no such text."""
    if isinstance(form, Expression | Words):
        return form.latex
    if not isinstance(form, Number):
        return ""

    sign = ""
    if form.value < 0:
        sign = "- "
    numerator = abs(form.value.numerator)
    denominator = form.value.denominator
    if denominator == 1:
        return f"{sign}{numerator}"
    return f"{sign}\\frac {{ {numerator} }} {{ {denominator} }}"


def is_readable(form: Form) -> bool:
    """Returns whether an answer says something that can be compared.

    Prose that no gold answer says can be, too.
    """
    match form:
        case Unreadable():
            return form.kind in ("prose", "nothing")
        case Collection():
            return all(map(is_readable, form.items))
        case Union():
            return all(map(is_readable, form.parts))
        case Relation():
            return all(map(is_readable, form.sides))
        case Expression():
            return form.latex == "\\ldots" or _parsed(form.latex) is not None
    return True


@lru_cache(maxsize=256)
def _parsed(latex: str) -> Any | None:
    """Returns the sympy expression; None where math-verify's grammar does not know it."""
    from latex2sympy2_extended import latex2sympy

    if _TWO_NUMBERS.search(latex):
        return None  # the parser adds them
    if _NAMES_ARE_WORDS.isdisjoint(latex.split()):
        latex = _CAPITAL.sub(_with_mark, latex)

    has_imaginary = "i" in latex.split()
    try:
        return latex2sympy(
            latex, is_real=not has_imaginary, convert_degrees=False, normalization_config=None
        )
    except Exception:  # the grammar raises plain Exceptions, and sympy whatever it likes
        return None


def _with_mark(match: re.Match[str]) -> str:
    letter = match[1].lower()
    # The parser takes e for Euler's number, whatever its index.
    if match[1] == "E":
        letter = "q"
    return f"{letter} _ {{ {_CAPITAL_MARK}{match[2] or match[3] or ''} }}"


def _algebraically_equal(gold: str, answer: str) -> bool:
    """Returns math-verify's verdict on two values or equations, after cheaper comparisons.

    Its own verdict is checked once more, with more digits.
    """
    from math_verify import verify

    gold_parsed = _parsed(gold)
    answer_parsed = _parsed(answer)
    if gold_parsed is None or answer_parsed is None:
        return False
    if gold.count("'") != answer.count("'"):
        return False  # the parser drops primes

    if "\\sqrt { - " in gold + answer:
        # A root of a negative number is one of i, which the parser took for a variable.
        import sympy

        gold_parsed = gold_parsed.subs(
            {symbol: sympy.I for symbol in gold_parsed.free_symbols if symbol.name == "i"}
        )
        answer_parsed = answer_parsed.subs(
            {symbol: sympy.I for symbol in answer_parsed.free_symbols if symbol.name == "i"}
        )

    try:
        if _differ_at_a_point(gold_parsed, answer_parsed):
            return False
        if _equal_to_many_digits(gold_parsed, answer_parsed):
            return True
    except _NoValueError:
        return False  # algebra takes seconds on what has no value

    # Its own timeout is SIGALRM; the worker's clock ends what never returns.
    if not verify(gold_parsed, answer_parsed, timeout_seconds=None):
        return False
    try:
        return _relatively_equal(gold_parsed, answer_parsed)
    except _NoValueError:
        return False


def _differ_at_a_point(gold: Any, answer: Any) -> bool:
    """Returns whether two expressions clearly differ for some values of their variables.

    Only finite values count.
    """
    import sympy

    if not isinstance(gold, sympy.Expr) or not isinstance(answer, sympy.Expr):
        return False
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    if len(symbols) > len(_POINTS):
        return False

    point = {
        symbol: sympy.Rational(*value.as_integer_ratio())
        for symbol, value in zip(symbols, _POINTS, strict=False)
    }
    values = [_decimal(each, _FEW_DIGITS, point) for each in (gold, answer)]
    if not all(value is not None and value.is_number and value.is_finite for value in values):
        return False
    size = max(abs(value) for value in values)
    return bool(size and abs(values[0] - values[1]) > _CLEAR_DIFFERENCE * size)


def _equal_to_many_digits(gold: Any, answer: Any) -> bool:
    """Returns whether two exact constants agree to 30 digits.

    Such are logarithms of other bases, which sympy's simplify leaves apart.
    """
    import sympy

    for each in (gold, answer):
        if not isinstance(each, sympy.Expr) or not each.is_number or each.has(sympy.Float):
            return False
    values = [_decimal(each, _MANY_DIGITS) for each in (gold, answer)]
    if not all(value is not None and value.is_finite for value in values):
        return False
    size = max(abs(value) for value in values)
    return bool(size and abs(values[0] - values[1]) <= _SAME_TO_MANY_DIGITS * size)


def _relatively_equal(gold: Any, answer: Any) -> bool:
    """Returns whether numbers that were called equal also agree relative to their size."""
    import sympy

    # What is no finite number keeps algebra's verdict.
    for each in (gold, answer):
        if not isinstance(each, sympy.Expr) or not each.is_number or not each.is_finite:
            return True
    values = [_decimal(each, _DIGITS) for each in (gold, answer)]
    if None in values:
        return False  # nothing confirms it

    bound = _RELATIVE_ERROR
    if gold.has(sympy.Float) or answer.has(sympy.Float):
        bound = _ROUNDED_RELATIVE_ERROR
    size = max(abs(value) for value in values)
    return bool(size == 0 or abs(values[0] - values[1]) <= bound * size)


def _approximate(form: Form) -> Fraction | None:
    """Returns the value of a number, or of an expression without variables, to 30 digits.

    None where it has none.
    """
    import sympy

    if isinstance(form, Number):
        return form.value
    if not isinstance(form, Expression):
        return None
    parsed = _parsed(form.latex)
    if not isinstance(parsed, sympy.Expr) or not parsed.is_number or not parsed.is_real:
        return None

    try:
        value = _decimal(parsed, _DIGITS)
    except _NoValueError:
        return None
    if value is None or not value.is_Float or not value.is_finite:
        return None
    return Fraction(str(value))


class _NoValueError(Exception):
    """Such an answer is wrong.

    A failed check would be no negative, and an answer must not be able to choose that.
    """


def _decimal(expression: Any, digits: int, point: Mapping[Any, Any] | None = None) -> Any:
    """Returns the value of a sympy expression, of its variables at `point`.

    None where it is no number, as of an integral.

    Raises:
        _NoValueError: sympy fails on it, as on a sum that diverges.
    """
    import sympy

    try:
        value = sympy.N(expression.subs(point or {}), digits)
    # The worker's own limit: that check has failed, and the answer is not called wrong for it.
    except MemoryError:
        raise
    except Exception as error:  # sympy raises whatever it likes
        raise _NoValueError from error
    if not all(atom.is_number for atom in value.atoms()):
        return None
    return value
