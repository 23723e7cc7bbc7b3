"""Rollouts saved and read back, broken files, and the run directory."""

import dataclasses
import json
import math

import pytest

from megatron_real.records import EXCLUDED, NEGATIVE, POSITIVE, Completion, Prompt, Rollout, Verdict
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import read_rollouts, write_rollouts

PROMPT = Prompt("train/17", "<|user|>2+3=\n", (5, 9, 12), ("5", "five"), source="sums")
ROLLOUTS = [
    Rollout(
        PROMPT,
        4,
        0,
        Completion((8, 2), (-0.1 - 0.2, -1e-300), "\u00e9 \u2028 5", True),
        Verdict("ok", POSITIVE, 1.0),
    ),
    Rollout(PROMPT, 4, 1, Completion((8, 8, 8), (-1 / 3, -2.5, -0.0), "6", False), Verdict("overlong", NEGATIVE, None)),
    Rollout(PROMPT, 5, 0, Completion((), (), "half \ud83d pair", True), Verdict("empty", EXCLUDED, None)),
]


def rows(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path):
    path = tmp_path / "rollouts" / "step-00012.jsonl"
    write_rollouts(path, ROLLOUTS, step=12)
    found = read_rollouts(path)
    assert found == ROLLOUTS
    assert [p.hex() for r in found for p in r.completion.logprobs] == [
        p.hex()
        for r in ROLLOUTS
        for p in r.completion.logprobs  # hex also tells -0.0 from 0.0
    ]


def test_the_row_names_everything_that_the_paper_trail_needs(tmp_path):
    path = tmp_path / "step.jsonl"
    write_rollouts(
        path, ROLLOUTS, step=12, scores=[0.25, 0.0, math.nan], weights=[-0.5, 0.5, 0.0], minibatches=[1, 1, 2]
    )
    assert rows(path)[0] == {
        "step": 12,
        "score": 0.25,
        "weight": -0.5,
        "minibatch": 1,
        "uid": "train/17",
        "group": 4,
        "sample": 0,
        "source": "sums",
        "prompt": "<|user|>2+3=\n",
        "completion": "\u00e9 \u2028 5",
        "answers": ["5", "five"],
        "status": "ok",
        "label": 1,
        "reason": "",
        "reward": 1.0,
        "finished": True,
        "refills": 0,
        "prompt_token_ids": [5, 9, 12],
        "token_ids": [8, 2],
        "logprobs": [-0.1 - 0.2, -1e-300],
    }
    assert [row["score"] for row in rows(path)] == [0.25, 0.0, None], "JSON has no NaN"
    assert [row["minibatch"] for row in rows(path)] == [1, 1, 2]


def test_a_log_prob_that_is_not_a_number_is_null_and_comes_back_as_nan(tmp_path):
    odd = dataclasses.replace(ROLLOUTS[0], completion=Completion((1, 2), (math.nan, -1.0), "", True))
    write_rollouts(tmp_path / "a.jsonl", [odd], step=1)
    assert rows(tmp_path / "a.jsonl")[0]["logprobs"] == [None, -1.0]
    first, second = read_rollouts(tmp_path / "a.jsonl")[0].completion.logprobs
    assert math.isnan(first) and second == -1.0


def test_writing_again_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    write_rollouts(path, ROLLOUTS, step=1)
    broken = dataclasses.replace(ROLLOUTS[1], prompt=dataclasses.replace(PROMPT, uid=object()))  # cannot be written
    with pytest.raises(TypeError):
        write_rollouts(path, [ROLLOUTS[0], broken], step=1)
    assert read_rollouts(path) == ROLLOUTS, "a failed write leaves the old file"
    write_rollouts(path, ROLLOUTS[:1], step=1)
    assert read_rollouts(path) == ROLLOUTS[:1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"], "no partial file stays"


@pytest.mark.parametrize("column", ["scores", "weights", "minibatches"])
def test_a_column_of_another_length_is_refused(tmp_path, column):
    with pytest.raises(ValueError, match=r"2 values of .* for 3 rollouts"):
        write_rollouts(tmp_path / "a.jsonl", ROLLOUTS, step=1, **{column: [0, 0]})


def changed(**values):
    def change(line):
        return json.dumps(json.loads(line) | values).encode()

    return change


@pytest.mark.parametrize(
    "change, said",
    [
        pytest.param(lambda line: line[:40], "JSONDecodeError", id="cut"),
        pytest.param(lambda line: b"7", "TypeError", id="not an object"),
        pytest.param(lambda line: b'{"uid": "x"}', "KeyError: 'token_ids'", id="a key is missing"),
        pytest.param(lambda line: b"\xff\xfe" + line, "UnicodeDecodeError", id="not UTF-8"),
        pytest.param(changed(logprobs=[-1.0]), "3 token_ids but 1 logprobs", id="lengths"),
        pytest.param(changed(label=2), "label 2 is not 1, 0 or -1", id="label"),
        pytest.param(changed(status="good"), "status 'good' is not one of ok, wrong", id="status"),
        pytest.param(changed(prompt_token_ids=[1.5]), "token id 1.5 is not a whole number", id="token id"),
    ],
)
def test_a_broken_line_is_named(tmp_path, change, said):
    path = tmp_path / "step-00003.jsonl"
    write_rollouts(path, ROLLOUTS, step=3)
    lines = path.read_bytes().splitlines()
    lines[1] = change(lines[1])
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=rf"step-00003\.jsonl:2 is not a saved rollout .*({said})"):
        read_rollouts(path)


def test_a_missing_step_says_which_there_are(tmp_path):
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match=r"rollout\.replay takes the directory of an earlier run"):
        read_rollouts(run.rollouts(1))
    for step in (1, 2):
        write_rollouts(run.rollouts(step), ROLLOUTS, step=step)
    with pytest.raises(ValueError, match=r"saved steps 1 to 2, so set trainer\.steps to at most 2"):
        read_rollouts(run.rollouts(3))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match="is empty"):
        read_rollouts(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["metrics.jsonl", "evaluations.jsonl"])
def test_a_directory_that_holds_a_run_is_refused(tmp_path, name):
    run = RunDirectory(tmp_path / "runs" / "first")
    run.claim()
    run.claim()  # a run that wrote nothing does not count
    (run.path / name).touch()
    with pytest.raises(ValueError, match=r"first holds a run already; give another trainer\.run_dir or delete it"):
        run.claim()
    run.claim(exist_ok=True)


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        RunDirectory(tmp_path / "file").claim()


def test_names_sort_as_the_steps_do(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.rollouts(9) < run.rollouts(10) < run.rollouts(1400)
    assert run.rollouts(12) == tmp_path / "rollouts" / "step-00012.jsonl"
