"""Sequence scores of padded and of packed tokens, whole and sharded."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_real.objective import sequence_scores

POISON = [math.nan, math.inf, -math.inf]


def test_scores_equal_those_computed_by_hand() -> None:
    # Differences 0.1, 0.3 -> mean 0.2; then -0.5 alone; the third sequence has no response token.
    logprob = torch.tensor([[-1.0, -2.0, 9.0], [7.0, -1.5, 9.0], [3.0, 3.0, 3.0]])
    old = torch.tensor([[-1.1, -2.3, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    expected = torch.tensor([0.2, -0.5, 0.0])
    torch.testing.assert_close(
        sequence_scores(logprob, old, mask=mask), expected, atol=1e-6, rtol=0
    )


@settings(max_examples=40)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 2**31), st.booleans())
def test_packed_and_padded_scores_equal_those_of_a_loop(
    lengths: list[int], seed: int, with_mask: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logprob, old = torch.randn(2, sum(lengths), dtype=torch.float64, generator=generator)
    keep = torch.ones(sum(lengths), dtype=torch.bool)
    if with_mask:
        keep = torch.rand(sum(lengths), generator=generator) < 0.6
    means = []
    for difference, mask in zip((logprob - old).split(lengths), keep.split(lengths), strict=True):
        values = difference[mask].tolist()
        # A sequence without a token has the score 0.
        means.append(math.fsum(values) / max(len(values), 1))
    expected = torch.tensor(means, dtype=torch.float64)

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    packed = sequence_scores(logprob, old, mask=keep if with_mask else None, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(packed, expected, atol=1e-14, rtol=1e-12)

    padded = [
        torch.nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True)
        for x in (logprob, old, keep)
    ]

    torch.testing.assert_close(
        sequence_scores(*padded[:2], mask=padded[2]), expected, atol=1e-14, rtol=1e-12
    )


def test_the_gradient_is_one_over_n_at_response_tokens() -> None:
    logprob = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    old = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([0, 1, 1, 1, 0, 1], dtype=torch.bool)
    scores = sequence_scores(logprob, old, mask=mask, cu_seqlens=torch.tensor([0, 3, 6]))
    (scores * torch.tensor([1.0, 10.0])).sum().backward()
    expected = torch.tensor([0, 0.5, 0.5, 5, 0, 5], dtype=torch.float64)
    assert logprob.grad is not None
    assert torch.equal(logprob.grad, expected)
    assert old.grad is None, "log pi_old is a constant"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("poison", POISON)
def test_masked_values_touch_neither_scores_nor_gradient(packed: bool, poison: float) -> None:
    mask = torch.tensor([[0, 1, 1], [0, 0, 1]], dtype=torch.bool)
    clean = torch.tensor([[0.0, 0.5, -1.0], [0.0, 0.0, 2.0]])
    layout: dict[str, Tensor] = {}
    shape: tuple[int, ...] = (2, 3)
    if packed:
        layout = {"cu_seqlens": torch.tensor([0, 3, 6])}
        shape = (6,)
    dirty = torch.where(mask, clean, poison).view(shape).requires_grad_()
    dirty_old = torch.where(mask, 0.25, poison).view(shape)
    scores = sequence_scores(dirty, dirty_old, mask=mask.view(shape), **layout)

    assert torch.equal(scores, torch.tensor([-0.5, 1.75]))

    scores.sum().backward()
    assert dirty.grad is not None
    assert torch.equal(dirty.grad, torch.tensor([0, 0.5, 0.5, 0, 0, 1.0]).view(shape))


def test_a_nan_of_a_response_token_is_not_hidden() -> None:
    logprob = torch.tensor([math.nan, 1.0, 2.0])
    scores = sequence_scores(logprob, torch.zeros(3), cu_seqlens=torch.tensor([0, 2, 3]))
    assert scores[0].isnan()
    assert scores[1] == 2


def test_shards_of_the_tokens_add_up() -> None:
    """In context parallelism each rank holds some tokens of each sequence and divides by the global
    count.
    """
    logprob, old = torch.randn(
        2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    whole = sequence_scores(logprob, old, cu_seqlens=torch.tensor([0, 4, 10]))
    num_tokens = torch.tensor([4, 6])

    # Rank 0: one token of the first sequence and five of the second; rank 1: the others, three and
    # one.
    shards = [([0, 5, 6, 7, 8, 9], [0, 1, 6]), ([1, 2, 3, 4], [0, 3, 4])]
    parts = [
        sequence_scores(
            logprob[i], old[i], cu_seqlens=torch.tensor(offsets), num_tokens_R=num_tokens
        )
        for i, offsets in shards
    ]

    torch.testing.assert_close(sum(parts), whole, atol=1e-15, rtol=1e-13)

    naive = [
        sequence_scores(logprob[i], old[i], cu_seqlens=torch.tensor(offsets))
        for i, offsets in shards
    ]

    assert ((sum(naive) / 2 - whole).abs() > 0.01).all(), "negative control: a mean of means"


def test_scores_of_low_precision_are_summed_in_float32() -> None:
    # 0.01 a token, 4096 tokens: a bfloat16 sum would stop growing at a few units.
    logprob = torch.full((4096,), 0.01, dtype=torch.bfloat16)
    scores = sequence_scores(logprob, torch.zeros_like(logprob), cu_seqlens=torch.tensor([0, 4096]))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, logprob[:1].float(), atol=0, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            {},
            "logprob must be [R, S] with a mask or [T] with cu_seqlens, got [6] with no mask.",
            id="no layout",
        ),
        pytest.param(
            {"mask": torch.ones(6)},
            "logprob must be [R, S] with a mask or [T] with cu_seqlens, got [6] with a mask.",
            id="packed without offsets",
        ),
        pytest.param(
            {"logprob": torch.zeros(2, 3), "cu_seqlens": torch.tensor([0, 6])},
            "logprob [T] goes with cu_seqlens [R + 1], got [2, 3] and [2].",
            id="padded with offsets",
        ),
        pytest.param(
            {"old_logprob": torch.zeros(5), "cu_seqlens": torch.tensor([0, 6])},
            "old_logprob must have the shape of logprob, [6], got [5].",
            id="old shape",
        ),
        pytest.param(
            {"mask": torch.ones(5), "cu_seqlens": torch.tensor([0, 6])},
            "mask must have the shape of logprob, [6], got [5].",
            id="mask shape",
        ),
        pytest.param(
            {"cu_seqlens": torch.tensor([0, 2, 6]), "num_tokens_R": torch.tensor([2, 3, 1])},
            "num_tokens_R must be [2], got [3].",
            id="counts",
        ),
        pytest.param(
            {"cu_seqlens": torch.tensor([0, 5])},
            "cu_seqlens must rise from 0 to the 6 tokens given, got [0, 5].",
            id="offsets short",
        ),
        pytest.param(
            {"cu_seqlens": torch.tensor([0, 4, 3, 6])},
            "cu_seqlens must rise from 0 to the 6 tokens given, got [0, 4, 3, 6].",
            id="offsets fall",
        ),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Tensor], message: str) -> None:
    given_arguments = {"logprob": torch.zeros(6), "old_logprob": torch.zeros(6)} | arguments
    logprob = given_arguments.pop("logprob")
    old_logprob = given_arguments.pop("old_logprob")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sequence_scores(logprob, old_logprob, **given_arguments)
