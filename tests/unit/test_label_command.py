"""`megatron-real labels`: its output and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_real.cli import main

ROWS = [
    {"completion": "\\boxed{5}", "gold": "5", "expected": "ok", "kind": "plain", "id": "a"},
    {"completion": "\\boxed{6}", "gold": ["5", "7"], "expected": "wrong", "kind": "plain"},
    {"completion": "\\boxed{[1, 2]}", "gold": "(1, 2)", "expected": False},
]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return str(path)


def test_check_counts_by_kind(tmp_path: Path, capsys: Any) -> None:
    """Beside three rows that are as expected there are a false positive of `exact`, which makes it
    exit with 1, and a false negative.
    """
    agreeing = write(tmp_path / "a.jsonl", ROWS)
    assert main(["labels", "check", agreeing, "--json", "--workers", "1"]) == 0

    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["accuracy"], report["others"]) == (3, 1.0, [])
    assert list(report["kinds"]) == ["plain", "tuple or open interval"]

    same_text = {"completion": "\\boxed{x}", "gold": "x", "expected": "wrong", "kind": "same"}
    other_text = {"completion": "\\boxed{5.0}", "gold": "5", "expected": True, "kind": "other"}
    disagreeing = write(tmp_path / "b.jsonl", [*ROWS, same_text, other_text])
    words = ["--verifier", "exact", "--workers", "1"]

    assert main(["labels", "check", disagreeing, "--json", *words]) == 1

    report = json.loads(capsys.readouterr().out)
    assert (report["accuracy"], report["false_positives"], report["false_negatives"]) == (0.6, 1, 1)
    assert report["kinds"]["same"]["false_positives"] == 1
    assert [row["status"] for row in report["others"]] == ["ok", "wrong"]


def test_check_shows_a_table(tmp_path: Path, capsys: Any) -> None:
    assert main(["labels", "check", write(tmp_path / "a.jsonl", ROWS), "--verifier", "exact"]) == 0
    output = capsys.readouterr().out
    assert "false positives" in output and "accuracy 1.0000" in output


def test_golds_that_nobody_can_match_are_named(tmp_path: Path, capsys: Any) -> None:
    golds = ["5", "9. Anya climbs one floor; Vanya five floors.", "\\frac{1}{", "nan", ["x", "nan"]]
    rows = [{"problem": "?", "answer": gold} for gold in golds]
    assert main(["labels", "golds", write(tmp_path / "g.jsonl", rows), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    reasons = {entry["uid"]: entry["reason"] for entry in report["unmatchable"]}
    assert report["rows"] == 5
    assert reasons == {
        "g/1": "a sentence",
        "g/2": "not read by math-verify, so that only its own text matches",
        "g/3": "no answer",
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty"),
        ("[1]\n", "d.jsonl:1 is no object with completion, gold and expected"),
        ('{"completion": "x"}\n', "d.jsonl:1 is no object with completion, gold and expected"),
    ],
)
def test_a_file_that_cannot_be_checked_is_refused(
    tmp_path: Path, capsys: Any, text: str, sentence: str
) -> None:
    (tmp_path / "d.jsonl").write_text(text)
    assert main(["labels", "check", str(tmp_path / "d.jsonl")]) == 2
    assert sentence in capsys.readouterr().err
