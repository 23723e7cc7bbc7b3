"""Results of benchmarks are kept in files, read again, and compared row by row."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import bench_machine

NOW = [
    {"rollouts": 8, "DP": 1, "seconds": 3.0},
    {"rollouts": 8, "DP": 2, "seconds": 5.0},
    {"rollouts": 9, "DP": 2, "seconds": 7.0},
]


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bench_machine.add_result_options(parser)
    return parser.parse_args(words)


def test_results_are_kept_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows with the same name keep their order, and a row that was not measured before
    is left out.
    """
    file = tmp_path / "results.json"
    asked = options("--json", str(file))
    earlier = [dict(row, seconds=row["seconds"] / 2) for row in NOW[:2]]
    bench_machine.show("a plan", earlier, asked)
    bench_machine.show("another", [{"name": "x", "seconds": 1.0}], asked)
    kept = json.loads(file.read_text())

    assert [table["title"] for table in kept["tables"]] == ["a plan", "another"]
    assert kept["tables"][0]["rows"] == earlier
    assert {"machine", "threads", "versions", "command", "date"} <= kept.keys()

    assert bench_machine.compare("a plan", NOW, kept) == [
        {"rollouts": "8", "seconds": "3 / 1.5 = 2.00"},
        {"rollouts": "8", "seconds": "5 / 2.5 = 2.00"},
    ]
    assert bench_machine.compare("no such table", NOW, kept) == []

    capsys.readouterr()
    bench_machine.show("a plan", NOW, options("--against", str(file)))
    assert "another processor" not in capsys.readouterr().out

    file.write_text(json.dumps(kept | {"machine": "an abacus"}))
    bench_machine.show("a plan", NOW, options("--against", str(file)))
    output = capsys.readouterr().out
    assert "5 / 2.5 = 2.00" in output
    assert "another processor, an abacus" in output


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--json", "nowhere/a.json"), "there is no directory nowhere; make it first"),
        (("--against", "absent.json"), "absent.json cannot be read"),
        (("--against", "list.json"), "list.json is no file of results; name one that --json wrote"),
    ],
)
def test_wrong_files_are_refused_before_anything_is_measured(
    words: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.json").write_text("[]")
    with pytest.raises(SystemExit) as end:
        options(*words)
    assert end.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
