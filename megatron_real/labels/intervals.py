"""Inequalities in one variable as intervals: 1 <= x < 2 is [1, 2), whose variable is x."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from megatron_real.labels.forms import Collection, Expression, Form, Number, Union

_MIRRORED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


_FUNCTION_CALL = re.compile(r"\\?[A-Za-z]( ')* \( \\?[A-Za-z] \)")
_NAME = re.compile(r"\\?[A-Za-z]+( _ (\{ \w+ \}|\w+))?( ')*")


def is_name(text: str) -> bool:
    """Returns whether a side of a relation is one symbol: x, x_1, \\theta."""
    return bool(_NAME.fullmatch(text)) and (
        len(text.split(" ")[0].lstrip("\\")) == 1 or text[0] == "\\"
    )


def interval_of(
    operators: Sequence[str], sides: Sequence[Form], names: Sequence[str]
) -> Form | None:
    """Returns the interval that an inequality in one variable describes; None where it is none."""
    if not set(operators) <= _MIRRORED.keys():
        return None
    if len(sides) == 2 and is_name(names[1]) and not is_name(names[0]):
        operators = [_MIRRORED[operators[0]]]
        sides, names = sides[::-1], names[::-1]
    if len(sides) == 2 and is_name(names[0]):
        strict = len(operators[0]) == 1
        infinity = Expression("\\infty")
        if operators[0] in ("<", "<="):
            return Collection(
                "()" if strict else "(]", (Expression("- \\infty"), sides[1]), names[0]
            )
        return Collection("()" if strict else "[)", (sides[1], infinity), names[0])
    if (
        len(sides) != 3
        or not (is_name(names[1]) or _FUNCTION_CALL.fullmatch(names[1]))
        or operators[0][0] != operators[1][0]
    ):
        return None
    brackets = ("(" if len(operators[0]) == 1 else "[") + (")" if len(operators[1]) == 1 else "]")
    ends = (sides[0], sides[2])
    if operators[0][0] == ">":
        brackets = {"[)": "(]", "(]": "[)"}.get(brackets, brackets)
        ends = ends[::-1]
    return Collection(brackets, ends, names[1])


def variable_of(form: Collection | Union) -> str:
    """Returns whose values an interval or a union of intervals describes."""
    if isinstance(form, Collection):
        return form.variable
    return variable_of(form.parts[0]) if isinstance(form.parts[0], Collection) else ""


def named(form: Collection | Union, name: str) -> Form:
    """Returns the intervals as those of the variable `name`."""
    if isinstance(form, Collection):
        return replace(form, variable=name)
    return Union(tuple(named(p, name) if isinstance(p, Collection) else p for p in form.parts))


def flat(intervals: Sequence[Form]) -> list[Form]:
    """Returns the intervals with those of unions one by one."""
    return [
        part for form in intervals for part in (form.parts if isinstance(form, Union) else (form,))
    ]


def intersection(intervals: Sequence[Form]) -> Collection | None:
    """Returns what x > 1 and x < 3 describe together; None where they are no two bounds of one
    interval.
    """
    lower = [
        i for i in intervals if isinstance(i, Collection) and i.items[1] == Expression("\\infty")
    ]
    upper = [
        i for i in intervals if isinstance(i, Collection) and i.items[0] == Expression("- \\infty")
    ]
    if len(lower) != 1 or len(upper) != 1:
        return None
    start, end = lower[0].items[0], upper[0].items[1]
    if isinstance(start, Number) and isinstance(end, Number) and start.value >= end.value:
        return None
    return Collection(lower[0].brackets[0] + upper[0].brackets[1], (start, end), lower[0].variable)
