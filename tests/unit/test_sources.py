"""Published files of every known form become one schema; duplicates, near duplicates and leaks are
counted.

The problems are written for these tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_real.prompts import read_rows
from megatron_real.prompts.overlap import Index, tokens
from megatron_real.prompts.prepare import prepare
from megatron_real.prompts.sources import BY_NAME, SOURCES, Unusable, prepared

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "tests/samples"

# form -> (source, gold answers that must come out, dropped rows by reason)
FORMS: dict[str, tuple[str, list[Any], dict[str, int]]] = {
    "agentica-org--DeepScaleR-Preview-Dataset.json": (
        "deepscaler",
        ["58", "\\frac{3}{4}"],
        {"no answer": 1},
    ),
    "BytedTsinghua-SIA--DAPO-Math-17k.jsonl": ("dapo", ["72", "20"], {"duplicate": 3}),
    "open-r1--DAPO-Math-17k-Processed.jsonl": ("dapo", ["72"], {}),
    "HuggingFaceH4--aime_2024.jsonl": ("aime24", ["534", "1"], {}),
    "Maxwell-Jia--AIME_2024.jsonl": ("aime24", ["534"], {}),
    "math-ai--aime24.jsonl": ("aime24", ["534"], {}),
    "opencompass--AIME2025.jsonl": ("aime25", ["336", "135"], {}),
    "math-ai--aime25.jsonl": ("aime25", ["336"], {}),
    "MathArena--aime_2025.jsonl": ("aime25", ["336"], {}),
    "HuggingFaceH4--MATH-500.jsonl": ("math500", ["x^2-3x-10", "(3,0)"], {}),
    "AI-MO--aimo-validation-amc.jsonl": ("amc23", ["143", "3.5"], {}),
    "math-ai--amc23.jsonl": ("amc23", ["143.0"], {}),
    "math-ai--minervamath.jsonl": ("minerva", ["20", "2.16e5"], {}),
    "Qwen2.5-Math--minerva_math.jsonl": ("minerva", ["2.16e5"], {}),
    "authors--minerva.jsonl": ("minerva", [["15", "15.0"]], {}),
    "Hothan--OlympiadBench.jsonl": (
        "olympiadbench",
        ["2,3", "18", "2,3, 5,7"],
        {"needs an image": 1, "no answer": 1},
    ),
}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def write(path: Path, problems: list[tuple[str, Any]]) -> Path:
    path.write_text("".join(json.dumps({"problem": q, "answer": a}) + "\n" for q, a in problems))
    return path


def test_every_sample_is_tested_and_every_layout_has_one() -> None:
    assert {p.name for p in SAMPLES.glob("*.json*")} == set(FORMS)

    used = set()
    for form, (name, *_) in FORMS.items():
        path = SAMPLES / form
        published = rows(path) if path.suffix == ".jsonl" else json.loads(path.read_text())
        used |= {
            form
            for row in published
            for form in [
                next(
                    (f for f in BY_NAME[name].forms if f.question in row and f.answer in row),
                    None,
                )
            ]
            if form
        }

    assert {f for s in SOURCES for f in s.forms if "." not in f.answer} <= used


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_becomes_the_one_schema(form: str, tmp_path: Path) -> None:
    name, golds, dropped = FORMS[form]
    done = prepare({name: str(SAMPLES / form)}, tmp_path)
    written_rows = rows(tmp_path / f"{name}.jsonl")
    assert [row["reward_model"]["ground_truth"] for row in written_rows] == golds

    counts = done.counts[name]
    assert counts.dropped == dropped
    assert counts.read == counts.kept + counts.dropped.total()
    assert {row["data_source"] for row in written_rows} == {name}

    for row in written_rows:
        text = row["prompt"][-1]["content"]
        assert "Answer:" not in text and "step by step" not in text, (
            "the publisher's instruction must go"
        )

    # What is written is what training and evaluation read.
    read = read_rows(tmp_path / f"{name}.jsonl")
    accepted = [gold if isinstance(gold, list) else [gold] for gold in golds]
    assert [list(prompt.answers) for prompt in read] == accepted
    assert read[0].source == name and read[0].uid == f"{name}/0"


@pytest.mark.parametrize(
    "form", ["BytedTsinghua-SIA--DAPO-Math-17k.jsonl", "Hothan--OlympiadBench.jsonl"]
)
def test_parquet_and_folders_read_like_jsonl(form: str, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    name, golds, _ = FORMS[form]
    (tmp_path / "in/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows(SAMPLES / form)), tmp_path / "in/data/train-0.parquet")
    prepare({name: str(tmp_path / "in")}, tmp_path / "out")
    prepare({name: str(SAMPLES / form)}, tmp_path / "expected")

    assert rows(tmp_path / f"out/{name}.jsonl") == rows(tmp_path / f"expected/{name}.jsonl")
    assert [
        row["reward_model"]["ground_truth"] for row in rows(tmp_path / f"out/{name}.jsonl")
    ] == golds


def test_the_context_goes_before_the_question(tmp_path: Path) -> None:
    prepare({"olympiadbench": str(SAMPLES / "Hothan--OlympiadBench.jsonl")}, tmp_path)
    asked = rows(tmp_path / "olympiadbench.jsonl")[1]["prompt"][-1]["content"]
    assert asked == "Let $P$ be a prism over a hexagon.\n\nHow many edges has $P$?"


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        ("033", "33"),
        (33, "33"),
        (33.0, "33"),
        ("$33$", "33"),
        ("33^{\\circ}", "33"),
        ("33\N{DEGREE SIGN}", "33"),
    ],
    ids=str,
)
def test_whole_numbers_are_read_in_every_spelling(answer: Any, whole: str) -> None:
    row = prepared(BY_NAME["aime24"], {"problem": "What is it?", "answer": answer}, 0)
    assert row["reward_model"]["ground_truth"] == whole


@pytest.mark.parametrize("answer", ["1/2", "about 7", "33.5", "nan", "inf"])
def test_an_answer_that_is_no_whole_number_is_refused(answer: str) -> None:
    with pytest.raises(Unusable, match="not a whole number"):
        prepared(BY_NAME["aime24"], {"problem": "What is it?", "answer": answer}, 0)


def test_dollars_that_are_money_stay() -> None:
    row = prepared(BY_NAME["math500"], {"problem": "What does it cost?", "answer": "\\$18.90"}, 0)
    assert row["reward_model"]["ground_truth"] == "\\$18.90"


SAME = [
    ("Find $\\left(x+1\\right)^2$.", "find  \\( (x + 1)^{2} \\)"),
    ("What is $\\dfrac{1}{2}$ of 8?", "What is $\\frac{1}{2}$ of 8"),
    ("Is $3 \\times 4$ even?", "is $3 \\cdot 4$ even"),
    ("\N{FULLWIDTH DIGIT SEVEN} and 1", "7 AND 1"),
]
OTHER = [("2+3", "2-3"), ("x^2", "x^3"), ("find 12", "find 1 2"), ("a<b", "a>b")]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_formatting_does_not_make_two_questions_different(one: str, other: str) -> None:
    assert tokens(one) == tokens(other)


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_a_difference_in_content_makes_two_questions_different(one: str, other: str) -> None:
    assert tokens(one) != tokens(other)


def test_the_overlap_of_near_questions_equals_that_computed_by_hand() -> None:
    """Ten letters have 8 trigrams: changing the last letter leaves 7 of 8, and changing the fifth
    leaves 5 of 8.
    """
    index = Index({"b/0": "a b c d e f g h i j"}, size=3, share=5 / 8)
    shares = {
        q: index.closest(q)
        for q in ("a b c d e f g h i z", "a b c d z f g h i j", "a b z d e f z h i j")
    }

    assert [m and m.share for m in shares.values()] == [
        7 / 8,
        5 / 8,
        None,
    ]  # the last one keeps 2 of 8

    part = index.closest("c d e f g")
    assert part is not None and part.share == 1, (
        "the shorter one counts: it is wholly part of the other"
    )
    assert index.closest("a b") is None, "too short to be near"

    same = index.closest("A, B c d e f g h i j!")
    assert same is not None and (same.name, same.share) == ("b/0", 1)


@given(
    st.lists(st.sampled_from("abcdef"), min_size=3, max_size=20),
    st.lists(st.sampled_from("abcdef"), max_size=20),
)
def test_overlap_equals_brute_force(one: list[str], other: list[str]) -> None:
    def grams(letters: list[str]) -> set[str]:
        return {"".join(letters[i : i + 3]) for i in range(len(letters) - 2)}

    grams_of_one = grams(one)
    grams_of_other = grams(other)
    if one == other:
        expected = 1.0
    elif grams_of_other:
        common = grams_of_one & grams_of_other
        expected = len(common) / min(len(grams_of_one), len(grams_of_other))
    else:
        expected = 0.0

    match = Index({"x": " ".join(one)}, size=3, share=0.5).closest(" ".join(other))
    if expected >= 0.5:
        assert match is not None and match.share == expected
    else:
        assert match is None


LONG = (
    "A farmer has twelve sheep and sells all but five of them at the market on Monday. "
    "How many sheep are left?"
)
TRAIN = [
    (LONG, "5"),
    (LONG.replace("twelve", "thirty"), "5"),
    ("What is seven times six?", "42"),
    ("what is seven times SIX", "42"),
    ("Name a prime below ten.", "3"),
    ("Name a prime below ten.", "7"),
    ("What is half of one?", "1/2"),
    ("What is half of one?", "0.5"),
    ("Solve 2x = x^2.", "x=0, x=2"),
    ("Solve 2x = x^2.", "2, 0"),
]


def test_duplicates_disagreements_and_leaks_are_reported(tmp_path: Path) -> None:
    sources = {
        "deepscaler": str(write(tmp_path / "train.jsonl", TRAIN)),
        "math500": str(
            write(tmp_path / "test.jsonl", [(LONG, "5"), (LONG, "5"), ("Halve nine.", "4.5")])
        ),
    }
    done = prepare(sources, tmp_path / "out")
    counts = done.counts["deepscaler"]

    assert (counts.read, counts.kept) == (10, 3)
    assert counts.dropped == {
        "duplicate": 3, "answers of equal questions disagree": 2, "asked by a benchmark": 1,
        "near a benchmark's question": 1,
    }  # fmt: skip
    assert (done.counts["math500"].kept, done.counts["math500"].repeated) == (3, 1), (
        "a benchmark keeps its questions"
    )
    assert [(leak.train, leak.benchmark) for leak in done.leaks] == [
        ("deepscaler/0", "math500/0"),
        ("deepscaler/1", "math500/0"),
    ]
    assert rows(tmp_path / "out/leaks.jsonl")[1]["train_question"] == TRAIN[1][0]
    assert "aime24" in done.unchecked and "math500" not in done.unchecked

    report = json.loads((tmp_path / "out/report.json").read_text())
    assert (
        report["sources"]["deepscaler"]["dropped"] == counts.dropped
        and report["leaks"]["found"] == 2
    )

    kept = prepare(sources, tmp_path / "kept", keep_leaks=True)
    assert (kept.counts["deepscaler"].kept, len(kept.leaks)) == (5, 2)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    run = [sys.executable, "tools/prepare_data.py", *words]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command_writes_the_benchmarks_and_its_report(tmp_path: Path) -> None:
    done = command(
        "--out", str(tmp_path), f"aime25={SAMPLES / 'opencompass--AIME2025.jsonl'}",
        f"dapo={SAMPLES / 'BytedTsinghua-SIA--DAPO-Math-17k.jsonl'}",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert "3 duplicate" in done.stdout and "not compared with aime24, math500" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {
        "aime25.jsonl",
        "dapo.jsonl",
        "leaks.jsonl",
        "report.json",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["aime=x.jsonl"], "there is no source 'aime'; known are deepscaler, dapo, aime24"),
        (["aime24=nowhere.jsonl"], "there is no data file 'nowhere.jsonl'"),
        (["aime24=tests/samples/README.md"], "is no JSON"),
        (["aime24=tests/unit"], "holds no .arrow or .parquet file"),
        (
            ["aime24=tests/samples/Hothan--OlympiadBench.jsonl"],
            "has no usable row for aime24 (5 no question",
        ),
        (["--gram-share", "0", "aime24=tests/samples/math-ai--aime24.jsonl"], "a share in (0, 1]"),
    ],
    ids=lambda v: v[-1] if isinstance(v, list) else "",
)
def test_bad_input_is_one_sentence(words: list[str], message: str, tmp_path: Path) -> None:
    done = command("--out", str(tmp_path / "out"), *words)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert message in done.stderr
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_without_a_network_the_error_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    done = command("--out", str(tmp_path / "out"), "aime24")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "cannot get the dataset HuggingFaceH4/aime_2024 from the hub" in done.stderr
        and "aime24=FILE" in done.stderr
    )


def test_a_benchmark_is_read_from_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub's own cache is filled by hand with two files of one dataset, and one of
    another that is not asked for.
    """
    snapshot = tmp_path / "hub/datasets--opencompass--AIME2025/snapshots/1234"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("1234")
    lines = (SAMPLES / "opencompass--AIME2025.jsonl").read_text().splitlines(keepends=True)
    for i, line in enumerate(lines):
        (snapshot / f"aime2025-{'I' * (i + 1)}.jsonl").write_text(line)
    (snapshot / "README.md").write_text("# not data")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))

    for word in ("aime25", "aime25=opencompass/AIME2025"):
        done = command("--out", str(tmp_path / "out"), word)
        assert done.returncode == 0, done.stderr
        written_rows = rows(tmp_path / "out/aime25.jsonl")
        assert [row["reward_model"]["ground_truth"] for row in written_rows] == ["336", "135"]
