"""`megatron-real rollouts` prints what a run has saved, and refuses in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_real.cli import main
from megatron_real.records import Completion, Prompt, Rollout, Verdict
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import write_rollouts


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Steps 1 to 3 of one rollout each."""
    run = RunDirectory(tmp_path / "run")
    completion = Completion((7, 8), (-0.5, float("nan")), "half \ud83d pair \x1b[2J", True)
    rollout = Rollout(Prompt("a/0", "2+3=", (1,), ("5",)), 0, 0, completion, Verdict("ok", 1, 1.0))  # type: ignore[arg-type]
    for step in (1, 2, 3):
        write_rollouts(run.rollouts(step), [rollout], step=step, scores=[float("nan")])
    return run


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, object]]:
    assert main(["rollouts", *words]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and "\x1b" not in out, "what a model wrote controls no terminal"
    return [json.loads(line) for line in out.splitlines()]


def test_every_rollout_is_a_line(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, str(run.path))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["completion"] == "half \ud83d pair \x1b[2J"
    assert (rows[0]["score"], rows[0]["token_ids"], rows[0]["logprobs"]) == (
        None,
        [7, 8],
        [-0.5, None],
    )


def test_steps_are_chosen(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    rows = printed(capsys, str(run.path), "--steps", "3", "1-2", "--without-tokens")
    assert [row["step"] for row in rows] == [3, 1, 2]
    assert "token_ids" not in rows[0] and "completion" in rows[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps", "4"], "has no rollouts of step 4; it has 3 steps between 1 and 3"),
        (["--steps", "x"], "--steps 'x' is no step; give numbers such as 12 or 20-29"),
    ],
)
def test_refusals(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(["rollouts", str(run.path), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_directory_without_rollouts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollouts", str(tmp_path)]) == 2
    assert "has no rollouts of a finished step" in capsys.readouterr().err
