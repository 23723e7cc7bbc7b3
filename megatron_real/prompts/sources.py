r"""The paper's training sets and benchmarks: where they are published, and how a row is read.

One table, `SOURCES`. A published file comes in one of the table's forms; each row becomes

    {"data_source": "aime24", "prompt": [{"role": "user", "content": "..."}], "ability": "math",
     "reward_model": {"style": "rule", "ground_truth": "204"},
     "extra_info": {"split": "test", "index": 7}}

The question is bare: an instruction that the publisher wrote around it is taken off, since
`data.suffix` adds the run's own. A gold answer is text; a list means that any one of them is
accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_real.labels.answers import final_answer
from megatron_real.prompts.rows import is_unicode


@dataclass(frozen=True)
class PublishedForm:
    """Columns of one published form of a dataset. A dot goes into a nested column."""

    question: str
    """Text, or a list of chat messages of which the last one counts."""
    answer: str
    """Text, a number, or a list."""
    answer_is: Literal["plain", "boxed", "parts"] = "plain"
    r"""`boxed`: the last \boxed{} of a solution; `parts`: a list whose entries are all asked for
    together."""
    context: str = ""
    """Text that goes before the question, where the row has it."""


@dataclass(frozen=True)
class PublishedDataset:
    """One dataset."""

    name: str
    """Its name here, and the prepared file's."""
    split: Literal["train", "test"]
    """`train`: deduplicated and kept clear of the benchmarks; `test`: a benchmark, whose questions
    all stay."""
    rows: int
    """Published questions, those of a training set before deduplication."""
    hub: str
    """Dataset on the Hugging Face hub that has them."""
    files: tuple[str, ...]
    """Its files, as patterns."""
    forms: tuple[PublishedForm, ...]
    """Its published forms; a row is read by the first whose columns it has."""
    integer: bool = False
    """Every answer is a whole number: "033", 33.0 and "33^\\circ" all mean 33."""


_DAPO_ORIGINAL = PublishedForm("prompt", "reward_model.ground_truth")
_PROBLEM = PublishedForm("problem", "answer")
_QUESTION = PublishedForm("question", "answer")
_SOLVED = PublishedForm("problem", "solution", answer_is="boxed")

SOURCES: tuple[PublishedDataset, ...] = (
    PublishedDataset(
        "deepscaler", "train", 40315, "agentica-org/DeepScaleR-Preview-Dataset", ("*.json",),
        (_PROBLEM, _DAPO_ORIGINAL),
    ),
    # The published parquet has each of 17,398 questions about a hundred times.
    PublishedDataset(
        "dapo", "train", 17398, "BytedTsinghua-SIA/DAPO-Math-17k", ("data/*.parquet",),
        # The latter is that of open-r1/DAPO-Math-17k-Processed.
        (_DAPO_ORIGINAL, PublishedForm("prompt", "solution")),
    ),
    PublishedDataset(
        "aime24", "test", 30, "HuggingFaceH4/aime_2024", ("data/*.parquet",),
        # The second is that of Maxwell-Jia/AIME_2024, the third that of math-ai/aime24.
        (_PROBLEM, PublishedForm("Problem", "Answer"), _SOLVED, _DAPO_ORIGINAL),
        integer=True,
    ),
    PublishedDataset(
        "aime25", "test", 30, "opencompass/AIME2025", ("*.jsonl",),
        # MathArena, yentinglin/aime_2025 and math-ai/aime25 have the second.
        (_QUESTION, _PROBLEM, _SOLVED, _DAPO_ORIGINAL),
        integer=True,
    ),
    PublishedDataset(
        "math500", "test", 500, "HuggingFaceH4/MATH-500", ("test.jsonl",),
        (_PROBLEM, _SOLVED, _DAPO_ORIGINAL),
    ),
    # The paper's 83 questions are those of 2022 and 2023; math-ai/amc23 has 40 of them.
    PublishedDataset(
        "amc23", "test", 83, "AI-MO/aimo-validation-amc", ("data/*.parquet",),
        (_PROBLEM, _QUESTION, _DAPO_ORIGINAL),
    ),
    PublishedDataset(
        "minerva", "test", 272, "math-ai/minervamath", ("*.jsonl", "**/*.parquet"),
        # The others are those of knoveleng/Minerva-Math and of Qwen2.5-Math's test.jsonl.
        (_QUESTION, _PROBLEM, _SOLVED, _DAPO_ORIGINAL),
    ),
    # 674 on the hub; the file of Qwen2.5-Math's evaluation, which the paper counts, has one more.
    PublishedDataset(
        "olympiadbench", "test", 675, "Hothan/OlympiadBench",
        ("OlympiadBench/OE_TO_maths_en_COMP/*.parquet",),
        (
            PublishedForm("question", "final_answer", answer_is="parts", context="context"),
            _QUESTION, _PROBLEM, _DAPO_ORIGINAL,
        ),
    ),
)  # fmt: skip
BY_NAME: Mapping[str, PublishedDataset] = {source.name: source for source in SOURCES}

