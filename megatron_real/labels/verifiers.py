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
from megatron_real.labels.forms import Unreadable
from megatron_real.labels.normal_form import read, read_sentence
from megatron_real.labels.own import load_own

Result = tuple[str, float | None]
"""(status, reward): `ok` 1.0, `wrong` 0.0, `unparsable` None, or `score` with any number."""
Verifier = Callable[[str, Sequence[str], Mapping[str, Any]], Result]
"""(completion text, accepted answers, the row's metadata) -> Result."""


def exact(answer: Answer, golds: Sequence[str], _metadata: Mapping[str, Any]) -> Result:
    """Judges whether the answer is one of the gold answers, letter by letter."""
    if answer.text in [gold.strip() for gold in golds]:
        return "ok", 1.0
    return "wrong", 0.0


def math_verify(answer: Answer, golds: Sequence[str], _metadata: Mapping[str, Any]) -> Result:
    """Judges whether the answer says what one of the gold answers says, as mathematics."""
    if answer.boxed:
        answer_form = read(answer.text)
    else:
        answer_form = read_sentence(answer.text)

    for gold in golds:
        # A gold answer may be a whole solution with a box.
        boxed = None
        if "\\boxed" in gold:
            boxed = final_answer(gold)
        gold_form = read(boxed.text if boxed else gold)
        # NaN and the like are no answer that anybody could match.
        is_nothing = isinstance(gold_form, Unreadable) and gold_form.kind == "nothing"
        is_spelled_alike = gold.strip() == answer.text and not is_nothing
        if is_spelled_alike or same(gold_form, answer_form):
            return "ok", 1.0

    if not is_readable(answer_form):
        return "unparsable", None
    return "wrong", 0.0


def reasoning_gym(answer: Answer, golds: Sequence[str], metadata: Mapping[str, Any]) -> Result:
    """Judges by the task's own scorer, as gym.py lets it.

    The row's extra_info carries `source_dataset` and what the scorer needs.
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
            f"labels.verifier is {name!r}; it takes one of {', '.join(NAMES)} or your own "
            "path.py:function"
        )
    if colon and not Path(path).is_file():
        raise ValueError(
            f"labels.verifier names {path!r}, which is no file; write path.py:function"
        )


def load(name: str, *, require_think: bool = False, require_boxed: bool = True) -> Verifier:
    """Returns the verifier called `name`, or a user's own `path.py:function`.

    A user's own is given the whole text, the others the answer in it. Not `code`, which needs a
    worker around it (worker.py).

    Raises:
        ValueError: there is no such verifier.
    """
    check_name(name)
    if name not in NAMES:
        return load_own(name)
    judge = _JUDGES[name]

    def verify(text: str, golds: Sequence[str], metadata: Mapping[str, Any]) -> Result:
        answer = final_answer(text, require_think=require_think, require_boxed=require_boxed)
        if answer is None:
            return "unparsable", None
        return judge(answer, golds, metadata)

    return verify
