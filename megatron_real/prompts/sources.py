r"""The paper's training sets and benchmarks: where each is published, which columns it has, and how a row is read.

One table, `SOURCES`. A published file comes in one of the table's layouts; each row becomes

    {"data_source": "aime24", "prompt": [{"role": "user", "content": "..."}], "ability": "math",
     "reward_model": {"style": "rule", "ground_truth": "204"}, "extra_info": {"split": "test", "index": 7}}

The question is bare: an instruction that the publisher wrote around it is taken off, since `data.suffix` adds the run's
own. A gold answer is text; a list means that any one of them is accepted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_real.labels.answers import final_answer
from megatron_real.prompts.rows import is_unicode


@dataclass(frozen=True)
class Layout:
    """Columns of one published form of a dataset. A dot goes into a nested column."""

    question: str
    """Text, or a list of chat messages of which the last one counts."""
    answer: str
    """Text, a number, or a list."""
    answer_is: Literal["plain", "boxed", "parts"] = "plain"
    r"""`boxed`: the last \boxed{} of a solution; `parts`: a list whose entries are all asked for together."""
    context: str = ""
    """Text that goes before the question, where the row has it."""


@dataclass(frozen=True)
class Source:
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
    layouts: tuple[Layout, ...]
    """Its published forms; a row is read by the first whose columns it has."""
    integer: bool = False
    """Every answer is a whole number: "033", 33.0 and "33^\\circ" all mean 33."""


_DAPO_ORIGINAL = Layout("prompt", "reward_model.ground_truth")
_PROBLEM = Layout("problem", "answer")
_QUESTION = Layout("question", "answer")
_SOLVED = Layout("problem", "solution", answer_is="boxed")

SOURCES: tuple[Source, ...] = (
    Source(
        "deepscaler", "train", 40315, "agentica-org/DeepScaleR-Preview-Dataset", ("*.json",),
        (_PROBLEM, _DAPO_ORIGINAL),
    ),
    # The published parquet has each of 17,398 questions about a hundred times.
    Source(
        "dapo", "train", 17398, "BytedTsinghua-SIA/DAPO-Math-17k", ("data/*.parquet",),
        (_DAPO_ORIGINAL, Layout("prompt", "solution")),  # the latter: open-r1/DAPO-Math-17k-Processed
    ),
    Source(
        "aime24", "test", 30, "HuggingFaceH4/aime_2024", ("data/*.parquet",),
        (_PROBLEM, Layout("Problem", "Answer"), _SOLVED, _DAPO_ORIGINAL),  # Maxwell-Jia/AIME_2024, math-ai/aime24
        integer=True,
    ),
    Source(
        "aime25", "test", 30, "opencompass/AIME2025", ("*.jsonl",),
        (_QUESTION, _PROBLEM, _SOLVED, _DAPO_ORIGINAL),  # MathArena, yentinglin/aime_2025 and math-ai/aime25: _PROBLEM
        integer=True,
    ),
    Source(
        "math500", "test", 500, "HuggingFaceH4/MATH-500", ("test.jsonl",),
        (_PROBLEM, _SOLVED, _DAPO_ORIGINAL),
    ),
    # The paper's 83 questions are those of 2022 and 2023; math-ai/amc23 has 40 of them.
    Source(
        "amc23", "test", 83, "AI-MO/aimo-validation-amc", ("data/*.parquet",),
        (_PROBLEM, _QUESTION, _DAPO_ORIGINAL),
    ),
    Source(
        "minerva", "test", 272, "math-ai/minervamath", ("*.jsonl", "**/*.parquet"),
        (_QUESTION, _PROBLEM, _SOLVED, _DAPO_ORIGINAL),  # knoveleng/Minerva-Math, Qwen2.5-Math's test.jsonl
    ),
    # 674 on the hub; the file of Qwen2.5-Math's evaluation, which the paper counts, has one more.
    Source(
        "olympiadbench", "test", 675, "Hothan/OlympiadBench", ("OlympiadBench/OE_TO_maths_en_COMP/*.parquet",),
        (
            Layout("question", "final_answer", answer_is="parts", context="context"),
            _QUESTION, _PROBLEM, _DAPO_ORIGINAL,
        ),
    ),
)  # fmt: skip
BY_NAME: Mapping[str, Source] = {source.name: source for source in SOURCES}

# What publishers wrote around a question, as (before, after).
_INSTRUCTIONS = (
    (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
        "$Answer (without quotes) where $Answer is the answer to the problem.",
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


def prepared(source: Source, raw: Mapping[str, Any], index: int) -> dict[str, Any]:
    """The row in the one schema.

    Raises:
        Unusable: with the reason for which the row is dropped.
    """
    layout = next((form for form in source.layouts if _has(raw, form)), None)
    if layout is None:
        raise Unusable(_what_is_missing(source, raw))
    if raw.get("modality") == "Multimodal":
        raise Unusable("needs an image")
    question, golds = _question(raw, layout), _golds(raw, layout)
    if not question:
        raise Unusable("no question")
    if not is_unicode(question) or not all(map(is_unicode, golds)):
        raise Unusable("half a surrogate pair, which is no text")
    if source.integer:
        golds = [_whole(gold) for gold in golds]
    if not golds or not all(golds):
        raise Unusable("no answer")
    extra = {"split": source.split, "index": index}
    known = raw.get("extra_info") or {}
    published = next(
        (raw[c] for c in ("unique_id", "id", "ID") if raw.get(c) is not None), known.get("index")
    )
    return {
        "data_source": source.name,
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": golds if len(golds) > 1 else golds[0]},
        "extra_info": extra if published is None else {**extra, "published_id": str(published)},
    }


def _column(raw: Mapping[str, Any], path: str) -> Any:
    found: Any = raw
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _has(raw: Mapping[str, Any], layout: Layout) -> bool:
    return _column(raw, layout.question) is not None and _column(raw, layout.answer) is not None


def _what_is_missing(source: Source, raw: Mapping[str, Any]) -> str:
    if any(_column(raw, form.question) is not None for form in source.layouts):
        return "no answer"
    return "no question"


def _question(raw: Mapping[str, Any], layout: Layout) -> str:
    found = _column(raw, layout.question)
    text = str(
        found[-1].get("content") or "" if isinstance(found, list) and found else found or ""
    ).strip()
    for before, after in _INSTRUCTIONS:
        if text.startswith(before) and text.endswith(after):
            text = text[len(before) : len(text) - len(after)].strip()
    context = str(_column(raw, layout.context) or "").strip() if layout.context else ""
    return f"{context}\n\n{text}" if context and text else text


def _golds(raw: Mapping[str, Any], layout: Layout) -> list[str]:
    """The accepted answers, without the markup that only says that they are mathematics."""
    found = _column(raw, layout.answer)
    if layout.answer_is == "boxed":
        boxed = final_answer(str(found))
        found = boxed.text if boxed else None
    listed = [_text(gold) for gold in (found if isinstance(found, list) else [found])]
    golds = [gold for gold in listed if gold]
    return [", ".join(golds)] if layout.answer_is == "parts" and golds else golds


def _text(gold: Any) -> str:
    if isinstance(gold, float) and gold.is_integer():
        return str(int(gold))  # AMC's 142.0
    return "" if gold is None else _MARKUP.sub("", str(gold)).strip()


def _whole(gold: str) -> str:
    """The whole number that `gold` is."""
    try:
        value = float(_DEGREES.sub("", gold).replace(",", ""))
    except ValueError:
        value = 0.5
    if not value.is_integer():
        raise Unusable("the answer is not a whole number")
    return str(int(value))
