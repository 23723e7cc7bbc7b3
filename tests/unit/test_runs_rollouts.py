"""Rollouts saved and read back, broken files, and the run directory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pytest

from megatron_real.records import (
    EXCLUDED,
    NEGATIVE,
    POSITIVE,
    Completion,
    Prompt,
    Rollout,
    Status,
    Verdict,
)
from megatron_real.rollout.origin import Origin
from megatron_real.runs.claim import Claim
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import (
    read_chunk,
    read_rollouts,
    read_rows,
    write_chunk,
    write_rollouts,
)

PROMPT = Prompt("train/17", "<|user|>2+3=\n", (5, 9, 12), ("5", "five"), source="sums")
ROLLOUTS = [
    Rollout(
        PROMPT,
        4,
        0,
        Completion((8, 2), (-0.1 - 0.2, -1e-40), "\u00e9 \u2028 5", True),
        Verdict(Status.OK, POSITIVE, 1.0),
    ),
    Rollout(
        PROMPT,
        4,
        1,
        Completion((8, 8, 8), (-1 / 3, -2.5, -0.0), "6", False),
        Verdict(Status.OVERLONG, NEGATIVE, None),
    ),
    Rollout(
        PROMPT,
        5,
        0,
        Completion((), (), "half \ud83d pair", True),
        Verdict(Status.EMPTY, EXCLUDED, None),
    ),
]


def rows(path: Path) -> list[dict[str, Any]]:
    return list(read_rows(path))


def write_lines(
    path: Path,
    rollouts: Sequence[Rollout],
    *,
    header: Sequence[dict[str, Any]] = (),
    change: Callable[[bytes], bytes] | None = None,
) -> None:
    """Writes a file as version 0.1 did; `change` is applied to the second rollout."""
    write_rollouts(path.with_suffix(".parquet"), rollouts, step=3)
    lines = [json.dumps(row).encode() for row in rows(path.with_suffix(".parquet"))]
    path.with_suffix(".parquet").unlink()
    if change:
        lines[1] = change(lines[1])
    path.write_bytes(b"\n".join([*(json.dumps(one).encode() for one in header), *lines]))


def test_figures_of_tokens_are_kept_beside_the_rollouts(tmp_path: Path) -> None:
    path = tmp_path / "step-00001.parquet"
    ratios = [numpy.array([0.5, math.nan], numpy.float32), None, numpy.zeros(0, numpy.float32)]
    weights = [numpy.array([-0.25, 1e-20], numpy.float32), None, numpy.zeros(0, numpy.float32)]
    figures = {"log_ratios": ratios, "token_weights": weights}
    write_rollouts(path, ROLLOUTS, step=1, token_figures=figures)
    first, second, third = rows(path)

    assert first["log_ratios"] == [0.5, None]
    assert first["token_weights"] == [-0.25, float(numpy.float32(1e-20))]
    assert "log_ratios" not in second and "token_weights" not in second
    assert third["log_ratios"] == []
    assert read_rollouts(path) == ROLLOUTS
    with pytest.raises(ValueError, match="1 values of log_ratios for 3 rollouts"):
        write_rollouts(path, ROLLOUTS, step=1, token_figures={"log_ratios": [None]})


def test_what_is_read_is_what_was_written_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "rollouts" / "step-00012.parquet"
    write_rollouts(path, ROLLOUTS, step=12)
    read_back = read_rollouts(path)
    assert read_back == ROLLOUTS
    for before, after in zip(ROLLOUTS, read_back, strict=True):
        # Bytes also tell -0.0 from 0.0.
        assert after.completion.logprobs.tobytes() == before.completion.logprobs.tobytes()


def test_masks_versions_and_references_are_kept(tmp_path: Path) -> None:
    completion = Completion(
        (1, 2, 3),
        (-1.0, 0.0, -0.5),
        "",
        True,
        trained=(True, False, True),
        weight_version=(4, -1, 5),
    )
    reference_logprobs = numpy.array([-1.5, 0.0, -0.1], numpy.float32)
    masked = dataclasses.replace(
        ROLLOUTS[0], completion=completion, reference_logprobs=reference_logprobs
    )
    write_rollouts(tmp_path / "a.parquet", [masked, ROLLOUTS[1]], step=1)

    assert read_rollouts(tmp_path / "a.parquet") == [masked, ROLLOUTS[1]]


def test_a_row_holds_everything_about_its_rollout(tmp_path: Path) -> None:
    path = tmp_path / "step.parquet"
    write_rollouts(
        path,
        ROLLOUTS,
        step=12,
        scores=[0.25, 0.0, math.nan],
        weights=[-0.5, 0.5, 0.0],
        minibatches=[1, 1, 2],
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
        "logprobs": ROLLOUTS[0].completion.logprobs.tolist(),
    }
    assert [row["score"] for row in rows(path)] == [0.25, 0.0, None], "JSON has no NaN"
    assert [row["minibatch"] for row in rows(path)] == [1, 1, 2]


def test_a_log_prob_that_is_not_a_number_is_null_and_comes_back_as_nan(tmp_path: Path) -> None:
    odd = dataclasses.replace(
        ROLLOUTS[0], completion=Completion((1, 2), (math.nan, -1.0), "", True)
    )
    write_rollouts(tmp_path / "a.parquet", [odd], step=1)
    assert rows(tmp_path / "a.parquet")[0]["logprobs"] == [None, -1.0]
    first, second = read_rollouts(tmp_path / "a.parquet")[0].completion.logprobs
    assert math.isnan(first) and second == -1.0


def test_writing_again_replaces_the_file_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_rollouts(path, ROLLOUTS, step=1)
    not_text: Any = object()  # which cannot be written
    broken = dataclasses.replace(ROLLOUTS[1], prompt=dataclasses.replace(PROMPT, uid=not_text))
    with pytest.raises(pyarrow.ArrowException):
        write_rollouts(path, [ROLLOUTS[0], broken], step=1)
    assert read_rollouts(path) == ROLLOUTS, "a failed write leaves the old file"
    write_rollouts(path, ROLLOUTS[:1], step=1)
    assert read_rollouts(path) == ROLLOUTS[:1]
    assert [p.name for p in tmp_path.iterdir()] == ["a.parquet"], "no partial file stays"


@pytest.mark.parametrize("column", ["scores", "weights", "minibatches"])
def test_a_column_of_another_length_is_refused(tmp_path: Path, column: str) -> None:
    with pytest.raises(ValueError, match=r"2 values of .* for 3 rollouts"):
        columns: dict[str, Any] = {column: [0, 0]}
        write_rollouts(tmp_path / "a.parquet", ROLLOUTS, step=1, **columns)


def changed(**values: Any) -> Callable[[bytes], bytes]:
    def change(line: bytes) -> bytes:
        return json.dumps(json.loads(line) | values).encode()

    return change


@pytest.mark.parametrize(
    "change, error",
    [
        pytest.param(lambda line: line[:40], "JSONDecodeError", id="cut"),
        pytest.param(lambda line: b"7", "TypeError", id="not an object"),
        pytest.param(lambda line: b'{"uid": "x"}', "KeyError: 'token_ids'", id="a key is missing"),
        pytest.param(lambda line: b"\xff\xfe" + line, "UnicodeDecodeError", id="not UTF-8"),
        pytest.param(changed(logprobs=[-1.0]), "3 token_ids but 1 logprobs", id="lengths"),
        pytest.param(changed(label=2), "label 2 is not 1, 0 or -1", id="label"),
        pytest.param(changed(status="good"), "status 'good' is not one of ok, wrong", id="status"),
        pytest.param(
            changed(prompt_token_ids=[1.5]), "token id 1.5 is not a whole number", id="token id"
        ),
    ],
)
def test_a_broken_line_of_an_earlier_version_is_named(
    tmp_path: Path, change: Callable[[bytes], bytes], error: str
) -> None:
    path = tmp_path / "step-00003.jsonl"
    write_lines(path, ROLLOUTS, change=change)
    with pytest.raises(
        ValueError, match=rf"step-00003\.jsonl:2 is not a saved rollout .*({error})"
    ):
        read_rollouts(path)


def test_files_of_earlier_versions_are_read(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    path = run.rollouts(3).with_suffix(".jsonl")
    write_lines(path, ROLLOUTS)
    assert run.saved_rollouts(3) == path and run.saved_steps() == [3]
    assert read_rollouts(path) == ROLLOUTS
    assert [row["uid"] for row in rows(path)] == ["train/17"] * 3

    origin = Origin("w", "q", "a", 3, {})
    chunk = run.chunk(4, 0, 0).with_suffix(".jsonl")
    write_lines(chunk, ROLLOUTS, header=[{"drawn_under": origin.to_plain()}])
    assert run.saved_chunk(4, 0, 0) == chunk and run.chunks(4) == [chunk]
    assert read_chunk(chunk) == (origin, ROLLOUTS)

    write_rollouts(run.rollouts(3), ROLLOUTS[:1], step=3)
    assert read_rollouts(run.saved_rollouts(3)) == ROLLOUTS[:1], "the newer file counts"


def test_any_changed_byte_of_the_tokens_is_found(tmp_path: Path) -> None:
    """Compression alone would let most changes pass."""
    path = tmp_path / "a.parquet"
    tokens = numpy.random.default_rng(0).integers(0, 1 << 30, 4096)
    completion = Completion(tokens, [-0.5] * 4096, "", True)
    write_rollouts(path, [dataclasses.replace(ROLLOUTS[0], completion=completion)], step=1)
    whole = path.read_bytes()
    at = whole.index(tokens[2000:2004].astype(numpy.int32).tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"a.parquet is not a whole file of rollouts .*CRC"):
        read_rollouts(path)


def test_a_token_takes_less_than_8_bytes(tmp_path: Path) -> None:
    """Random ids of a large vocabulary and random log-probs compress worst."""
    generator = numpy.random.default_rng(0)
    rollouts = [
        dataclasses.replace(
            ROLLOUTS[0],
            sample=i,
            completion=Completion(
                generator.integers(0, 151936, 1000), -generator.exponential(0.5, 1000), "", True
            ),
        )
        for i in range(64)
    ]
    write_rollouts(tmp_path / "a.parquet", rollouts, step=1)

    assert (tmp_path / "a.parquet").stat().st_size < 8 * 64_000


def test_a_missing_step_says_which_there_are(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(ValueError, match=r"rollout\.replay takes the directory of an earlier run"):
        read_rollouts(run.rollouts(1))
    for step in (1, 2):
        write_rollouts(run.rollouts(step), ROLLOUTS, step=step)
    with pytest.raises(ValueError, match=r"saved steps 1 to 2, so set trainer\.steps to at most 2"):
        read_rollouts(run.rollouts(3))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    write_rollouts(tmp_path / "a.parquet", [], step=1)
    (tmp_path / "a.jsonl").touch()
    for name in ("a.parquet", "a.jsonl"):
        with pytest.raises(ValueError, match="is empty"):
            read_rollouts(tmp_path / name)


def test_a_file_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        Claim(RunDirectory(tmp_path / "file")).take(print)


def test_names_sort_as_the_steps_do(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.rollouts(9) < run.rollouts(10) < run.rollouts(1400)
    assert run.rollouts(12) == tmp_path / "rollouts" / "step-00012.parquet"


def test_a_chunk_says_what_it_was_drawn_under(tmp_path: Path) -> None:
    origin = Origin("w", "q", "a", 3, {"rollout.temperature": 1.0, "labels.excluded": ["timeout"]})
    path = tmp_path / "chunk.parquet"
    write_chunk(path, ROLLOUTS, step=12, origin=origin)
    assert read_chunk(path) == (origin, ROLLOUTS)
    assert origin.differences(origin) == []

    other = dataclasses.replace(origin, answers="b", settings={"labels.excluded": []})
    assert origin.differences(other) == [
        "gold answers have changed",
        "rollout.temperature was 1.0 and is None",
        "labels.excluded was ['timeout'] and is []",
    ]

    write_rollouts(path, ROLLOUTS, step=12)
    assert read_chunk(path) == (None, ROLLOUTS), "of an earlier version: it says nothing"

    path.write_text("{")
    with pytest.raises(ValueError, match=r"chunk.parquet is not a whole file of rollouts"):
        read_chunk(path)
