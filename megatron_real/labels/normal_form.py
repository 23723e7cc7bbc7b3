r"""The one normal form of an answer: what spellings of the same answer have in common. docs/labels.md has the table.

    text -> tokens (tokens.py) -> lists, unions, relations, brackets -> a value with its unit (scalars.py, units.py)

The time is linear in the text: brackets nest at most `_MAX_DEPTH` deep, and each level looks at a token a bounded number
of times. Nothing here evaluates; what needs algebra is left to comparison.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from megatron_real.labels.answers import MAX_ANSWER_CHARS
from megatron_real.labels.forms import (
    Choice,
    Collection,
    Form,
    Number,
    Relation,
    Union,
    Unreadable,
    Words,
)
from megatron_real.labels.intervals import flat, intersection, interval_of, named, variable_of
from megatron_real.labels.scalars import MAX_ANSWER_WORDS, expression_or_words, read_number
from megatron_real.labels.tokens import (
    OPENING,
    REMARKS,
    Token,
    bracket_levels,
    joined,
    lone_bar,
    split,
    tokens_of,
    trim,
    without_stray_bracket,
)
from megatron_real.labels.units import split_unit

_MAX_DEPTH = 8
_RELATIONS = {
    "=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\in": "in", "\\approx": "~",
    "\\simeq": "~", "\\equiv": "equiv", "\\to": "to", "\\Rightarrow": "implies", "\\Leftrightarrow": "iff",
    "\\iff": "iff", "\\mid": "divides", "\\cong": "cong", "\\sim": "sim", "\\parallel": "parallel",
    "\\perp": "perp", "\\subset": "subset", "\\subseteq": "subset", "\\propto": "propto", "\\notin": "notin",
    "\\nmid": "nmid", "\\ll": "ll", "\\gg": "gg", "\\mapsto": "to", "\\leftarrow": "from",
    "\\leftrightarrow": "iff",
}  # fmt: skip


# What is a comma in words.
_COMMAS = frozenset(",;") | {"and", "or", "where", "for", "with", "\\\\", "\\land", "\\lor"}


def read(text: str, *, groups: bool = True) -> Form:
    r"""Returns the normal form of an answer.

    Args:
        text: what stood in the box, or a gold answer.
        groups: commas within 1,234 separate thousands; else the items of a list.

    Example: read("3\\tfrac12 \\text{ cm}") is Number(Fraction(7, 2), unit="cm").
    """
    if len(text) > MAX_ANSWER_CHARS:
        return Unreadable(text, "broken")
    tokens = trim(tokens_of(text))
    if not tokens:
        return Unreadable(text, "empty")
    if len(tokens) == 1 and tokens[0].text.lower() in ("nan", "none", "null"):
        return Unreadable(text, "nothing")
    if _is_prose(tokens):
        return Unreadable(joined(tokens).lower(), "prose")
    return _Reader(groups).form(tokens, 0)


_LAST_VALUE = re.compile(r"-?(?:\\frac\{[0-9]+\}\{[0-9]+\}|[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?)")


_PLAIN_WORD = re.compile(r"(?<![\\A-Za-z])(?!and\b|or\b)[A-Za-z]{2,}")


def read_sentence(text: str) -> Form:
    """Returns the normal form of a text that may be a sentence: then that of the last number in it."""
    text = text[-MAX_ANSWER_CHARS:]
    form = read(text)
    is_sentence = isinstance(form, Unreadable) or (
        "\\" not in text and len(_PLAIN_WORD.findall(text)) > 1
    )
    values = _LAST_VALUE.findall(text) if is_sentence and not isinstance(form, Number) else []
    return read(values[-1].rstrip(",")) if values else form


def _is_prose(tokens: Sequence[Token]) -> bool:
    """A sentence: many words, or some after a full stop."""
    words = [
        i
        for i, token in enumerate(tokens)
        if token.kind in ("word", "letters") and len(token.text) > 2
    ]
    stops = [i for i, token in enumerate(tokens) if token.text == "." and i > 1]
    return len(words) > MAX_ANSWER_WORDS or (
        bool(stops) and len(words) > 1 and words[-1] > stops[0]
    )


class _Reader:
    """Reads trimmed tokens into a form."""

    def __init__(self, groups: bool) -> None:
        self._groups = groups

    def form(self, tokens: Sequence[Token], depth: int) -> Form:
        """The form of tokens that are `depth` brackets deep."""
        text = joined(tokens)
        if not tokens:
            return Unreadable(text, "empty")
        if depth > _MAX_DEPTH:
            return Unreadable(text, "broken")
        tokens = _without_remark(tokens)
        choice = self._choice(tokens, depth)
        if choice is not None:
            return choice
        levels = bracket_levels(tokens)
        if levels is not None:
            tokens = self._join_groups(tokens, levels)
            levels = bracket_levels(tokens)
        if levels is None:
            repaired = without_stray_bracket(tokens)
            if repaired is None:
                return Unreadable(text, "broken")
            return self.form(repaired, depth + 1)
        parts, separators = split(tokens, levels, _COMMAS)
        if separators:
            return self._several(parts, separators, depth)
        parts, separators = split(tokens, levels, {"\\cup"})
        if separators:
            return Union(tuple(self.form(trim(part), depth + 1) for part in parts))
        parts, separators = split(tokens, levels, _RELATIONS.keys() | lone_bar(tokens, levels))
        if separators:
            return self._relation(parts, separators, depth)
        return self._bracketed(tokens, levels, depth) or self._scalar(tokens, depth)

    def _join_groups(self, tokens: Sequence[Token], levels: Sequence[int]) -> list[Token]:
        """Joins 1,000,000 or 1 000 000 into one number. Within brackets commas separate."""
        separators = (",", " ") if self._groups else (" ",)
        result: list[Token] = []
        i = 0
        while i < len(tokens):
            token = tokens[i]
            i += 1
            separator = tokens[i].text if i < len(tokens) else ""
            if _FIRST_GROUP.fullmatch(token.text) and separator in separators:
                allowed = separator == " " or levels[i] == 0
                while allowed and i + 1 < len(tokens) and tokens[i].text == separator:
                    if not _GROUP.fullmatch(tokens[i + 1].text):
                        break
                    token = Token(f"{token.text},{tokens[i + 1].text}", "number")
                    i += 2
            result.append(token)
        return result

    def _choice(self, tokens: Sequence[Token], depth: int) -> Choice | None:
        """(B), (B) 5, B. 5, B: text, B) 5; a lone B is an expression that equals the choice."""
        texts = [token.text for token in tokens if token.kind != "space"]
        if len(texts) >= 3 and texts[0] == "(" and _is_choice(texts[1]) and texts[2] == ")":
            used = 3
        elif len(texts) >= 3 and _is_choice(texts[0]) and texts[1] in (".", ":", ")"):
            used = 2
        else:
            return None
        rest = _after(tokens, used)
        if any(token.text in ("\\cup", "\\cap", "=", "\\setminus", "\\to") for token in rest):
            return None
        return Choice(
            texts[0] if used == 2 else texts[1], self.form(rest, depth + 1) if rest else None
        )

    def _several(self, parts: list[list[Token]], separators: list[str], depth: int) -> Form:
        items: list[Form] = []
        for part in map(trim, parts):
            if part:
                item = self.form(part, depth + 1)
                items += (
                    item.items if isinstance(item, Collection) and _is_signs(item, part) else [item]
                )
        # "k in Z" beside a formula says what k is; it is no answer of its own.
        conditions = [
            item for item in items if isinstance(item, Relation) and item.operators == ("in",)
        ]
        if len(conditions) < len(items):
            items = [item for item in items if item not in conditions]
        if len(items) == 1:
            return items[0]
        if not items:
            return Unreadable("", "empty")
        intervals = [
            item for item in items if isinstance(item, Collection | Union) and variable_of(item)
        ]
        if len(intervals) == len(items):
            both = set(separators) & {"and", "\\land", ","}
            met = intersection(intervals) if both and len(items) == 2 else None
            return met or Union(tuple(flat(intervals)))
        return Collection("", tuple(items))

    def _relation(self, parts: list[list[Token]], separators: list[str], depth: int) -> Form:
        operators = tuple(_RELATIONS.get(separator, "divides") for separator in separators)
        trimmed = [trim(part) for part in parts]
        names = tuple(joined(part) for part in trimmed)
        if not all(trimmed):
            return Unreadable(joined([t for part in parts for t in part]), "broken")
        if len(names) == 2 and operators[0] == "in" and not _is_number_set(names[1]):
            inside = self.form(trimmed[1], depth + 1)
            return named(inside, names[0]) if isinstance(inside, Collection | Union) else inside
        sides = tuple(self.form(part, depth + 1) for part in trimmed)
        interval = interval_of(operators, sides, names)
        return interval or Relation(operators, sides, names)

    def _bracketed(self, tokens: Sequence[Token], levels: Sequence[int], depth: int) -> Form | None:
        first, last = tokens[0].text, tokens[-1].text
        opened, closed = {"]": "("}.get(first, first), {"[": ")"}.get(last, last)
        if first not in OPENING and first != "]":
            return None
        if first in OPENING and min(levels[:-1], default=0) < 1:
            return None  # (a)(b): the first bracket is not the last one's
        inside = list(tokens[1:-1])
        if opened == "\\{":
            builder = self._set_builder(inside, depth)
            if builder is not None:
                return builder
        if not trim(inside):
            return Words("\\emptyset") if opened == "\\{" else None
        inner_levels = bracket_levels(inside)
        if inner_levels is None:
            return None
        parts, separators = split(inside, inner_levels, {",", ";"})
        is_matrix = inside[0].text.startswith("\\begin")
        if not separators and (opened in ("(", "{") or is_matrix):
            return self.form(trim(inside), depth + 1)
        brackets = {"\\{": "{", "{": "{"}.get(opened, opened) + {"\\}": "}", "}": "}"}.get(
            closed, closed
        )
        items = tuple(self.form(trim(part), depth + 1) for part in parts if trim(part))
        return Collection(brackets, items)

    def _set_builder(self, inside: list[Token], depth: int) -> Form | None:
        levels = bracket_levels(inside)
        if levels is None:
            return None
        parts, separators = split(inside, levels, {"\\mid", "|", ":"})
        if len(separators) != 1 or not all(map(trim, parts)):
            return None
        condition = self.form(trim(parts[1]), depth + 1)
        return (
            condition
            if isinstance(condition, Collection | Union) and variable_of(condition)
            else None
        )

    def _scalar(self, tokens: Sequence[Token], depth: int) -> Form:
        text = joined(tokens)
        if text == "\\emptyset":
            return Words("\\emptyset")
        signs = [i for i, token in enumerate(tokens) if token.text in ("\\pm", "\\mp")]
        if signs:
            return Collection("", tuple(self.form(each, depth + 1) for each in _both_signs(tokens)))
        levels = bracket_levels(tokens) or [0]
        parts, separators = split(tokens, levels, {":"})
        if len(separators) == 1 and all(map(trim, parts)):
            last, unit = split_unit(trim(parts[1]))
            halves = (self.form(trim(parts[0]), depth + 1), self.form(last, depth + 1))
            if not any(isinstance(half, Words | Unreadable) for half in halves):
                return Collection("::", halves, unit=unit)
        body, unit = split_unit(tokens)
        number = read_number(joined(body))
        if number is not None:
            return replace(number, unit=unit, text=joined(body))
        return expression_or_words(tokens, body, unit)


def _is_choice(text: str) -> bool:
    return len(text) == 1 and text in "ABCDEFGHIJ"


def _after(tokens: Sequence[Token], used: int) -> list[Token]:
    """What follows the first `used` tokens that are no spaces."""
    for i, token in enumerate(tokens):
        used -= token.kind != "space"
        if used == 0:
            return trim(tokens[i + 1 :])
    return []


def _without_remark(tokens: Sequence[Token]) -> list[Token]:
    """Cuts an explanation: 5 (since x > 0)."""
    for i, token in enumerate(tokens):
        if i and token.kind == "word" and token.text.lower() in REMARKS:
            return trim(tokens[: i - 1 if tokens[i - 1].text == "(" else i])
    return list(tokens)


_FIRST_GROUP = re.compile("[1-9][0-9]{0,2}")
_GROUP = re.compile(r"[0-9]{3}(\.[0-9]+)?")


def _is_signs(item: Collection, part: Sequence[Token]) -> bool:
    """The two values of a plus-minus sign belong to the list around it."""
    return item.brackets == "" and any(token.text in ("\\pm", "\\mp") for token in part)


def _both_signs(tokens: Sequence[Token]) -> list[list[Token]]:
    upper = {"\\pm": "+", "\\mp": "-"}
    lower = {"\\pm": "-", "\\mp": "+"}
    return [
        trim([Token(signs.get(token.text, token.text), token.kind) for token in tokens])
        for signs in (upper, lower)
    ]


def _is_number_set(name: str) -> bool:
    return name.startswith("\\mathbb") or name in ("R", "Z", "N", "Q", "C")
