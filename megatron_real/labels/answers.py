r"""Reading an answer out of a completion, in time linear in its length.

thinking        ends at the last closing mark; what an opening mark after it begins is thinking too
boxes           the last \boxed{...}, with those before it that belong to the same statement
the end         where no box is required: what follows "answer is", or the last line
"""

from __future__ import annotations

import re
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
    """One closed box of a text: text[start:end], its command included."""

    start: int
    end: int
    content: str
    """What is in it, without blanks around."""


# A command with its brace, the other escapes (so that \{ and \} do not count), and braces.
_BRACES = re.compile(r"\\\\?(?:boxed|fbox|framebox)(?![A-Za-z])\s*\{?|\\.|[{}]", re.DOTALL)
# LaTeX allows an argument without braces: \boxed 5.
_BARE_ARGUMENT = re.compile(r"\s*([-+]?[\w.]+)")
# What may stand between two boxes of one statement: "and", "or", commas, markup, and a name such as
# "y =".
_MARKUP = r"(?:\s|[$,;.]|\\[()\[\],;: ]|\\(?:quad|qquad)\b)*"
_JOINT = re.compile(
    rf"{_MARKUP}(?:(?:\\text\s*\{{)?(?P<words>(?:\s*[A-Za-z()]+){{0,4}})"
    rf"[\s,]*(?:\band|\bor)\b\s*\}}?{_MARKUP})?"
    r"(?P<name>\\?[A-Za-z]+(?:_\{?\w+\}?)?\s*(?:=|\\in\b)\s*)?[$\s]*"
)
# Words by which a text takes its first box back.
_TAKEN_BACK = frozenset(
    ["is", "was", "not", "wrong", "but", "so", "wait", "then", "no", "incorrect", "if"]
)
# Between two boxes of one statement; a longer text is a sentence of its own.
_MAX_JOINT_CHARS = 60
_ANSWER_IS = re.compile(r"answer(?:\s+is\b|\s*[:=])\s*\**:?|####", re.IGNORECASE)
_MATHEMATICS = re.compile(
    r"\$\$([^$]+)\$\$|(?<!\\)\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_SENTENCE_END = re.compile(r"(?<=[^\s\d])\.\s|(?<=\d)\.\s(?=\s*[A-Z])|\n\s*\n")
# Boxes before the last one that may belong to its statement.
_MAX_BOXES = 16
# More than the longest honest answer, thinking included; braces are walked one by one, in a
# fraction of a second.
_MAX_SCANNED_CHARS = 200_000


def final_answer(
    text: str, *, require_think: bool = False, require_boxed: bool = True
) -> Answer | None:
    """Returns what a completion gives as its answer outside of the thinking.

    None where there is no answer.

    Args:
        text: the completion, with the marks of its thinking.
        require_think: no answer counts without a closing mark of thinking before it.
        require_boxed: no answer counts outside a box; else the end of the text stands in for one.
    """
    spoken, is_closed = after_thinking(text)
    if require_think and not is_closed:
        return None

    spoken = spoken[-_MAX_SCANNED_CHARS:]
    boxed = _boxed(spoken)
    if boxed == "":
        return None  # a box that cannot be read is no answer, and neither is the text around it
    if boxed is not None:
        return Answer(boxed, True)
    if require_boxed:
        return None
    stated = _stated(spoken)
    if not stated:
        return None
    return Answer(stated, False)


def opened_thinking(prompt: str) -> str:
    """Returns the mark by which the template of a rendered prompt has opened the thinking.

    "" where it has not. A completion goes on from there: nothing in it is an answer until the
    thinking is closed.
    """
    for opening, _ in THINKING_MARKS:
        if prompt.rstrip().endswith(opening):
            return opening
    return ""


def after_thinking(text: str) -> tuple[str, bool]:
    """Returns the text outside of the thinking, and whether a thinking was closed."""
    is_closed = False
    for _, closing in THINKING_MARKS:
        _, mark, rest = text.rpartition(closing)
        if mark:
            text = rest
            is_closed = True
    for opening, _ in THINKING_MARKS:
        text = text.partition(opening)[0]
    return text, is_closed


def _boxed(text: str) -> str | None:
    """Returns what the last boxes hold.

    None without a box, "" where the last box is no answer that can be read.
    """
    boxes, unclosed = _boxes(text)
    last = len(boxes) - 1
    # An empty box at the end says nothing; the one before it may.
    while last >= 0 and not boxes[last].content:
        last -= 1
    end = 0
    if last >= 0:
        end = boxes[last].end
    if unclosed is not None and unclosed > end:
        return ""  # a later box was begun and never closed: the one before it was given up

    # All boxes are empty.
    if last < 0 and boxes:
        return ""
    if last < 0:
        return None

    # The boxes before it that belong to the same statement.
    contents = [boxes[last].content]
    start = boxes[last].start
    for box in reversed(boxes[max(last - _MAX_BOXES, 0) : last]):
        between = text[box.end : start]
        if not box.content or len(between) > _MAX_JOINT_CHARS:
            break
        joint = _JOINT.fullmatch(between)
        if joint is None:
            break
        words = (joint["words"] or "").lower().split()
        if not _TAKEN_BACK.isdisjoint(words):
            break

        # A box that says the same as the one behind it is the same answer once more.
        if box.content != contents[0]:
            contents.insert(0, box.content)
        start = box.start

    joined = ", ".join(contents)
    if len(joined) > MAX_ANSWER_CHARS:
        return ""
    return joined


def _boxes(text: str) -> tuple[list[_Box], int | None]:
    """Finds the boxes of a text.

    Returns:
        The innermost closed boxes in order; and where the last box begins that has a content but
        no end, None without such a box.
    """
    boxes: list[_Box] = []
    # For each open brace the start of its box's command, or -1, and where its content begins.
    stack: list[tuple[int, int]] = []

    # What is before the first box need not be walked.
    starts = [text.find(command) for command in ("\\boxed", "\\fbox", "\\framebox")]
    first = min((start for start in starts if start >= 0), default=len(text))
    for match in _BRACES.finditer(text, first):
        token = match[0]
        if token == "{":
            stack.append((-1, match.end()))
        elif token == "}":
            if not stack:
                continue
            start, inside = stack.pop()
            # Of boxes within each other the innermost counts.
            holds_a_box = bool(boxes) and boxes[-1].start > start
            if start >= 0 and not holds_a_box:
                boxes.append(_Box(start, match.end(), text[inside : match.start()].strip()))
        elif len(token) > 2:  # a box's command; the others are escapes
            if token.endswith("{"):
                stack.append((match.start(), match.end()))
            elif argument := _BARE_ARGUMENT.match(text, match.end()):
                boxes.append(_Box(match.start(), argument.end(), argument[1].rstrip(".")))

    end_of_text = len(text.rstrip())
    unclosed = [start for start, inside in stack if start >= 0 and inside < end_of_text]
    return boxes, max(unclosed, default=None)


def _stated(text: str) -> str:
    """Returns what a text without a box ends in.

    That is the sentence after its last "answer is", else its last formula or line.
    """
    tail = text[-MAX_ANSWER_CHARS:].strip()
    marks = list(_ANSWER_IS.finditer(tail))
    if not marks:
        formulas = _formulas(tail)
        if formulas:
            return formulas[-1]
        lines = tail.splitlines() or [""]
        return lines[-1].strip("* ")

    sentence = _SENTENCE_END.split(tail[marks[-1].end() :].strip(), maxsplit=1)[0]
    # "The largest $n$ is 34": a lone letter is what is asked for, not the answer.
    formulas = [
        formula for formula in _formulas(sentence) if len(formula) > 1 or not formula.isalpha()
    ]
    if formulas:
        return formulas[-1]
    lines = sentence.strip("* ").splitlines() or [""]
    return lines[0]


def _formulas(text: str) -> list[str]:
    """Returns what stands between the marks of mathematics, in order."""
    # The marks of each match are one of four kinds: the groups of the others are empty.
    return ["".join(groups).strip() for groups in _MATHEMATICS.findall(text)]
