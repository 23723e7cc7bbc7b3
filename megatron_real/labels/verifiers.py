"""Verifiers by name: functions of one completion and its gold answers. They run inside worker processes (worker.py).

A verifier may hang, crash or eat memory on hostile input; the worker's wall clock and memory limit are what contain it.
Reading the answer out of the completion is ours and takes linear time; comparing it is the verifier's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

Result = tuple[str, float | None]
"""(status, reward): `ok` 1.0, `wrong` 0.0, `unparsable` None, or `score` with any number."""
Verifier = Callable[[str, Sequence[str], Mapping[str, Any]], Result]
"""(completion text, accepted answers, the row's metadata) -> Result."""

# No honest answer is longer, and parsers take more than linear time.
_MAX_ANSWER_CHARS = 1000
# Boxes without an end that are passed over: a text of nothing but \\boxed{ must not take quadratic time.
_MAX_UNCLOSED = 8


class Answer(NamedTuple):
    """What a completion gives as its answer."""

    text: str
    """The contents of a box, or the end of the text."""
    boxed: bool
    """Whether it stood in a box."""


def final_answer(text: str, *, require_think: bool = False, require_boxed: bool = True) -> Answer | None:
    """What the last complete \\boxed{...} outside the thinking holds; None where there is no answer.

    Thinking ends at the last </think>; a <think> after it that is never closed is thinking too.

    Args:
        require_think: no answer without a </think>.
        require_boxed: no answer without a box; else the end of the text stands in for a missing box.
    """
    _, closed, rest = text.rpartition("</think>")
    if require_think and not closed:
        return None
    said = rest.partition("<think>")[0]
    boxed = _last_box(said)
    if boxed is None and not require_boxed:
        return _answer(said[-_MAX_ANSWER_CHARS:], boxed=False)
    return None if boxed is None else _answer(boxed, boxed=True)


def _answer(text: str, *, boxed: bool) -> Answer | None:
    return Answer(text.strip(), boxed) if text.strip() else None


def _last_box(text: str) -> str | None:
    end = len(text)
    for _ in range(_MAX_UNCLOSED):
        start = text.rfind("\\boxed{", 0, end)
        if start < 0:
            break
        inside = _balanced(text, start + len("\\boxed{"))
        if inside is not None:
            return inside
        end = start
    return None


def _balanced(text: str, start: int) -> str | None:
    """text[start:] up to the brace that closes the one before it; escaped braces do not count."""
    depth, i = 1, start
    while i < len(text) and i - start <= _MAX_ANSWER_CHARS:
        if text[i] == "\\":
            i += 1
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start:i]
        i += 1
    return None


def exact(answer: Answer, golds: Sequence[str], _metadata: Mapping[str, Any]) -> Result:
    """The answer is one of the gold answers, letter by letter."""
    return ("ok", 1.0) if answer.text in {gold.strip() for gold in golds} else ("wrong", 0.0)


def math_verify(answer: Answer, golds: Sequence[str], _metadata: Mapping[str, Any]) -> Result:
    """The answer equals one of the gold answers as mathematics (math-verify)."""
    from math_verify import parse, verify

    if exact(answer, golds, _metadata)[0] == "ok":
        return "ok", 1.0
    # "5." is a whole number at the end of a sentence, which math-verify takes for something else.
    text = answer.text.rstrip(".")
    # Its own timeouts are SIGALRM; the worker's wall clock does that job for code that never returns as well.
    predicted = parse(_box(text) if answer.boxed else text, parsing_timeout=None)
    if not predicted:
        return "unparsable", None
    for gold in golds:
        if verify(parse(_box(gold), parsing_timeout=None), predicted, timeout_seconds=None):
            return "ok", 1.0
    return "wrong", 0.0


def _box(text: str) -> str:
    return f"\\boxed{{{text}}}"


def reasoning_gym(answer: Answer, golds: Sequence[str], metadata: Mapping[str, Any]) -> Result:
    """The task's own scorer; the row's extra_info carries `source_dataset` and what that scorer needs."""
    from reasoning_gym import get_score_answer_fn

    score = get_score_answer_fn(metadata["source_dataset"])
    return "score", max(float(score(answer.text, {"answer": gold, "metadata": dict(metadata)})) for gold in golds)


_JUDGES: Mapping[str, Callable[[Answer, Sequence[str], Mapping[str, Any]], Result]] = {
    "math_verify": math_verify,
    "exact": exact,
    "reasoning_gym": reasoning_gym,
}
NAMES = tuple(_JUDGES)
"""Verifiers that come with the project."""


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is a verifier's or names a Python file. Runs none of the file's code."""
    path, colon, _ = name.rpartition(":")
    if name not in NAMES and not colon:
        raise ValueError(
            f"labels.verifier is {name!r}; it takes one of {', '.join(NAMES)} or your own path.py:function"
        )
    if colon and not Path(path).is_file():
        raise ValueError(f"labels.verifier names {path!r}, which is no file; write path.py:function")


def load(name: str, *, require_think: bool = False, require_boxed: bool = True) -> Verifier:
    """The verifier called `name`, or a user's own `path.py:function`, which is given the whole text.

    Raises:
        ValueError: there is no such verifier.
    """
    check_name(name)
    if name not in NAMES:
        return _own(*name.rsplit(":", 1))
    judge = _JUDGES[name]

    def verify(text: str, golds: Sequence[str], metadata: Mapping[str, Any]) -> Result:
        answer = final_answer(text, require_think=require_think, require_boxed=require_boxed)
        return judge(answer, golds, metadata) if answer else ("unparsable", None)

    return verify


def _own(path: str, function: str) -> Verifier:
    spec = importlib.util.spec_from_file_location("own_verifier", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"labels.verifier names {path!r}, which is no Python file; write path.py:function")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(judge := getattr(module, function, None)):
        raise ValueError(f"labels.verifier: {path!r} has no function {function!r}")

    def verify(text: str, golds: Sequence[str], metadata: Mapping[str, Any]) -> Result:
        verdict = judge(text, golds, metadata)
        if isinstance(verdict, bool):
            return ("ok", 1.0) if verdict else ("wrong", 0.0)
        return "score", float(verdict)

    return verify
