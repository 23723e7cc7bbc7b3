"""Answers that say the same, for the majority vote: 1/2 and 0.5 vote together."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_real.labels.normal_form import read_sentence

# Longer ones are the verifier's: int() of a text takes more than linear time.
_WHOLE = re.compile(r"-?\d{1,18}")


@dataclass(frozen=True)
class GivenAnswer:
    """What one completion gave as its answer."""

    text: str | None
    """The answer; None where there is none, which does not vote."""
    correct: bool
    """The verifier's label."""
    comparable: bool = True
    """False where the verifier failed on it or cannot read it: then it is the same as its own text
    and as nothing else."""


def answer_classes(
    given: Sequence[GivenAnswer], same: Callable[[str, str], bool], *, one_gold: bool = True
) -> list[int | None]:
    """Sorts the answers to one problem into classes of answers that say the same.

    A class is all correct or all wrong. Its first answer speaks for it: an answer joins the first
    class whose first answer it is the same as.

    Args:
        given: the answers.
        same: the verifier's comparison; only asked where neither text, normal form nor whole
            numbers tell.
        one_gold: the problem has one gold answer, so that all correct ones are the same.

    Returns:
        [given] number of the class of each, in order of appearance; None for no answer.
    """
    speakers: list[GivenAnswer] = []
    class_of: dict[GivenAnswer, int] = {}
    for answer in given:
        if answer.text is None or answer in class_of:
            continue
        for number, speaker in enumerate(speakers):
            if _is_same(speaker, answer, same, one_gold):
                class_of[answer] = number
                break
        else:
            class_of[answer] = len(speakers)
            speakers.append(answer)
    return [class_of.get(answer) for answer in given]


def _is_same(
    speaker: GivenAnswer, answer: GivenAnswer, same: Callable[[str, str], bool], one_gold: bool
) -> bool:
    """Compares an answer with that of a class, the cheapest comparison first."""
    assert speaker.text is not None and answer.text is not None, "no answer has no class"
    if speaker.correct != answer.correct:
        return False
    if speaker.text == answer.text or (speaker.correct and one_gold):
        return True
    if read_sentence(speaker.text) == read_sentence(answer.text):
        return True
    if not (speaker.comparable and answer.comparable):
        return False
    # Whole numbers are compared here: the verifier may take as long as algebra takes.
    if _WHOLE.fullmatch(speaker.text) and _WHOLE.fullmatch(answer.text):
        return int(speaker.text) == int(answer.text)
    return same(speaker.text, answer.text)
