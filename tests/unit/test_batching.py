"""Minibatches keep their denominators, and plans keep every promise of their placement."""

from __future__ import annotations

from typing import Literal
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_real.batching import Layout, minibatches, plan
from megatron_real.batching.placement import _Bin, _Packing
from megatron_real.objective import make_objective, real_weights
from megatron_real.objective.real import OneClassGroups
from megatron_real.records import Completion, Label, Prompt, Rollout, Status, Verdict
from tests.unit.plain_packing import plain_micro_batches


def rollout(group: int, label: int, tokens: int = 3) -> Rollout:
    prompt = Prompt(str(group), "", (1, 2), ("1",))
    return Rollout(
        prompt,
        group,
        0,
        Completion((5,) * tokens, (0.0,) * tokens, "", True),
        Verdict(Status.OK, Label(label), 1.0),
    )


def test_denominator_counts_groups_with_a_labelled_rollout() -> None:
    labels = {0: [1, 0], 1: [1, 1], 2: [-1, -1], 3: [0, -1, 1]}
    rollouts = [rollout(g, y) for g, ys in labels.items() for y in ys]
    (skip,) = minibatches(rollouts, make_objective("real"), groups_per_minibatch=4)
    assert (skip.num_groups, skip.kept) == (3, (0, 1, 6, 8))
    keeping = make_objective("real", one_class_groups="keep")
    (keep,) = minibatches(rollouts, keeping, groups_per_minibatch=4)
    assert (keep.num_groups, keep.kept) == (3, (0, 1, 2, 3, 6, 8))


@given(
    labels=st.lists(
        st.lists(st.sampled_from([1, 0, -1]), min_size=1, max_size=5), min_size=1, max_size=6
    ),
    one_class=st.sampled_from(["skip", "keep"]),
)
def test_minibatches_keep_exactly_the_rollouts_with_a_weight(
    labels: list[list[int]], one_class: OneClassGroups
) -> None:
    """Batching drops rollouts before there are scores, so it must agree with the objective on which
    rollouts have no weight.
    """
    rollouts = [rollout(g, y) for g, ys in enumerate(labels) for y in ys]
    objective = make_objective("real", one_class_groups=one_class)
    (only,) = minibatches(rollouts, objective, groups_per_minibatch=9)
    label_R, group_R = (
        torch.tensor([getattr(r, name) for r in rollouts]) for name in ("label", "group")
    )
    weight_R = real_weights(
        torch.zeros(len(rollouts)), label_R, group_R, one_class_groups=one_class
    )
    assert weight_R.nonzero().flatten().tolist() == list(only.kept)


def test_an_empty_response_is_excluded() -> None:
    rollouts = [rollout(0, 1), rollout(0, 0, tokens=0)]
    (only,) = minibatches(rollouts, make_objective("real"), groups_per_minibatch=1)
    assert (only.num_groups, only.kept) == (1, ())


def test_minibatches_hold_whole_groups_in_order() -> None:
    rollouts = [rollout(g, y) for y in (1, 0) for g in (7, 3, 5)]
    cut = minibatches(rollouts, make_objective("real"), groups_per_minibatch=2)
    assert [[r.group for r in m.rollouts] for m in cut] == [[7, 7, 3, 3], [5, 5]]


Placement = Literal["auto", "intact", "dp", "split"]


