"""Verifiers by name: functions of one completion and its gold answers. They run inside worker processes (worker.py).

A verifier may hang, crash or eat memory on hostile input; the worker's wall clock and memory limit are what contain it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Result = tuple[str, float | None]
"""(status, reward): `ok` 1.0, `wrong` 0.0, `unparsable` None, or `score` with any number."""
Verifier = Callable[[str, Sequence[str], Mapping[str, Any]], Result]
"""(completion text, accepted answers, the row's metadata) -> Result."""

NAMES = ("math_verify", "exact", "reasoning_gym")

# No honest answer is longer, and parsers take more than linear time.
_MAX_ANSWER_CHARS = 1000
# Boxes without an end that are passed over: a text of nothing but \\boxed{ must not take quadratic time.
_MAX_UNCLOSED = 8


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is a verifier's or names a Python file. Runs none of the file's code."""
    path, colon, _ = name.rpartition(":")
    if name not in NAMES and not colon:
        raise ValueError(
            f"labels.verifier is {name!r}; it takes one of {', '.join(NAMES)} or your own path.py:function"
        )
    if colon and not Path(path).is_file():
        raise ValueError(f"labels.verifier names {path!r}, which is no file; write path.py:function")


def load(name: str) -> Verifier:
    """The verifier called `name`, or a user's own `path.py:function`.

    Raises:
        ValueError: there is no such verifier.
    """
    check_name(name)
    named = {"math_verify": math_verify, "exact": exact, "reasoning_gym": reasoning_gym}
    return named[name] if name in named else _own(*name.rsplit(":", 1))


def final_answer(text: str) -> str | None:
    """What the last complete \\boxed{...} after the last </think> holds; None where there is none."""
    text = text.rpartition("</think>")[2]
    end = len(text)
    for _ in range(_MAX_UNCLOSED):
        start = text.rfind("\\boxed{", 0, end)
        if start < 0:
            break
        inside = _balanced(text, start + len("\\boxed{"))
        if inside is not None:
            return inside.strip()
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


def exact(text: str, answers: Sequence[str], _metadata: Mapping[str, Any]) -> Result:
    """The boxed answer is one of the gold answers, letter by letter."""
    answer = final_answer(text)
    if answer is None:
        return "unparsable", None
    return ("ok", 1.0) if answer in {a.strip() for a in answers} else ("wrong", 0.0)


def math_verify(text: str, answers: Sequence[str], _metadata: Mapping[str, Any]) -> Result:
    """The boxed answer equals one of the gold answers as mathematics (math-verify)."""
    from math_verify import parse, verify

    answer = final_answer(text)
    if not answer:
        return "unparsable", None
    if answer in {a.strip() for a in answers}:
        return "ok", 1.0
    # Its own timeouts are SIGALRM; the worker's wall clock does that job for code that never returns as well.
    predicted = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not predicted:
        return "unparsable", None
    for gold in answers:
        if verify(parse(f"\\boxed{{{gold}}}", parsing_timeout=None), predicted, timeout_seconds=None):
            return "ok", 1.0
    return "wrong", 0.0


def reasoning_gym(text: str, answers: Sequence[str], metadata: Mapping[str, Any]) -> Result:
    """The task's own scorer; the row's extra_info carries `source_dataset` and what that scorer needs."""
    from reasoning_gym import get_score_answer_fn

    score = get_score_answer_fn(metadata["source_dataset"])
    entry = {"answer": answers[0], "metadata": dict(metadata)}
    return "score", float(score(final_answer(text), entry))


def _own(path: str, function: str) -> Verifier:
    spec = importlib.util.spec_from_file_location("own_verifier", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"labels.verifier names {path!r}, which is no Python file; write path.py:function")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        judge = getattr(module, function)
    except (OSError, AttributeError) as error:
        raise ValueError(f"labels.verifier: cannot take {function!r} from {path!r} ({error})") from error

    def verify(text: str, answers: Sequence[str], metadata: Mapping[str, Any]) -> Result:
        verdict = judge(text, answers, metadata)
        return (
            ("ok" if verdict else "wrong", float(verdict)) if isinstance(verdict, bool) else ("score", float(verdict))
        )

    return verify
