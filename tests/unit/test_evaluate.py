"""Figures of an evaluation: golden values by hand, brute force, and what its directory refuses."""

from __future__ import annotations

import csv
import json
import math
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_real.commands.subject import results_name
from megatron_real.evaluation.directory import BENCH, Chunk, EvaluationDirectory, average
from megatron_real.evaluation.figures import (
    Evaluation,
    Judged,
    majority,
    pass_at_k,
    standard_error,
    summarise,
)
from megatron_real.labels.equivalence import GivenAnswer, answer_classes
from megatron_real.records import Completion, Label, Prompt, Rollout, Status, Verdict


def judge(
    problem: str, correct: bool, answer: int | None, *, status: str = "", tokens: int = 4
) -> Judged:
    return Judged(problem, status or ("ok" if correct else "wrong"), correct, tokens, answer)


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_all_subsets(samples: int) -> None:
    for correct in range(samples + 1):
        marks = [True] * correct + [False] * (samples - correct)
        for k in range(1, samples + 1):
            drawn = [any(subset) for subset in combinations(marks, k)]
            assert pass_at_k(correct, samples, k) == pytest.approx(
                Fraction(sum(drawn), len(drawn)), abs=1e-15
            )


def test_pass_at_k_of_2000_samples_is_exact() -> None:
    """With 1 of 2000 correct, pass@1000 is one half; the naive 1 - (1999/2000)^1000
    would be 0.39.
    """
    assert pass_at_k(1, 2000, 1000) == pytest.approx(0.5, abs=1e-12)


# Answer 0 is correct. Votes: 0 has 2, 1 has 1 -> 1. 1 has 2 -> 0. A tie of right and wrong -> 1/2;
# of right and two wrong ones -> 1/3. Who has no answer does not vote. Nobody votes -> 0.
VOTES: dict[str, tuple[list[tuple[bool, int | None]], float]] = {
    "right": ([(True, 0), (True, 0), (False, 1)], 1.0),
    "wrong": ([(True, 0), (False, 1), (False, 1)], 0.0),
    "tie": ([(True, 0), (False, 1)], 1 / 2),
    "three-way": ([(False, 1), (True, 0), (False, 2)], 1 / 3),
    "abstentions": ([(True, 0), (False, None), (False, None)], 1.0),
    "nobody": ([(False, None), (False, None)], 0.0),
}


@pytest.mark.parametrize("case", VOTES)
def test_majority_accuracy_equals_that_computed_by_hand(case: str) -> None:
    votes, expected = VOTES[case]
    assert majority([judge("p", correct, answer) for correct, answer in votes]) == pytest.approx(
        expected
    )


def test_the_figures_equal_those_computed_by_hand() -> None:
    """Two problems, four samples: 3 of 4 and 1 of 4 correct.

    pass@1 = 1/2. Shares 3/4 and 1/4: variance 1/8 (n - 1 = 1), standard error sqrt(1/8 / 2) = 1/4.
    pass@2 = mean of 1 - C(1,2)/C(4,2) = 1 and 1 - C(3,2)/C(4,2) = 1/2, so 3/4. pass@4 = 1.
    Majority: 3 votes for the right answer -> 1; one right vote against two wrong of a kind -> 0;
    mean 1/2.
    """
    summary = summarise(
        [
            *(judge("p", True, 0, tokens=2) for _ in range(3)),
            judge("p", False, None, status="unparsable", tokens=2),
            judge("q", True, 0, tokens=10),
            judge("q", False, 1, status="timeout", tokens=10),
            judge("q", False, 1, tokens=10),
            judge("q", False, None, status="overlong", tokens=18),
        ],
        vote=True,
    )

    assert summary == Evaluation(
        pass_at_1=0.5,
        standard_error=0.25,
        pass_at_k=((1, 0.5), (2, 0.75), (4, 1.0)),
        majority=0.5,
        problems=2,
        samples=4,
        failed_checks=1,
        unanswered_share=1 / 8,
        truncated_share=1 / 8,
        response_tokens_mean=7.0,
        correct=(("p", 3), ("q", 1)),
    )


