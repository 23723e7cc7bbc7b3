r"""The one normal form of an answer: what spellings of the same answer have in common.

    text -> tokens (tokens.py) -> lists, unions, relations, brackets
         -> a value with its unit (scalars.py, units.py)

docs/labels.md has the table. The time is linear in the text: brackets nest at most `_MAX_DEPTH`
deep, and each level looks at a token a bounded number of times. Nothing here evaluates; what needs
algebra is left to comparison.py.
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
    "=": "=", "<": "<", ">": ">", "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\in": "in",
    "\\approx": "~", "\\simeq": "~", "\\equiv": "equiv", "\\to": "to", "\\Rightarrow": "implies",
    "\\Leftrightarrow": "iff", "\\iff": "iff", "\\mid": "divides", "\\cong": "cong", "\\sim": "sim",
    "\\parallel": "parallel", "\\perp": "perp", "\\subset": "subset", "\\subseteq": "subset",
    "\\propto": "propto", "\\notin": "notin", "\\nmid": "nmid", "\\ll": "ll", "\\gg": "gg",
    "\\mapsto": "to", "\\leftarrow": "from", "\\leftrightarrow": "iff",
}  # fmt: skip
# What is a comma in words.
_COMMAS = frozenset(",;") | {"and", "or", "where", "for", "with", "\\\\", "\\land", "\\lor"}

_LAST_VALUE = re.compile(r"-?(?:\\frac\{[0-9]+\}\{[0-9]+\}|[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?)")
_PLAIN_WORD = re.compile(r"(?<![\\A-Za-z])(?!and\b|or\b)[A-Za-z]{2,}")

# The groups of 1,000,000.
_FIRST_GROUP = re.compile("[1-9][0-9]{0,2}")
_GROUP = re.compile(r"[0-9]{3}(\.[0-9]+)?")


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

    # A sentence has many words, or some after a full stop. A stop behind one token is that of a
    # list or a choice: B. 5
    words = [
        i
        for i, token in enumerate(tokens)
        if token.kind in ("word", "letters") and len(token.text) > 2
    ]
    stops = [i for i, token in enumerate(tokens) if token.text == "." and i > 1]
    goes_on = stops and len(words) > 1 and words[-1] > stops[0]
    if len(words) > MAX_ANSWER_WORDS or goes_on:
        return Unreadable(joined(tokens).lower(), "prose")

    return _Reader(groups).form(tokens, 0)


def read_sentence(text: str) -> Form:
    """Returns the normal form of a text that may be a sentence: that of the last number in it."""
    # The beginning goes: the last number of a sentence counts.
    text = text[-MAX_ANSWER_CHARS:]
    form = read(text)
    if isinstance(form, Number):
        return form

    is_sentence = isinstance(form, Unreadable) or (
        "\\" not in text and len(_PLAIN_WORD.findall(text)) > 1
    )
    values = _LAST_VALUE.findall(text)
    if not is_sentence or not values:
        return form
    return read(values[-1].rstrip(","))


class _Reader:
    """Reads trimmed tokens into a form."""

    def __init__(self, groups: bool) -> None:
        self._groups = groups

    def form(self, tokens: Sequence[Token], depth: int) -> Form:
        """Returns the form of tokens that are `depth` brackets deep.

        The order is that of how loosely each thing binds: a choice, a list, a union, a relation,
        brackets, a value.
        """
        text = joined(tokens)
        if not tokens:
            return Unreadable(text, "empty")
        if depth > _MAX_DEPTH:
            return Unreadable(text, "broken")

        # An explanation is cut off: 5 (since x > 0).
        for i, token in enumerate(tokens):
            if i and token.kind == "word" and token.text.lower() in REMARKS:
                end = i
                if tokens[i - 1].text == "(":
                    end = i - 1
                tokens = trim(tokens[:end])
                break

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

    def _choice(self, tokens: Sequence[Token], depth: int) -> Choice | None:
        """Reads (B), (B) 5, B. 5, B: text and B) 5; returns None for anything else.

        A lone B is an expression, which equals the choice.
        """
        texts = [token.text for token in tokens if token.kind != "space"]
        if len(texts) < 3:
            return None

        if texts[0] == "(" and _is_choice(texts[1]) and texts[2] == ")":
            letter = texts[1]
            num_used = 3
        elif _is_choice(texts[0]) and texts[1] in (".", ":", ")"):
            letter = texts[0]
            num_used = 2
        else:
            return None

        # What follows the mark; spaces are tokens too, and are not counted.
        rest: list[Token] = []
        for i, token in enumerate(tokens):
            num_used -= token.kind != "space"
            if num_used == 0:
                rest = trim(tokens[i + 1 :])
                break
        # A set or a function is called so, not offered: (A) \cup B, C: x \to y.
        if any(token.text in ("\\cup", "\\cap", "=", "\\setminus", "\\to") for token in rest):
            return None
        if not rest:
            return Choice(letter, None)
        return Choice(letter, self.form(rest, depth + 1))

    def _join_groups(self, tokens: Sequence[Token], levels: Sequence[int]) -> list[Token]:
        """Joins 1,000,000 or 1 000 000 into one number. Within brackets commas separate."""
        separators: tuple[str, ...] = (" ",)
        if self._groups:
            separators = (",", " ")

        result: list[Token] = []
        i = 0
        while i < len(tokens):
            token = tokens[i]
            i += 1
            separator = ""
            if i < len(tokens):
                separator = tokens[i].text
            if _FIRST_GROUP.fullmatch(token.text) and separator in separators:
                # The level is that of the separator: a comma within brackets separates items.
                may_join = separator == " " or levels[i] == 0
                while may_join and i + 1 < len(tokens) and tokens[i].text == separator:
                    if not _GROUP.fullmatch(tokens[i + 1].text):
                        break
                    token = Token(f"{token.text},{tokens[i + 1].text}", "number")
                    i += 2
            result.append(token)
        return result

    def _several(self, parts: list[list[Token]], separators: list[str], depth: int) -> Form:
        """Returns the form of parts that commas, or words like them, separate."""
        items: list[Form] = []
        for part in map(trim, parts):
            if not part:
                continue
            item = self.form(part, depth + 1)
            # The two values of a plus-minus sign belong to the list around it.
            is_both_signs = any(token.text in ("\\pm", "\\mp") for token in part)
            if isinstance(item, Collection) and item.brackets == "" and is_both_signs:
                items += item.items
            else:
                items.append(item)

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
        if len(intervals) < len(items):
            return Collection("", tuple(items))

        bounds = None
        # Between bounds "or" makes two answers of them.
        if len(items) == 2 and not {"and", "\\land", ","}.isdisjoint(separators):
            bounds = intersection(intervals)
        return bounds or Union(tuple(flat(intervals)))

    def _relation(self, parts: list[list[Token]], separators: list[str], depth: int) -> Form:
        """Returns the form of sides between relation signs: an interval where they say one."""
        operators = tuple(_RELATIONS.get(separator, "divides") for separator in separators)
        trimmed = [trim(part) for part in parts]
        names = tuple(joined(part) for part in trimmed)
        if not all(trimmed):
            return Unreadable(joined([token for part in parts for token in part]), "broken")

        # x \in [0, 1] is an interval of x; x \in \mathbb{R} stays a relation.
        if len(names) == 2 and operators[0] == "in":
            is_number_set = names[1].startswith("\\mathbb") or names[1] in ("R", "Z", "N", "Q", "C")
            if not is_number_set:
                values = self.form(trimmed[1], depth + 1)
                if isinstance(values, Collection | Union):
                    return named(values, names[0])
                return values

        sides = tuple(self.form(part, depth + 1) for part in trimmed)
        return interval_of(operators, sides, names) or Relation(operators, sides, names)

    def _bracketed(self, tokens: Sequence[Token], levels: Sequence[int], depth: int) -> Form | None:
        """Returns the form of tokens in one pair of brackets; None where they are not."""
        first = tokens[0].text
        if first not in OPENING and first != "]":
            return None
        if first in OPENING and min(levels[:-1], default=0) < 1:
            return None  # (a)(b): the first bracket is not the last one's

        # ]1, 2[ is (1, 2).
        opening = {"]": "("}.get(first, first)
        closing = {"[": ")"}.get(tokens[-1].text, tokens[-1].text)

        inside = list(tokens[1:-1])
        if opening == "\\{":
            interval = self._set_builder(inside, depth)
            if interval is not None:
                return interval

        if not trim(inside):
            if opening == "\\{":
                return Words("\\emptyset")
            return None

        inner_levels = bracket_levels(inside)
        if inner_levels is None:
            return None

        parts, separators = split(inside, inner_levels, {",", ";"})
        is_matrix = inside[0].text.startswith("\\begin")
        # ( ) and TeX's braces around a single value only group; [5] and \{5\} are collections.
        if not separators and (opening in ("(", "{") or is_matrix):
            return self.form(trim(inside), depth + 1)

        brackets = opening.replace("\\{", "{") + closing.replace("\\}", "}")
        items = tuple(self.form(trim(part), depth + 1) for part in parts if trim(part))
        return Collection(brackets, items)

    def _set_builder(self, inside: list[Token], depth: int) -> Form | None:
        """Returns the interval that {x | 0 < x < 1} describes; None where `inside` is no such."""
        levels = bracket_levels(inside)
        if levels is None:
            return None
        parts, separators = split(inside, levels, {"\\mid", "|", ":"})
        if len(separators) != 1 or not all(map(trim, parts)):
            return None

        condition = self.form(trim(parts[1]), depth + 1)
        if isinstance(condition, Collection | Union) and variable_of(condition):
            return condition
        return None

    def _scalar(self, tokens: Sequence[Token], depth: int) -> Form:
        """Returns the form of a single value, a ratio, or both values of a plus-minus sign."""
        if joined(tokens) == "\\emptyset":
            return Words("\\emptyset")

        if any(token.text in ("\\pm", "\\mp") for token in tokens):
            values: list[Form] = []
            for signs in ({"\\pm": "+", "\\mp": "-"}, {"\\pm": "-", "\\mp": "+"}):
                signed = [Token(signs.get(token.text, token.text), token.kind) for token in tokens]
                values.append(self.form(trim(signed), depth + 1))
            return Collection("", tuple(values))

        levels = bracket_levels(tokens) or [0]
        parts, separators = split(tokens, levels, {":"})
        if len(separators) == 1 and all(map(trim, parts)):
            # The unit of 3 : 2 cm is that of the whole ratio.
            right, unit = split_unit(trim(parts[1]))
            halves = (self.form(trim(parts[0]), depth + 1), self.form(right, depth + 1))
            if not any(isinstance(half, Words | Unreadable) for half in halves):
                return Collection("::", halves, unit=unit)

        body, unit = split_unit(tokens)
        number = read_number(joined(body))
        if number is not None:
            return replace(number, unit=unit, text=joined(body))
        return expression_or_words(tokens, body, unit)


def _is_choice(text: str) -> bool:
    return len(text) == 1 and text in "ABCDEFGHIJ"
