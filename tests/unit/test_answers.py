"""How answers are read and compared: a table of 99, generated spellings, and where in a text the
answer is looked for.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_real.labels import Labeller
from megatron_real.labels.answers import Answer, final_answer, opened_thinking
from megatron_real.labels.comparison import same
from megatron_real.labels.equivalence import GivenAnswer, answer_classes
from megatron_real.labels.normal_form import read
from megatron_real.labels.verifiers import load
from megatron_real.records import Completion, Prompt
from tests.unit.spellings import NUM_SPELLINGS, Pair, pairs

TABLE = Path(__file__).parents[1] / "golden" / "answers.jsonl"
NUM_DRAWN = 250
MAX_FALSE_NEGATIVE_SHARE = 0.01


def test_every_answer_of_the_table_is_judged_as_it_should_be() -> None:
    """Every row was once judged wrongly.

    A row whose expectation was open carries the reason of the decision.
    """
    verify = load("math_verify")
    rows = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]
    statuses = {row["id"]: verify(row["completion"], row["gold"], {})[0] for row in rows}
    assert len(rows) == 99
    assert statuses == {row["id"]: row["expected"] for row in rows}


def judged(every: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Returns the pairs that are falsely accepted and those that are falsely rejected."""
    verify = load("math_verify")
    positives = []
    negatives = []
    for pair in every:
        is_right = verify(pair.completion, [pair.gold], {})[0] == "ok"
        if is_right and not pair.agrees:
            positives.append(pair)
        if pair.agrees and not is_right:
            negatives.append(pair)
    return positives, negatives


def test_each_gold_has_twenty_spellings_of_either_sort() -> None:
    counts = Counter((pair.gold, pair.agrees) for pair in pairs())
    assert set(counts.values()) == {NUM_SPELLINGS}


def test_generated_pairs_drawn_at_random_are_judged_as_they_should_be() -> None:
    positives, negatives = judged(random.Random(0).sample(pairs(), NUM_DRAWN))
    assert not positives
    assert len(negatives) <= MAX_FALSE_NEGATIVE_SHARE * NUM_DRAWN


@pytest.mark.grid
def test_every_generated_pair_is_judged_as_it_should_be() -> None:
    every = pairs()
    positives, negatives = judged(every)
    assert not positives
    assert len(negatives) < MAX_FALSE_NEGATIVE_SHARE * sum(pair.agrees for pair in every), negatives


# What a completion gives as its answer. The last box counts, with those of the same statement.
BOXES = {
    "so \\boxed{5}": "5",
    "$\\boxed {5}$ and $\\fbox{6}$": "5, 6",
    "\\boxed 5 is it": "5",
    "\\boxed{5}. \\boxed{}": "5",
    "\\boxed{5}, so indeed \\boxed{5}": "5",
    "\\boxed{5} is wrong and \\boxed{6}": "6",
    "\\boxed{3} papers and \\boxed{5} bins": "3, 5",
    "x = \\boxed{3}, y = \\boxed{5}": "3, 5",
    "\\[\\boxed{-2} \\quad \\text{and} \\quad \\boxed{1}.\\]": "-2, 1",
    "first \\boxed{1}, a long while later, after much more thinking about it all, \\boxed{2}": "2",
    "\\boxed{\\boxed{5}}": "5",
    "\\\\boxed{5}": "5",
    "\\boxed{5} or rather \\boxed{6": None,
    "\\boxed{5} \\boxed{": "5",
    "\\boxed{" + "1" * 1001 + "}": None,
    "\\boxed{5} or \\boxed{" + "1" * 1001 + "}": None,
    "\\boxed{\\{1, 2\\}}": "\\{1, 2\\}",
    "\\boxed{\\text{}}": "\\text{}",
}


def text_of(answer: Answer | None) -> str | None:
    return None if answer is None else answer.text


@pytest.mark.parametrize("text", BOXES, ids=lambda text: text[:40])
def test_the_last_balanced_box_is_the_answer(text: str) -> None:
    answer = final_answer(text)
    assert text_of(answer) == BOXES[text]


ENDS = {
    "The answer is 5.": "5.",
    "**Answer:** 7\nThat was it.": "7",
    "#### 12": "12",
    "Final answer: the largest $n$ is $34$. I hope it is right.": "34",
    "We get $x = 3$": "x = 3",
    "nothing\nfive": "five",
    "": None,
}


@pytest.mark.parametrize("text", ENDS, ids=lambda text: text[:40])
def test_without_a_box_the_end_is_read(text: str) -> None:
    answer = final_answer(text, require_boxed=False)
    assert text_of(answer) == ENDS[text]


THINKING = {
    "<think>\\boxed{6}</think>\\boxed{5}": "5",
    "[THINK]\\boxed{6}[/THINK]\\boxed{5}": "5",
    "<seed:think>\\boxed{6}</seed:think>\\boxed{5}": "5",
    "\\boxed{6}</think>\\boxed{5}": "5",
    "<think>\\boxed{6}": None,
    "[THINK]\\boxed{6}": None,
    "\\boxed{5}<think>\\boxed{6}": "5",
}


