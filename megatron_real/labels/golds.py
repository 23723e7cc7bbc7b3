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

_BRACKET_KINDS = {"": "list", "{}": "set", "()": "tuple or open interval", "::": "ratio"}
_KINDS: dict[type[Form], str] = {
    Number: "number",
    Expression: "expression",
    Words: "words",
    Choice: "choice",
    Union: "union of intervals",
    Relation: "relation",
}


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
    """Returns why no completion is likely to match a gold answer, by its normal form alone.

    "" where one may.
    """
    form = read(gold)
    if not isinstance(form, Unreadable):
        return ""
    reasons = {"prose": "a sentence", "nothing": "no answer", "empty": "empty"}
    return reasons.get(form.kind, "not well formed")


def unmatchable(golds: Iterable[tuple[str, tuple[str, ...]]]) -> list[Unmatchable]:
    """Returns the problems none of whose gold answers can be matched.

    This includes answers that algebra cannot read, and takes as long as its parser does.

    Args:
        golds: (uid, gold answers) of each problem.
    """
    problems: list[Unmatchable] = []
    for uid, answers in golds:
        reasons: list[str] = []
        for answer in answers:
            reason = why_unmatchable(answer)
            if not reason and not is_readable(read(answer)):
                reason = "not read by math-verify, so that only its own text matches"
            reasons.append(reason)
        if all(reasons):
            problems.append(Unmatchable(uid, answers, reasons[0]))
    return problems


def kind_of(gold: str) -> str:
    """Returns the kind that a gold answer is read as: a first column in docs/labels.md."""
    form = read(gold)
    if isinstance(form, Collection):
        return _BRACKET_KINDS.get(form.brackets, "interval")
    if isinstance(form, Unreadable):
        return form.kind
    return _KINDS[type(form)]
