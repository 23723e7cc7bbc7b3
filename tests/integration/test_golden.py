"""The golden curves: what tools/golden.py computes now is what tests/golden/ holds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT


def compare(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/golden.py", "compare", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.parametrize(
    "words",
    [
        ("replay", "tiny", "--steps", 10),
        pytest.param(("tiny",), marks=pytest.mark.grid),
        pytest.param(("quickstart",), marks=pytest.mark.grid),
    ],
    ids=str,
)
def test_the_golden_curves_have_not_moved(words: tuple[object, ...]) -> None:
    done = compare(*words)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("exact", "seen_from"), [(True, 1e-15), (False, 1e-6)])
def test_a_changed_figure_is_noticed(exact: bool, seen_from: float) -> None:
    """By one bit on the machine that made the file, beyond the stated tolerance elsewhere."""
    sys.path.insert(0, str(ROOT / "tools"))
    import golden

    path = ROOT / "tests/golden/replay.jsonl"
    expected = [json.loads(line) for line in path.read_text().splitlines()][1:]
    moved = [dict(row) for row in expected]
    assert golden.compare("replay", moved, expected, exact=exact) == ""

    # One bit of float64 where the figures must be equal, far less than the tolerance elsewhere.
    moved[7]["loss"] *= 1 + 2e-16 if exact else 1 + 1e-12
    assert bool(golden.compare("replay", moved, expected, exact=exact)) == exact

    moved[7]["loss"] *= 1 + 2 * seen_from
    assert "loss is" in golden.compare("replay", moved, expected, exact=exact)