@pytest.mark.parametrize("text", THINKING)
def test_thinking_is_no_answer(text: str) -> None:
    answer = final_answer(text)
    assert text_of(answer) == THINKING[text]


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("<|user|>2+3=<|assistant|><think>\n", "<think>"),
        ("<|assistant|>[THINK]", "[THINK]"),
        ("<|assistant|>", ""),
        ("<|assistant|><think>\n\n</think>\n\n", ""),
        ("what does <think> mean?<|assistant|>", ""),
    ],
)
def test_a_template_may_open_the_thinking(prompt: str, opened: str) -> None:
    assert opened_thinking(prompt) == opened


# Beyond the table: pairs (gold, answer, whether they agree) that a person decided.
DECIDED = [
    ("5", "x^2 = 5", False),  # the equation says that x is the root of 5
    ("5", "a + b = 5", True),  # it names what is 5
    ("3.14", "\\pi \\approx 3.14", True),
    ("\\pi", "\\pi \\approx 3.14", True),
    ("5", "4 \\approx 5", False),
    ("99", "99 \\approx 100", False),  # two guesses, neither of which is the other rounded
    ("100", "99 \\approx 99.5 \\approx 100", False),
    ("99.6", "99.5 \\approx 99.6 \\approx 100", False),
    ("2\\pi", "6.28 \\approx 2\\pi", True),
    ("1.23 \\times 10^6", "1234567 \\approx 1.23 \\times 10^6", True),
    ("3:4", "AB", False),
    ("yes", "5:6", False),
    ("x + y = 5", "5", False),  # the gold answer is an equation
    ("AB = 5", "5", True),
    ("0.5", "50\\%", True),
    ("50", "50\\%", True),
    ("(-1, 1)", "-1 < x < 1", True),
    ("-1 < x < 1", "-1, 1", False),
    ("-1 < x < 1", "-1 < y < 1", False),
    ("1,234", "1234", True),
    ("100,200,300", "100, 200, 300", True),
    ("(1,234)", "(1, 234)", True),
    ("a \\sin A", "A \\sin a", False),  # math-verify does not see the case of a letter
    ("\\frac{3}{2}", "3:2", True),
    ("10:30", "10:30 \\text{ AM}", True),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
     "\\left[\\begin{array}{c} 1 \\\\ 2 \\end{array}\\right]", True),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}", False),
    ("x = 1, y = 2", "y = 2, x = 1", True),
    ("x = 1, y = 2", "x = 2, y = 1", False),
    ("x = 1, y = 2", "1, 2", True),
    ("x = 1, y = 2", "2, 1", False),
    ("k\\pi, k \\in \\mathbb{Z}", "k \\pi \\text{ where } k \\in \\mathbb{Z}", True),
    ("\\log_2 3", "\\frac{\\ln 3}{\\ln 2}", True),
    ("15", "15%5", False),
    ("5 \\text{ m}^2", "5 \\text{ m}^{2}", True),
    ("nan", "nan", False),
    ("", "", False),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer", "agrees"), DECIDED, ids=str)
def test_decided_pairs_are_compared_as_decided(gold: str, answer: str, agrees: bool) -> None:
    assert same(read(gold), read(answer)) == agrees


@pytest.mark.parametrize(
    "piece",
    ["(", "((1,", "\\frac{", "\\frac", "{", "^", "^{", "[", "\\{", "1,", "1 ", ",", "\\text{", "|",
     "=", "_", "\\sqrt[", "or "],
    ids=str,
)  # fmt: skip
def test_reading_an_endless_repetition_returns(piece: str) -> None:
    assert read(piece * (1000 // len(piece))) is not None


def test_thinking_marks_that_are_special_tokens_stay_in_the_decoded_text() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    from megatron_real.rollout.engines.tokenizer import decoded

    words = ["<unk>", "<eos>", "<think>", "</think>", "six", "five"]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        eos_token="<eos>",
        additional_special_tokens=["<think>", "</think>"],
    )

    assert tokenizer.decode([2, 4, 3, 5, 1], skip_special_tokens=True) == "six five"
    assert decoded([2, 4, 3, 5, 1], tokenizer) == "<think>six</think>five"


def test_a_box_in_thinking_that_the_template_opened_is_no_answer() -> None:
    prompt = Prompt("p", "<|assistant|><think>\n", (1,), ("5",))
    texts = ["\\boxed{5}", "\\boxed{6}</think>\\boxed{5}"]
    with Labeller("math_verify", workers=1, timeout_seconds=60, memory_mib=1024) as label:
        verdicts = label([(prompt, Completion((7,), (0.0,), text, True)) for text in texts])
    assert [verdict.status for verdict in verdicts] == ["unparsable", "ok"]


def test_wrong_answers_vote_together_without_a_box_and_without_algebra() -> None:
    """Three texts say 6 and two say 5, which is right, so the majority is wrong."""
    texts = ["so it is 6", "6", "I think it is 6.0", "it is 5", "5"]
    given = [GivenAnswer(text, text.endswith("5"), comparable=False) for text in texts]
    classes = answer_classes(given, lambda one, other: False)
    assert classes == [0, 0, 0, 1, 1]