# What publishers wrote around a question, as (before, after).
_INSTRUCTIONS = (
    (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.",
        'Remember to put your answer on its own line after "Answer:".',
    ),
    ("", "Let's think step by step and output the final answer within \\boxed{}."),
    ("", "Please reason step by step, and put your final answer within \\boxed{}."),
)
_DEGREES = re.compile(r"\s*(\^\s*(\\circ|\{\s*\\circ\s*\})|\N{DEGREE SIGN})\s*$")
_MARKUP = re.compile(r"(?<!\\)\$|\\[()\[\]]")


class Unusable(ValueError):
    """A row that cannot be a problem.

    The message is the reason, the same for all rows of its kind.
    """


def prepared(source: PublishedDataset, raw: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns a published row in the one schema.

    Args:
        source: of the row.
        raw: the row as it is published.
        index: its number in the published file.

    Raises:
        Unusable: with the reason for which the row is dropped.
    """
    forms = [form for form in source.forms if _column(raw, form.question) is not None]
    if not forms:
        raise Unusable("no question")
    # Of the forms whose question is there, one whose answer is there as well.
    forms = [form for form in forms if _column(raw, form.answer) is not None]
    if not forms:
        raise Unusable("no answer")
    # OlympiadBench says so of its questions.
    if raw.get("modality") == "Multimodal":
        raise Unusable("needs an image")

    question = _question(raw, forms[0])
    golds = _golds(raw, forms[0])
    if not question:
        raise Unusable("no question")
    if not is_unicode(question) or not all(map(is_unicode, golds)):
        raise Unusable("half a surrogate pair, which is no text")
    if source.integer:
        golds = [_whole(gold) for gold in golds]
    if not golds or not all(golds):
        raise Unusable("no answer")

    extra: dict[str, Any] = {"split": source.split, "index": index}
    published_id = (raw.get("extra_info") or {}).get("index")
    for column in ("ID", "id", "unique_id"):  # the last one that is there
        if raw.get(column) is not None:
            published_id = raw[column]
    if published_id is not None:
        extra["published_id"] = str(published_id)

    return {
        "data_source": source.name,
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": golds if len(golds) > 1 else golds[0]},
        "extra_info": extra,
    }


def _column(raw: Mapping[str, Any], path: str) -> Any:
    """Returns the value at `path`, whose dots go into nested columns; None where there is none."""
    value: Any = raw
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    return value


def _question(raw: Mapping[str, Any], form: PublishedForm) -> str:
    """Returns the bare question, with its context before it; "" where there is none."""
    value = _column(raw, form.question)
    if isinstance(value, list) and value:
        value = value[-1].get("content")
    text = str(value or "").strip()
    # The run adds its own suffix: with both, the answer would be asked for in two ways.
    for before, after in _INSTRUCTIONS:
        if text.startswith(before) and text.endswith(after):
            text = text[len(before) : len(text) - len(after)].strip()

    context = ""
    if form.context:
        context = str(_column(raw, form.context) or "").strip()
    if not context or not text:
        return text
    return f"{context}\n\n{text}"


def _golds(raw: Mapping[str, Any], form: PublishedForm) -> list[str]:
    """Returns the accepted answers, without the marks that only say that they are mathematics."""
    value = _column(raw, form.answer)
    if form.answer_is == "boxed":
        boxed = final_answer(str(value))
        value = None
        if boxed:
            value = boxed.text

    if not isinstance(value, list):
        value = [value]

    golds: list[str] = []
    for gold in value:
        if gold is None:
            continue
        if isinstance(gold, float) and gold.is_integer():
            gold = int(gold)  # AMC's 142.0
        text = _MARKUP.sub("", str(gold)).strip()
        if text:
            golds.append(text)

    if form.answer_is == "parts" and golds:
        return [", ".join(golds)]
    return golds


def _whole(gold: str) -> str:
    """Returns the whole number that `gold` is.

    Raises:
        Unusable: it is none.
    """
    try:
        # A comma can only separate thousands: every answer of these sets is one whole number.
        value = float(_DEGREES.sub("", gold).replace(",", ""))
    except ValueError:
        raise Unusable("the answer is not a whole number") from None
    if not value.is_integer():
        raise Unusable("the answer is not a whole number")
    return str(int(value))
