r"""Reading an answer out of a completion, in time linear in its length.

thinking        ends at the last closing mark; an opening mark after it that is never closed is thinking too
boxes           the last \boxed{...}, with those before it that belong to the same statement
the end         where no box is required: what follows "answer is", or the last line
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

MAX_ANSWER_CHARS = 1000
"""No honest answer is longer, and the parsers behind the verifiers take more than linear time."""

THINKING_MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""How models open and close their thinking. Tokenizers may call these tokens special."""


class Answer(NamedTuple):
    """What a completion gives as its answer."""

    text: str
    """The contents of the box or boxes, or the end of the text."""
    boxed: bool
    """Whether it stood in a box."""


class _Box(NamedTuple):
    """One closed box: text[start:end] with its command, text[inside:end - closing] without."""

    start: int
    end: int
    content: str


# A command with its brace, the other escapes (so that \{ and \} do not count), and braces.
_BRACES = re.compile(r"\\\\?(?:boxed|fbox|framebox)(?![A-Za-z])\s*\{?|\\.|[{}]", re.DOTALL)
# LaTeX allows an argument without braces: \boxed 5.
_BARE_ARGUMENT = re.compile(r"\s*([-+]?[\w.]+)")
# What may stand between two boxes of one statement: "and", "or", commas, markup, and a name such as
# "y =".
_MARKUP = r"(?:\s|[$,;.]|\\[()\[\],;: ]|\\(?:quad|qquad)\b)*"
_JOINT = re.compile(
    rf"{_MARKUP}(?:(?:\\text\s*\{{)?(?P<words>(?:\s*[A-Za-z()]+){{0,4}})[\s,]*(?:\band|\bor)\b\s*\}}?{_MARKUP})?"
    r"(?P<name>\\?[A-Za-z]+(?:_\{?\w+\}?)?\s*(?:=|\\in\b)\s*)?[$\s]*"
)
# Words by which a text takes its first box back.
_TAKEN_BACK = frozenset(
    ["is", "was", "not", "wrong", "but", "so", "wait", "then", "no", "incorrect", "if"]
)
_MAX_JOINT_CHARS = 60
_ANSWER_IS = re.compile(r"answer(?:\s+is\b|\s*[:=])\s*\**:?|####", re.IGNORECASE)
_MATHEMATICS = re.compile(
    r"\$\$([^$]+)\$\$|(?<!\\)\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_MAX_BOXES = 16
# More than the longest honest answer, thinking included; braces are walked one by one, in a
# fraction of a second.
_MAX_SCANNED_CHARS = 200_000


def final_answer(
    text: str, *, require_think: bool = False, require_boxed: bool = True
) -> Answer | None:
    """Returns what a completion gives as its answer outside of the thinking; None where there is
    none.

    Args:
        text: the completion, with the marks of its thinking.
        require_think: no answer counts without a closing mark of thinking before it.
        require_boxed: no answer counts outside a box; else the end of the text stands in for one.
    """
    spoken, closed = after_thinking(text)
    if require_think and not closed:
        return None
    spoken = spoken[-_MAX_SCANNED_CHARS:]
    boxed = _boxed(spoken)
    if boxed is not None:
        return Answer(boxed, True) if boxed else None
    if require_boxed:
        return None
    stated = _stated(spoken)
    return Answer(stated, False) if stated else None


def opened_thinking(prompt: str) -> str:
    """Returns the mark by which the template of a rendered prompt has opened the thinking, "" where
    it has not.

    A completion goes on from there: nothing in it is an answer until the thinking is closed.
    """
    marks = [opening for opening, _ in THINKING_MARKS if prompt.rstrip().endswith(opening)]
    return marks[0] if marks else ""


def after_thinking(text: str) -> tuple[str, bool]:
    """Returns the text outside of the thinking, and whether a thinking was closed."""
    closed = False
    for _, closing in THINKING_MARKS:
        _, mark, rest = text.rpartition(closing)
        if mark:
            text, closed = rest, True
    for opening, _ in THINKING_MARKS:
        text = text.partition(opening)[0]
    return text, closed


def _boxed(text: str) -> str | None:
    """What the last boxes hold; None without a box, "" where the last box is no answer that can be
    read.
    """
    boxes, open_since = _boxes(text)
    last = next((i for i in reversed(range(len(boxes))) if boxes[i].content), None)
    end = boxes[last].end if last is not None else 0
    if open_since is not None and open_since > end:
        return ""  # a later box was begun and never closed: the one before it was given up
    if last is None:
        return None if not boxes else ""

    contents = [boxes[last].content]
    start = boxes[last].start
    for box in reversed(boxes[max(last - _MAX_BOXES, 0) : last]):
        if not box.content or not _belongs_together(text[box.end : start]):
            break
        contents.insert(0, box.content)
        start = box.start
    contents = _without_repetition(contents)
    joined = ", ".join(contents)
    return joined if len(joined) <= MAX_ANSWER_CHARS else ""


def _belongs_together(between: str) -> bool:
    """Whether two boxes with this text between them are parts of one answer."""
    joint = _JOINT.fullmatch(between) if len(between) <= _MAX_JOINT_CHARS else None
    return joint is not None and _TAKEN_BACK.isdisjoint((joint["words"] or "").lower().split())


def _without_repetition(contents: Sequence[str]) -> list[str]:
    """A box that says the same as the one before it is the same answer once more."""
    return [c for i, c in enumerate(contents) if i == 0 or c != contents[i - 1]]


def _boxes(text: str) -> tuple[list[_Box], int | None]:
    """The innermost closed boxes in order, and where a later box begins that has a content but no
    end.
    """
    boxes: list[_Box] = []
    # For each open brace the start of its box's command, or -1, and where its content begins.
    stack: list[tuple[int, int]] = []
    first = min(
        (at for name in ("\\boxed", "\\fbox", "\\framebox") if (at := text.find(name)) >= 0),
        default=len(text),
    )
    for match in _BRACES.finditer(text, first):
        token = match[0]
        if token == "{":
            stack.append((-1, match.end()))
        elif token == "}":
            if not stack:
                continue
            start, inside = stack.pop()
            holds_a_box = bool(boxes) and boxes[-1].start > start
            if start >= 0 and not holds_a_box:
                boxes.append(_Box(start, match.end(), text[inside : match.start()].strip()))
        elif len(token) > 2:
            if token.endswith("{"):
                stack.append((match.start(), match.end()))
            elif argument := _BARE_ARGUMENT.match(text, match.end()):
                boxes.append(_Box(match.start(), argument.end(), argument[1].rstrip(".")))
    written = len(text.rstrip())
    unclosed = [start for start, inside in stack if start >= 0 and inside < written]
    return boxes, max(unclosed, default=None)


_SENTENCE_END = re.compile(r"(?<=[^\s\d])\.\s|(?<=\d)\.\s(?=\s*[A-Z])|\n\s*\n")


def _stated(text: str) -> str:
    """What a text without a box ends in: the sentence after its last "answer is", else its last
    formula or line.
    """
    tail = text[-MAX_ANSWER_CHARS:].strip()
    marks = list(_ANSWER_IS.finditer(tail))
    if marks:
        sentence = _SENTENCE_END.split(tail[marks[-1].end() :].strip(), maxsplit=1)[0]
        # "The largest $n$ is 34": a lone letter is what is asked for, not the answer.
        formulas = [
            formula for formula in _formulas(sentence) if len(formula) > 1 or not formula.isalpha()
        ]
        lines = sentence.strip("* ").splitlines()
        return formulas[-1] if formulas else next(iter(lines), "")
    formulas = _formulas(tail)
    lines = tail.splitlines()
    return formulas[-1] if formulas else next(reversed(lines), "").strip("* ")


def _formulas(text: str) -> list[str]:
    return [next(part for part in found if part).strip() for found in _MATHEMATICS.findall(text)]
