"""Inequalities in one variable as intervals: 1 <= x < 2 is [1, 2), whose variable is x."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from megatron_real.labels.forms import Collection, Expression, Form, Number, Union

_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
_INFINITY = Expression("\\infty")
_MINUS_INFINITY = Expression("- \\infty")

_FUNCTION_CALL = re.compile(r"\\?[A-Za-z]( ')* \( \\?[A-Za-z] \)")
_NAME = re.compile(r"\\?[A-Za-z]+( _ (\{ \w+ \}|\w+))?( ')*")


def is_name(text: str) -> bool:
    """Returns whether a side of a relation is one symbol: x, x_1, \\theta."""
    if not _NAME.fullmatch(text):
        return False
    return text[0] == "\\" or len(text.split(" ")[0]) == 1


def interval_of(
    operators: Sequence[str], sides: Sequence[Form], names: Sequence[str]
) -> Form | None:
    """Returns the interval that an inequality in one variable describes; None where it is none.

    Args:
        operators: [sides - 1] relations, as in `Relation`.
        sides: what is related.
        names: [sides] the text of each side.
    """
    if not set(operators) <= _MIRRORED.keys():
        return None

    # 3 > x is x < 3.
    if len(sides) == 2 and is_name(names[1]) and not is_name(names[0]):
        operators = [_MIRRORED[operators[0]]]
        sides = sides[::-1]
        names = names[::-1]

    if len(sides) == 2 and is_name(names[0]):
        match operators[0]:
            case "<":
                return Collection("()", (_MINUS_INFINITY, sides[1]), names[0])
            case "<=":
                return Collection("(]", (_MINUS_INFINITY, sides[1]), names[0])
            case ">":
                return Collection("()", (sides[1], _INFINITY), names[0])
            case _:
                return Collection("[)", (sides[1], _INFINITY), names[0])

    if len(sides) != 3 or not (is_name(names[1]) or _FUNCTION_CALL.fullmatch(names[1])):
        return None
    # The first letter is the direction, which < and <= share.
    if operators[0][0] != operators[1][0]:
        return None  # 1 < x > 0

    low, _, high = sides
    low_operator, high_operator = operators

    if operators[0][0] == ">":
        low, high = high, low
        low_operator, high_operator = high_operator, low_operator
    # A single letter, < or >, leaves the end out.
    opening = "(" if len(low_operator) == 1 else "["
    closing = ")" if len(high_operator) == 1 else "]"
    return Collection(opening + closing, (low, high), names[1])


def variable_of(form: Collection | Union) -> str:
    """Returns whose values an interval or a union of intervals describes."""
    if isinstance(form, Collection):
        return form.variable
    first = form.parts[0]
    if isinstance(first, Collection):
        return first.variable
    return ""


def named(form: Collection | Union, name: str) -> Form:
    """Returns the intervals as those of the variable `name`."""
    if isinstance(form, Collection):
        return replace(form, variable=name)
    parts: list[Form] = []
    for part in form.parts:
        if isinstance(part, Collection):
            part = replace(part, variable=name)
        parts.append(part)
    return Union(tuple(parts))


def flat(intervals: Sequence[Form]) -> list[Form]:
    """Returns the intervals with those of unions one by one."""
    parts: list[Form] = []
    for form in intervals:
        if isinstance(form, Union):
            parts += form.parts
        else:
            parts.append(form)
    return parts


def intersection(intervals: Sequence[Form]) -> Collection | None:
    """Returns what x > 1 and x < 3 describe together.

    None where they are no two bounds of one interval.
    """
    lower = [i for i in intervals if isinstance(i, Collection) and i.items[1] == _INFINITY]
    upper = [i for i in intervals if isinstance(i, Collection) and i.items[0] == _MINUS_INFINITY]
    if len(lower) != 1 or len(upper) != 1:
        return None

    start = lower[0].items[0]
    end = upper[0].items[1]
    # x > 3 and x < 1 are two answers, not an empty one.
    if isinstance(start, Number) and isinstance(end, Number) and start.value >= end.value:
        return None
    brackets = lower[0].brackets[0] + upper[0].brackets[1]
    return Collection(brackets, (start, end), lower[0].variable)
