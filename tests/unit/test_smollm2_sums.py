"""examples/smollm2_sums.py: lenient and strict verdicts on a table of answers, the problems, and
the comparison.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_real.labels.verifiers import load
from megatron_real.prompts.rows import read_rows

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples/smollm2_sums.py")
GOLD = "58 + 67 = 125"


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("58 + 67 = 125", True, True),
        (" 58 + 67 = 125\n", True, True),
        ("58 + 67 = 125.", False, True),
        ("58+67=125", False, True),
        ("125", False, True),
        ("The sum of 58 and 67 is 125", False, True),
        ("First 8 + 7 = 15, so it is\n125!", False, True),
        ("\\boxed{125}", False, True),
        ("58 + 67 = 115", False, False),
        ("67 + 58 = 125", False, True),
        ("58 + 67 = 125, which is 5 times 25", False, False),
        ("58 + 67 = 1125", False, False),
        ("58 + 67 = 125.5", False, False),
        ("58 + 67 = 1,125", False, False),
        ("58 + 67 = 0125", False, False),
        (
            "58 + 67 = \u0661\u0662\u0665",
            False,
            False,
        ),  # 125 in Arabic digits: the last ASCII number is 67
        ("", False, False),
        ("I do not know.", False, False),
        ("1" * 100_000, False, False),
    ],
)
def test_strict_and_lenient_judge_the_table_as_expected(
    text: str, strict: bool, lenient: bool
) -> None:
    assert load("exact", require_boxed=False)(text, [GOLD], {})[0] == _status(text, strict)
    verdict = load(f"{EXAMPLE}:lenient")(text, [GOLD], {})
    assert verdict == (("ok", 1.0) if lenient else ("wrong", 0.0))


def _status(text: str, right: bool) -> str:
    if right:
        return "ok"
    return "wrong" if text.strip() else "unparsable"


@pytest.fixture(scope="module")
def example() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("smollm2_sums", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_held_out_pairs_and_their_mirrors_are_not_trained_on(example: Any, tmp_path: Path) -> None:
    example.write_problems(tmp_path)
    asked = {
        name: [r.messages[-1]["content"] for r in read_rows(tmp_path / f"{name}.jsonl")]
        for name in ("train", "heldout")
    }
    pairs = {
        name: [frozenset(text.split(" + ")) for text in texts] for name, texts in asked.items()
    }

    assert len(set(asked["heldout"])) == len(set(pairs["heldout"])) == 400
    assert not set(pairs["train"]) & set(pairs["heldout"])

    # 8,100 ordered pairs; of the 400 held-out ones, those of two different numbers take their
    # mirror with them.
    different = sum(len(pair) == 2 for pair in pairs["heldout"])
    assert len(set(asked["train"])) == len(asked["train"]) == 8100 - 400 - different


def test_the_answer_is_the_sum_and_the_worked_example_is_right(
    example: Any, tmp_path: Path
) -> None:
    example.write_problems(tmp_path)
    for row in read_rows(tmp_path / "heldout.jsonl"):
        question, shown, asked = (m["content"] for m in row.messages[1:])
        assert shown.startswith(f"{question} = ") and eval(question) == int(
            shown.rpartition("=")[2]
        )
        assert row.answers == (f"{asked} = {eval(asked)}",)


def test_the_comparison_has_figures_and_answers_before_and_after(
    example: Any, tmp_path: Path
) -> None:
    for name, figure, answer in (("before", 0.25, "58 + 67\n= 115"), ("after", 0.875, GOLD)):
        for verifier in ("strict", "lenient"):
            samples = tmp_path / name / verifier / "samples/heldout"
            samples.mkdir(parents=True)
            results = {"benchmarks": {"heldout": {"pass_at_1": figure, "standard_error": 0.0125}}}
            (tmp_path / name / verifier / "results.json").write_text(json.dumps(results))
            rows = [
                {"golds": [GOLD], "sample": 0, "completion": answer},
                {"golds": [GOLD], "sample": 1, "completion": "no"},
            ]
            (samples / "chunk-0000.jsonl").write_text(
                "".join(json.dumps(row) + "\n" for row in rows)
            )
    output = example.side_by_side(tmp_path / "before", tmp_path / "after")

    assert output.splitlines() == [
        "held-out pass@1   before                  after",
        "strict            0.250 +- 0.013          0.875 +- 0.013",
        "lenient           0.250 +- 0.013          0.875 +- 0.013",
        "",
        "answers           before                  after",
        "58 + 67 = 125     58 + 67 = 115           58 + 67 = 125",
    ]
