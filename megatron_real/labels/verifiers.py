"""Verifiers by name: functions of one completion and its gold answers.

They run inside worker processes (worker.py).

A verifier may hang, crash or eat memory on hostile input; the worker's wall clock and memory limit
are what contain it. Reading the answer out of the completion is ours and takes linear time
(answers.py, normal_form.py); where comparing it needs algebra, that is math-verify's
(comparison.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_real.labels import gym
from megatron_real.labels.answers import Answer, final_answer
from megatron_real.labels.comparison import is_readable, same
from megatron_real.labels.forms import Form, Unreadable
from megatron_real.labels.normal_form import read, read_sentence
from megatron_real.labels.own import load_own

Result = tuple[str, float | None]
"""(status, reward): `ok` 1.0, `wrong` 0.0, `unparsable` None, or `score` with any number."""
Verifier = Callable[[str, Sequence[str], Mapping[str, Any]], Result]
"""(completion text, accepted answers, the row's metadata) -> Result."""


def exact(answer: Answer, golds: Sequence[str], _metadata: Mapping[str, Any]) -> Result:
    """The answer is one of the gold answers, letter by letter."""
    return ("ok", 1.0) if answer.text in {gold.strip() for gold in golds} else ("wrong", 0.0)


def math_verify(answer: Answer, golds: Sequence[str], _metadata: Mapping[str, Any]) -> Result:
    """The answer says what one of the gold answers says, as mathematics."""
    given = read(answer.text) if answer.boxed else read_sentence(answer.text)
    for gold in golds:
        boxed = final_answer(gold) if "\\boxed" in gold else None
        wanted = read(boxed.text if boxed else gold)
        spelled_alike = gold.strip() == answer.text and not _is_nothing(wanted)
        if spelled_alike or same(wanted, given):
            return "ok", 1.0
    return ("wrong", 0.0) if is_readable(given) else ("unparsable", None)


def _is_nothing(form: Form) -> bool:
    """NaN and the like: nobody can answer them."""
    return isinstance(form, Unreadable) and form.kind == "nothing"


def reasoning_gym(answer: Answer, golds: Sequence[str], metadata: Mapping[str, Any]) -> Result:
    """The task's own scorer, as gym.py lets it.

    The row's extra_info carries `source_dataset` and what it needs.
    """
    return "score", max(gym.score(answer.text, gold, metadata) for gold in golds)


_JUDGES: Mapping[str, Callable[[Answer, Sequence[str], Mapping[str, Any]], Result]] = {
    "math_verify": math_verify,
    "exact": exact,
    "reasoning_gym": reasoning_gym,
}
NAMES = (*_JUDGES, "code")
"""Verifiers that come with the project."""
WARM_UP = "</think>\\boxed{\\frac{\\sqrt{2}}{3}}"
"""A completion whose check imports and builds what the comparison of expressions needs."""


def check_name(name: str) -> None:
    """Raises ValueError unless `name` is a verifier's or names a Python file.

    Runs none of the file's code.
    """
    path, colon, _ = name.rpartition(":")
    if name not in NAMES and not colon:
        raise ValueError(
            f"labels.verifier is {name!r}; it takes one of {', '.join(NAMES)} or your own path.py:function"
        )
    if colon and not Path(path).is_file():
        raise ValueError(
            f"labels.verifier names {path!r}, which is no file; write path.py:function"
        )


def load(name: str, *, require_think: bool = False, require_boxed: bool = True) -> Verifier:
    """The verifier called `name`, or a user's own `path.py:function`, which is given the whole
    text.

    Not `code`, which needs a worker around it (worker.py).

    Raises:
        ValueError: there is no such verifier.
    """
    check_name(name)
    if name not in NAMES:
        return load_own(name)
    judge = _JUDGES[name]

    def verify(text: str, golds: Sequence[str], metadata: Mapping[str, Any]) -> Result:
        answer = final_answer(text, require_think=require_think, require_boxed=require_boxed)
        return judge(answer, golds, metadata) if answer else ("unparsable", None)

    return verify