def test_a_number_of_samples_that_is_no_power_of_two_is_a_k_of_its_own() -> None:
    summary = summarise([judge("p", i == 0, None) for i in range(6)])
    assert [k for k, _ in summary.pass_at_k] == [1, 2, 4, 6] and summary.majority is None
    assert math.isnan(summary.standard_error), (
        "the spread over problems of one problem is not known"
    )


def test_unequal_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="equally many completions"):
        summarise([judge("p", True, 0), judge("p", True, 0), judge("q", True, 0)])
    with pytest.raises(ValueError, match="no completion to evaluate"):
        summarise([])


@given(st.lists(st.floats(0, 1), min_size=2, max_size=50))
def test_standard_error_is_that_of_the_textbook(shares: list[float]) -> None:
    import statistics

    assert standard_error(shares) == pytest.approx(
        statistics.stdev(shares) / math.sqrt(len(shares)), abs=1e-12
    )


def halves(one: str, other: str) -> bool:
    """Compares fractions, as a verifier would."""
    return Fraction(one) == Fraction(other)


def never(one: str, other: str) -> bool:
    raise AssertionError(f"{one} and {other} need no verifier")


def test_answers_that_say_the_same_are_one_class() -> None:
    given = [GivenAnswer(text, correct=False) for text in ("1/2", "3", "0.5", "2/4", "3.0")]
    assert answer_classes(given, halves) == [0, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("given", "classes"),
    [
        (
            [
                GivenAnswer("7", False),
                GivenAnswer("07", False),
                GivenAnswer("8", False),
                GivenAnswer("-7", False),
            ],
            [0, 0, 1, 2],
        ),
        ([GivenAnswer("x+1", True), GivenAnswer("1+x", True), GivenAnswer("x", False)], [0, 0, 1]),
        (
            [GivenAnswer(None, False), GivenAnswer("7", False), GivenAnswer(None, False)],
            [None, 0, None],
        ),
        (
            [
                GivenAnswer("9^9", False, comparable=False),
                GivenAnswer("x", False),
                GivenAnswer("9^9", False, comparable=False),
            ],
            [0, 1, 0],
        ),
    ],
    ids=["whole numbers", "one gold", "no answer", "the check failed"],
)
def test_equal_texts_and_failed_checks_need_no_verifier(
    given: list[GivenAnswer], classes: list[int | None]
) -> None:
    assert answer_classes(given, never) == classes


def test_right_and_wrong_answers_never_vote_together() -> None:
    given = [
        GivenAnswer("1/2", True),
        GivenAnswer("0.5", False),
        GivenAnswer("3", True),
        GivenAnswer("3.0", True),
    ]
    assert answer_classes(given, halves, one_gold=False) == [0, 1, 2, 2]


def rollout(uid: str, sample: int, label: int, text: str) -> Rollout:
    verdict = Verdict(Status.OK if label else Status.WRONG, Label(label), float(label))
    return Rollout(
        Prompt(uid, "", (1,), ("5",)),
        0,
        sample,
        Completion((7, 8), (0.0, 0.0), text, True),
        verdict,
    )


ROLLOUTS = [
    rollout("a/0", 0, 1, "\\boxed{5}"),
    rollout("a/0", 1, 0, "half a pair \ud83d and \u2028 \\boxed{6}"),
]
CHUNK = Chunk("a", 0, [ROLLOUTS[0].prompt])
SETTINGS = {
    "evaluation.temperature": 0.6,
    "labels.overlong": "negative",
    "of two": (1, 2),
    f"{BENCH}a": "12ab",
}


def test_a_chunk_reads_back(tmp_path: Path) -> None:
    directory = EvaluationDirectory(tmp_path)
    assert not directory.has(CHUNK)

    directory.write(CHUNK, ROLLOUTS, [("5", 0), ("6", 1)])
    assert directory.has(CHUNK)
    assert directory.read([CHUNK]) == [
        Judged("a/0", "ok", True, 2, 0),
        Judged("a/0", "wrong", False, 2, 1),
    ]

    (row, other) = [
        json.loads(line)
        for line in (tmp_path / "samples/a/chunk-0000.jsonl").read_text().splitlines()
    ]

    assert (row["completion"], row["answer"], row["golds"]) == ("\\boxed{5}", "5", ["5"])
    assert other["completion"] == ROLLOUTS[1].completion.text