@given(
    sizes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=0, max_size=12),
    dp=st.integers(1, 4),
    budget=st.integers(40, 240),
    padded=st.booleans(),
    multiple=st.sampled_from([1, 2, 4]),
    placement=st.sampled_from(["auto", "intact", "dp", "split"]),
)
@settings(max_examples=300)
def test_plans_keep_their_promises(
    sizes: list[list[int]], dp: int, budget: int, padded: bool, multiple: int, placement: Placement
) -> None:
    lengths = [n for group in sizes for n in group]
    groups = [g for g, group in enumerate(sizes) for _ in group]
    layout = Layout(dp=dp, max_tokens=budget, padded=padded, count_multiple=multiple)
    try:
        made = plan(lengths, groups, layout=layout, placement=placement, needs_scores=True)
    except ValueError:
        assert placement in ("intact", "dp")  # only these can be impossible
        return
    ranks = made.micro_batches

    assert sorted(i for rank in ranks for micro in rank for i in micro) == list(range(len(lengths)))
    assert len(ranks) == dp and len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) > 0 and len(ranks[0]) % multiple == 0

    for rank in ranks:
        for micro in filter(None, rank):
            tokens = [lengths[i] for i in micro]
            assert (max(tokens) * len(tokens) if padded else sum(tokens)) <= budget

    for g in set(groups):
        where = {
            (r, m)
            for r, rank in enumerate(ranks)
            for m, micro in enumerate(rank)
            for i in micro
            if groups[i] == g
        }
        if made.placement == "intact":
            assert len(where) == 1
        if made.placement == "dp":
            assert len({m for _, m in where}) == 1


def test_auto_takes_one_pass_when_groups_fit_and_two_when_they_do_not() -> None:
    layout = Layout(dp=2, max_tokens=100)
    fits = plan(
        [10] * 16, [i // 4 for i in range(16)], layout=layout, placement="auto", needs_scores=True
    )
    assert fits.placement in ("intact", "dp")
    too_big = plan([60] * 8, [0] * 8, layout=layout, placement="auto", needs_scores=True)
    assert too_big.placement == "split"


def test_a_sequence_beyond_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"120 tokens exceeds batch.max_tokens = 100"):
        plan([120], [0], layout=Layout(dp=1, max_tokens=100), placement="auto", needs_scores=False)


@given(
    sizes=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=10),
    dp=st.integers(1, 5),
    budget=st.integers(40, 160),
    padded=st.booleans(),
    multiple=st.sampled_from([1, 2]),
    placement=st.sampled_from(["intact", "dp", "split"]),
)
@settings(max_examples=150)
def test_fast_planning_makes_the_plans_of_the_plain_packing(
    sizes: list[list[int]], dp: int, budget: int, padded: bool, multiple: int, placement: Placement
) -> None:
    """Bounds of counts and full bins that are set aside make planning fast, and change no plan."""
    lengths = [n for group in sizes for n in group]
    groups = [g for g, group in enumerate(sizes) for _ in group]
    layout = Layout(dp=dp, max_tokens=budget, padded=padded, count_multiple=multiple)
    expected = plain_micro_batches(lengths, groups, layout, placement)
    try:
        made = plan(lengths, groups, layout=layout, placement=placement, needs_scores=True)
    except ValueError:
        assert expected is None
    else:
        assert made.micro_batches == expected


def test_planning_does_not_grow_with_ranks_times_sequences() -> None:
    """Counts comparisons of bins: for 8 times the ranks and 8 times the sequences there are about 8
    times as many, not 64.
    """

    def comparisons(dp: int) -> int:
        # Knuth's multiplicative hash: lengths that are spread evenly and the same in every run.
        lengths = [256 + (i * 2654435761) % 8192 for i in range(4 * dp)]
        layout = Layout(dp=dp, max_tokens=10240)
        with mock.patch.object(
            _Bin, "size_with", autospec=True, side_effect=_Bin.size_with
        ) as counted:
            plan(
                lengths,
                [i // 8 for i in range(4 * dp)],
                layout=layout,
                placement="auto",
                needs_scores=True,
            )
        return counted.call_count

    assert comparisons(256) < 12 * comparisons(32)


def test_a_group_above_the_budget_ends_the_attempt() -> None:
    """8 x 8,192 tokens never fit into one micro-batch, so `intact` tries no count of
    micro-batches.
    """
    packing = _Packing([8192] * 64, [i // 8 for i in range(64)], Layout(4, 10240), float)
    assert len(packing._counts("intact")) == 0
    assert list(packing._counts("split")) == [16]
