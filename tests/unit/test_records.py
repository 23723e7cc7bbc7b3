"""Records hold immutable arrays, compare by value, and know their segments.

Statuses and labels are enums in Python; on disk and in tensors they are the same text and numbers
as before.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from typing import Any

import numpy
import pytest
import torch

from megatron_real.objective.facts import RolloutTable
from megatron_real.records import (
    EXCLUDED,
    NEGATIVE,
    POSITIVE,
    Completion,
    Label,
    Prompt,
    Rollout,
    Segment,
    Status,
    Verdict,
)

ANSWER = Completion(
    [8, 2, 40, 41, 9],
    [-0.5, -1.0, math.nan, 0.0, -0.25],
    "7",
    True,
    trained=[True, True, False, False, True],
    weight_version=3,
)
PROMPT = Prompt("train/1", "3+4=", (1, 2), ("7",))
REFERENCE_LOGPROBS = numpy.full(5, -1.0, dtype=numpy.float32)
ROLLOUT = Rollout(
    PROMPT,
    0,
    1,
    ANSWER,
    Verdict(Status.OK, POSITIVE, 1.0),
    reference_logprobs=REFERENCE_LOGPROBS,
)


def test_arrays_have_their_types_and_nobody_can_write_to_them() -> None:
    for record in (ANSWER, pickle.loads(pickle.dumps(ANSWER)), dataclasses.replace(ANSWER)):
        types = {name: vars(record)[name].dtype.name for name in ("token_ids", "logprobs")}
        assert types == {"token_ids": "int32", "logprobs": "float32"}
        for array in (record.token_ids, record.logprobs, record.trained, record.weight_version):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 1


def test_the_caller_s_array_is_not_shared() -> None:
    tokens = numpy.array([1, 2], dtype=numpy.int32)
    completion = Completion(tokens, [0.0, 0.0], "", True)
    tokens[0] = 7
    assert completion.token_ids.tolist() == [1, 2]


def test_a_token_takes_13_bytes() -> None:
    arrays = (ANSWER.token_ids, ANSWER.logprobs, ANSWER.trained, ANSWER.weight_version)
    assert sum(array.nbytes for array in arrays) == 5 * 13


def test_segments_are_cut_where_the_mask_changes() -> None:
    assert ANSWER.segments == (Segment(0, 2, True), Segment(2, 4, False), Segment(4, 5, True))
    assert Completion([], [], "", True).segments == ()
    assert Completion([5], [0.0], "", True).segments == (Segment(0, 1, True),)


def test_only_trained_tokens_count() -> None:
    context = dataclasses.replace(ANSWER, trained=numpy.zeros(5, dtype=numpy.bool_))
    table = RolloutTable.of([ROLLOUT, dataclasses.replace(ROLLOUT, completion=context)])
    assert table.num_tokens_R.tolist() == [3, 0]
    assert table.label_R.tolist() == [1, -1], "nothing of it is trained, so it is excluded"


def test_records_are_equal_by_value() -> None:
    assert dataclasses.replace(ROLLOUT) == pickle.loads(pickle.dumps(ROLLOUT)) == ROLLOUT

    changes: dict[str, Any] = {
        "token_ids": [8, 2, 40, 41, 7],
        "logprobs": [0.0] * 5,
        "trained": None,
        "weight_version": 4,
        "text": "8",
    }

    for name, value in changes.items():
        changed = dataclasses.replace(ANSWER, **{name: value})
        assert changed != ANSWER, name
        assert dataclasses.replace(ROLLOUT, completion=changed) != ROLLOUT, name


def test_rows_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 token_ids but 1 logprobs"):
        Completion([1, 2], [0.0], "", True)
    with pytest.raises(ValueError, match="2 token_ids but 3 trained"):
        Completion([1, 2], [0.0, 0.0], "", True, [True] * 3)


def test_a_status_is_its_text() -> None:
    assert json.dumps([Status.OK, Status.LOST]) == '["ok", "lost"]'
    assert f"status/{Status.TIMEOUT}" == "status/timeout" and str(Status.WRONG) == "wrong"
    text: str = Status.EMPTY
    assert text == "empty" and "empty" in {Status.EMPTY} and Status.EMPTY in {"empty"}
    assert {Status.SCORE: 1}["score"] == 1  # type: ignore[index]
    assert pickle.loads(pickle.dumps(Status.OK)) is Status.OK


def test_a_label_is_its_number() -> None:
    assert [POSITIVE, NEGATIVE, EXCLUDED] == [1, 0, -1]
    assert json.dumps(list(Label)) == "[1, 0, -1]"
    assert torch.tensor([POSITIVE, EXCLUDED]).tolist() == [1, -1]
    assert torch.full((1,), EXCLUDED).dtype == torch.int64


def test_a_status_knows_whether_its_check_failed_or_never_ran() -> None:
    assert {s for s in Status if s.failed} == {"timeout", "crashed", "lost"}
    assert {s for s in Status if s.unchecked} == {"overlong", "empty"}


def test_a_verdict_takes_names_and_numbers_and_refuses_unknown_ones() -> None:
    verdict = Verdict("lost", -1, None)  # type: ignore[arg-type]
    assert verdict.status is Status.LOST and verdict.label is EXCLUDED
    with pytest.raises(ValueError, match="'lots' is not a valid Status"):
        Verdict("lots", 1, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 is not a valid Label"):
        Verdict(Status.OK, 2, None)  # type: ignore[arg-type]
