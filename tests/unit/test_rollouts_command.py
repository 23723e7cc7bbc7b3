"""`megatron-real rollouts` prints what a run has saved, and refuses in one sentence."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import numpy
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from megatron_real.cli import main
from megatron_real.records import Completion, Label, Prompt, Rollout, Status, Verdict
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import write_rollouts


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Saves steps 1 to 3 with one rollout each."""
    run = RunDirectory(tmp_path / "run")
    completion = Completion((7, 8), (-0.5, float("nan")), "half \ud83d pair \x1b[2J", True)
    prompt = Prompt("a/0", "2+3=", (1,), ("5",))
    rollout = Rollout(prompt, 0, 0, completion, Verdict(Status.OK, Label.POSITIVE, 1.0))
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
    assert rows[0]["score"] is None
    assert rows[0]["token_ids"] == [7, 8]
    assert rows[0]["logprobs"] == [-0.5, None]


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
def test_a_step_that_is_not_saved_is_refused(
    run: RunDirectory, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(["rollouts", str(run.path), *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_directory_without_rollouts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollouts", str(tmp_path)]) == 2
    assert "has no rollouts of a finished step" in capsys.readouterr().err


@pytest.fixture
def groups(tmp_path: Path) -> RunDirectory:
    """Saves a step of two groups, each of a right and a wrong answer, with figures of their tokens
    and a tokenizer.
    """
    run = RunDirectory(tmp_path / "groups")
    rollouts = []
    for group in (0, 1):
        prompt = Prompt(f"a/{group}", f"{group}+3=", (1,), ("5", "five"))
        for sample, text in enumerate(("5\x1b[2J", "Six \x9b2J\nand on")):
            completion = Completion((7, 8), (-0.5, -5.0), text, sample == 0)
            verdict = Verdict(Status.OK if sample == 0 else Status.WRONG, Label(1 - sample), 1.0)
            rollouts.append(Rollout(prompt, group, sample, completion, verdict))
    weights = [numpy.array(pair, numpy.float32) for pair in ((-1, 0.5), (0, 0.25)) * 2]
    write_rollouts(
        run.rollouts(40),
        rollouts,
        step=40,
        scores=[0.0, 0.0, 0.0, 0.0],
        weights=[-0.1, 0.3, -0.2, 0.4],
        token_figures={"log_ratios": weights, "token_weights": weights},
    )
    run.config.write_text(f"model: {{path: {tmp_path}}}\n")
    Tokenizer(WordLevel({"[u]": 0, "five": 7, "\x1b[2J": 8}, unk_token="[u]")).save(
        str(tmp_path / "tokenizer.json")
    )
    return run


def read(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["rollouts", *words]) == 0
    return capsys.readouterr().out


def test_a_step_is_read_group_by_group(
    groups: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    text = read(capsys, str(groups.path), "--step", "40", "--label", "wrong")
    assert text.splitlines()[:6] == [
        "=== step 40, group 0: a/0",
        "    0+3=",
        "    gold: 5  or  five",
        "",
        "--- sample 1: wrong, wrong; reward 1, score 0, weight 0.3, 2 tokens, cut at the limit",
        "    Six <U+009B>2J",
    ]
    assert text.splitlines()[-1] == "2 rollouts"
    assert "sample 0" not in text
    # What a model wrote controls no terminal: C0 and C1 are shown by other characters.
    assert not any(unicodedata.category(c) == "Cc" and c != "\n" for c in text)


def test_filters_and_orders_hold_for_both_forms(
    groups: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = printed(capsys, str(groups.path), "--status", "wrong", "--sort", "weight")
    assert [row["weight"] for row in rows] == [0.4, 0.3]
    rows = printed(capsys, str(groups.path), "--sort", "weight", "--limit", "3")
    assert [row["weight"] for row in rows] == [0.4, 0.3, -0.2]
    assert len(printed(capsys, str(groups.path), "--search", "1+3")) == 2
    assert len(printed(capsys, str(groups.path), "--search", "sIX")) == 2
    text = read(capsys, str(groups.path), "--step", "40", "--search", "nowhere")
    assert text == "no rollout of this step is as asked for\n"


def test_tokens_are_shaded_by_their_weights(
    groups: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    text = read(capsys, str(groups.path), "--step", "40", "--label", "right", "--shade", "weight")
    # The largest of the group, whose negative weight makes it likelier: the strongest blue. The
    # other is half of it.
    assert "\x1b[97;48;5;26mfive\x1b[0m" in text
    assert "\x1b[97;48;5;94m\u241b[2J\x1b[0m" in text


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--shade", "weight"], "give --step too"),
        (["--step", "40", "--limit", "-1"], "--limit is -1"),
        (["--step", "41"], "has no rollouts of step 41"),
    ],
)
def test_an_invalid_filter_is_refused_in_one_sentence(
    groups: RunDirectory, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(["rollouts", str(groups.path), *words]) == 2
    output = capsys.readouterr()
    assert sentence in output.err and output.out == ""


def test_shades_that_were_not_kept_are_refused(
    run: RunDirectory, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rollouts", str(run.path), "--step", "1", "--shade", "ratio"]) == 2
    output = capsys.readouterr()
    assert (
        "a run keeps them with trainer.keep_token_weights=true" in output.err and output.out == ""
    )