def test_a_broken_chunk_is_named(tmp_path: Path) -> None:
    directory = EvaluationDirectory(tmp_path)
    directory.write(CHUNK, ROLLOUTS, [("5", 0), ("6", 1)])
    path = tmp_path / "samples/a/chunk-0000.jsonl"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(ValueError, match=r"chunk-0000.jsonl is broken .* delete it to go on"):
        directory.read([CHUNK])


def test_another_setting_is_refused_by_name(tmp_path: Path) -> None:
    directory = EvaluationDirectory(tmp_path / "out")
    directory.check(SETTINGS)
    directory.claim(SETTINGS)
    directory.check(SETTINGS)

    with pytest.raises(
        ValueError, match=r"begun with evaluation.temperature = 0.6, and now it is 1.0"
    ):
        directory.check({**SETTINGS, "evaluation.temperature": 1.0})
    with pytest.raises(ValueError, match=r"begun with problems of a = '12ab', and now it is '99'"):
        directory.check({**SETTINGS, f"{BENCH}a": "99"})
    with pytest.raises(
        ValueError, match=r"begun with labels.overlong = 'negative', and now it is None"
    ):
        directory.check({k: v for k, v in SETTINGS.items() if k != "labels.overlong"})

    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        EvaluationDirectory(tmp_path / "file").check(SETTINGS)


def test_a_benchmark_may_be_added_to_the_results(tmp_path: Path) -> None:
    directory = EvaluationDirectory(tmp_path)
    directory.claim(SETTINGS)
    other = {**{k: v for k, v in SETTINGS.items() if k != f"{BENCH}a"}, f"{BENCH}b": "34cd"}
    directory.check(other)
    directory.claim(other)
    assert json.loads(directory.settings.read_text()) == {
        **SETTINGS,
        "of two": [1, 2],
        f"{BENCH}b": "34cd",
    }


def evaluation(pass_at_1: float, error: float, problems: int) -> Evaluation:
    passed = ((1, pass_at_1), (2, pass_at_1))
    return Evaluation(pass_at_1, error, passed, pass_at_1, problems, 2, 1, 0.0, 0.5, 10.0)


def test_the_average_weighs_all_benchmarks_equally(tmp_path: Path) -> None:
    """(0.2 + 0.8) / 2 whatever the sizes, and a standard error of sqrt(0.03^2 + 0.04^2) / 2 =
    0.025.
    """
    evaluations = {"small": evaluation(0.2, 0.03, 10), "large": evaluation(0.8, 0.04, 1000)}
    mean = average(evaluations)
    assert (mean["pass_at_1"], mean["standard_error"]) == pytest.approx((0.5, 0.025))
    assert (mean["problems"], mean["failed_checks"], mean["samples"]) == (1010, 2, 2)

    directory = EvaluationDirectory(tmp_path)
    directory.publish("my-model", SETTINGS, {**evaluations, "one": evaluation(0.5, math.nan, 1)})
    published = json.loads(directory.json.read_text())
    assert published["benchmarks"]["small"]["pass_at_1"] == 0.2
    assert published["benchmarks"]["one"]["standard_error"] is None, "JSON has no NaN"

    rows = list(csv.DictReader(directory.csv.open()))
    assert [row["benchmark"] for row in rows] == ["small", "large", "one", "average"]
    assert rows[1]["pass_at_2"] == "0.8" and rows[2]["standard_error"] == ""


@pytest.mark.parametrize(
    ("model", "name"), [("models/R1-Distill", "R1-Distill"), ("runs/first/hf", "first")]
)
def test_two_runs_do_not_share_a_directory_of_results(model: str, name: str) -> None:
    assert results_name(Path(model)) == name
