"""Gold answers that nobody can match: prose, NaN, and what no grammar reads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_real.labels.comparison import is_readable
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
from megatron_real.labels.normal_form import read


@dataclass(frozen=True)
class Unmatchable:
    """A problem none of whose gold answers can be matched."""

    uid: str
    """Which problem."""
    golds: tuple[str, ...]
    """Its gold answers."""
    reason: str
    """Why the first of them cannot be."""


def why_unmatchable(gold: str) -> str:
    """Returns why no completion is likely to match a gold answer, by its normal form alone; ""
    where one may.
    """
    form = read(gold)
    if not isinstance(form, Unreadable):
        return ""
    reasons = {"prose": "a sentence", "nothing": "no answer", "empty": "empty"}
    return reasons.get(form.kind, "not well formed")


def unmatchable(golds: Iterable[tuple[str, tuple[str, ...]]]) -> list[Unmatchable]:
    """Returns the problems none of whose gold answers can be matched, also by what algebra cannot
    read.

    Args:
        golds: (uid, gold answers) of each problem.
    """
    found = []
    for uid, answers in golds:
        reasons = [why_unmatchable(answer) or _why_unreadable(answer) for answer in answers]
        if all(reasons):
            found.append(Unmatchable(uid, answers, reasons[0]))
    return found


def _why_unreadable(gold: str) -> str:
    return (
        ""
        if is_readable(read(gold))
        else "not read by math-verify, so that only its own text matches"
    )


def kind_of(gold: str) -> str:
    """Returns the name of the kind that a gold answer is read as: the first column of the table in
    docs/labels.md.
    """
    return _kind(read(gold))


_BRACKET_KINDS = {"": "list", "{}": "set", "()": "tuple or open interval", "::": "ratio"}
_KINDS: dict[type[Form], str] = {
    Number: "number",
    Expression: "expression",
    Words: "words",
    Choice: "choice",
    Union: "union of intervals",
    Relation: "relation",
}


def _kind(form: Form) -> str:
    if isinstance(form, Collection):
        return _BRACKET_KINDS.get(form.brackets, "interval")
    return form.kind if isinstance(form, Unreadable) else _KINDS[type(form)]
