"""Output of commands fits a terminal of 80 columns, and no table has two columns of one name."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_real.cli import build_parser, main
from megatron_real.commands import COMMANDS, labels
from megatron_real.commands.convert import amount
from megatron_real.commands.doctor import _text
from megatron_real.commands.terminal import hanging
from megatron_real.doctor.finding import Finding
from megatron_real.evaluation.benchmark import table
from megatron_real.evaluation.figures import Evaluation

WIDTH = 80


def test_the_table_of_an_evaluation_fits() -> None:
    passed = tuple((k, 1.0) for k in (1, 2, 4, 8, 16))
    one = Evaluation(1.0, 0.021, passed, 1.0, 40315, 16, 1234, 1.0, 1.0, 8192.0)
    output = table({"a benchmark mor": one, "b": one})
    names = [str(column.header) for column in output.columns]
    assert len(set(names)) == len(names)
    console = Console(width=WIDTH)
    with console.capture() as capture:
        console.print(output)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert any("a benchmark mor" in line and "100.0%" in line for line in lines), "a cell is folded"


def test_the_table_of_a_verifier_fits(capsys: pytest.CaptureFixture[str]) -> None:
    tally = labels.Tally()
    tally.rows = tally.as_expected = 123_456
    labels._show({"words-and-punctuation-in-box(FN)": tally}, tally, [], 1.0)
    printed = capsys.readouterr().out
    assert "false positives" in printed
    assert max(map(len, printed.splitlines())) <= WIDTH


def test_golds_that_nobody_can_match_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    golds = ["the answer depends on " + "the choice of the origin " * 4, "\\sqrt{" * 40, "5"]
    problems = [{"prompt": f"Question {i}?", "answer": gold} for i, gold in enumerate(golds)]
    file = tmp_path / "problems.jsonl"
    file.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    assert main(["labels", "golds", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 problems" in printed
    assert "the answer depends on" in printed
    assert max(map(len, printed.splitlines())) <= WIDTH


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_the_help_of_every_command_fits(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    parser = build_parser()
    for word in command.split():
        (commands,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        parser = commands.choices[word]
    wide = [line for line in parser.format_help().splitlines() if len(line) > WIDTH]
    assert not wide


def test_the_settings_fit_and_the_nearest_are_named_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert main(["config"]) == 0
    wide = [line for line in capsys.readouterr().out.splitlines() if len(line) > WIDTH]
    assert not wide

    assert main(["config", "objective.tauu"]) == 2
    named = capsys.readouterr().err.strip().split("the nearest are ")[1].split(", ")
    assert named[0] == "objective.tau"
    assert len(set(named)) == len(named) == 5


def test_a_line_of_the_doctor_is_folded_under_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    finding = Finding("warn", "flash-attn", "falls back " * 12, "use an NGC PyTorch image")
    first, *others = _text([finding]).splitlines()
    assert first.startswith("warn  flash-attn            falls back")
    assert all(len(line) <= WIDTH for line in (first, *others))
    assert others[0].startswith(" " * 28 + "back falls")


def test_a_file_has_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert "\n" not in hanging("word " * 100, 4)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1_252_231, "1.25 MB"), (15.2e9, "15.20 GB")],
)
def test_bytes_have_a_unit_that_suits_them(num_bytes: float, text: str) -> None:
    assert amount(num_bytes) == text
