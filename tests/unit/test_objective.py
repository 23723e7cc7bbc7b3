"""The REAL objective against numbers worked out by hand, the printed equations, autograd and finite
differences.

Legend: R rollouts, G groups. Everything is float64 unless the test is about precision.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_real.objective import grpo_weights, real_loss, real_weights
from megatron_real.objective.real import OneClassGroups, Variant, training_rollouts

VARIANTS: list[Variant] = ["anchored", "vanilla", "bce"]
RULES: list[OneClassGroups] = ["skip", "keep"]
NAN = math.nan
INF = math.inf
TAU = 0.5


def printed_loss(
    score: list[float],
    label: list[int],
    group: list[int],
    *,
    tau: float = TAU,
    variant: Variant = "anchored",
    one_class_groups: OneClassGroups = "skip",
    num_groups: int | None = None,
) -> float:
    """Returns Eq. 8, 2 or 11 exactly as printed, in Python floats, one group at a time.

    It shares no code with the library.
    """
    total = 0.0
    counted = 0
    for g in set(group):
        plus = [s for s, y, h in zip(score, label, group, strict=True) if h == g and y == 1]
        minus = [s for s, y, h in zip(score, label, group, strict=True) if h == g and y == 0]
        counted += bool(plus or minus)
        if one_class_groups == "skip" and not (plus and minus):
            continue
        sum_plus = sum(math.exp(-s / tau) for s in plus)
        sum_minus = sum(math.exp(s / tau) for s in minus)
        if variant == "anchored":
            total += math.log(1 + sum_plus) + math.log(1 + sum_minus)
        elif variant == "vanilla":
            total += math.log(1 + sum_minus * sum_plus)
        else:
            total -= sum(math.log(1 / (1 + math.exp(-s / tau))) for s in plus)
            total -= sum(math.log(1 - 1 / (1 + math.exp(-s / tau))) for s in minus)
    return total / (num_groups or counted or 1)


def batch(
    *groups: tuple[list[float], list[int]], ids: list[int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns (score_R, label_R, group_R) of groups that are given as (scores, labels)."""
    ids = ids or list(range(len(groups)))
    score = [s for scores, _ in groups for s in scores]
    label = [y for _, labels in groups for y in labels]
    group = [g for g, (scores, _) in zip(ids, groups, strict=True) for _ in scores]
    return torch.tensor(score, dtype=torch.float64), torch.tensor(label), torch.tensor(group)


# Unequal sizes; an excluded rollout; both kinds of one-class group, one by exclusion; a wholly
# excluded group.
MIXED = batch(
    ([0.3, -0.2, 0.1, 0.7, -0.4], [1, 0, 1, 0, 0]),
    ([-0.6, 0.2, 9.0], [0, 1, -1]),
    ([0.5, 0.25], [1, 1]),
    ([0.1, -0.3, 5.0], [0, 0, -1]),
    ([1.0, 2.0], [-1, -1]),
    ([-0.9, 0.8, 0.4, 0.0], [1, 0, 0, 1]),
    ids=[7, -3, 10**12, 0, 4, 5],
)
NUM_LABELLED_GROUPS = 5


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Draws any label pattern, with the members of a group anywhere in the batch."""
    rows = draw(
        st.lists(
            st.tuples(st.floats(-3, 3), st.sampled_from([1, 0, -1]), st.integers(-2, 3)),
            min_size=1,
            max_size=14,
        )
    )
    score, label, group = zip(*rows, strict=True)
    return torch.tensor(score, dtype=torch.float64), torch.tensor(label), torch.tensor(group)


# Values


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        pytest.param(
            "anchored", 2.48490665, id="anchored: log(1 + 2) + log(1 + 3) = log 3 + log 4"
        ),
        pytest.param("vanilla", 1.94591015, id="vanilla: log(1 + 2 * 3) = log 7"),
        pytest.param("bce", 3.46573590, id="bce: 5 * log 2"),
    ],
)
def test_the_loss_of_two_correct_and_three_wrong_equals_that_computed_by_hand(
    variant: Variant, expected: float
) -> None:
    score, label, group = batch(([0.0] * 5, [1, 1, 0, 0, 0]))
    assert real_loss(score, label, group, variant=variant).item() == pytest.approx(
        expected, abs=1e-8
    )


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        # s = (tau log 2, tau log 3): e^(-s/tau) = 1/2 of the positive, e^(s/tau) = 3 of the
        # negative.
        pytest.param(
            "anchored", math.log(1.5) + math.log(4), id="anchored: log(1 + 1/2) + log(1 + 3)"
        ),
        pytest.param("vanilla", math.log(2.5), id="vanilla: log(1 + 3/2)"),
        pytest.param(
            "bce", math.log(1.5) + math.log(4), id="bce: as anchored for a group of one each"
        ),
    ],
)
def test_the_off_policy_loss_equals_that_computed_by_hand(
    variant: Variant, expected: float
) -> None:
    score, label, group = batch(([TAU * math.log(2), TAU * math.log(3)], [1, 0]))
    assert real_loss(score, label, group, variant=variant).item() == pytest.approx(
        expected, abs=1e-12
    )


def test_the_weights_equal_those_computed_by_hand() -> None:
    # Positives: e^(-s/tau) = 1/2 and 4, so p = 1/11 and 8/11. Negatives: e^(s/tau) = 3 and 1, so p
    # = 3/5 and 1/5. |w| = p / tau = 2 p.
    score, label, group = batch(
        ([TAU * math.log(2), -TAU * math.log(4), TAU * math.log(3), 0.0], [1, 1, 0, 0])
    )
    expected = torch.tensor([-2 / 11, -16 / 11, 6 / 5, 2 / 5], dtype=torch.float64)
    torch.testing.assert_close(real_weights(score, label, group), expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("num_plus", "num_minus"), [(1, 1), (2, 3), (7, 1), (5, 11)])
@pytest.mark.parametrize("tau", [0.5, 0.3])
def test_on_policy_weights_equal_the_analytic_ones(
    dtype: torch.dtype, num_plus: int, num_minus: int, tau: float
) -> None:
    label = torch.tensor([1] * num_plus + [0] * num_minus)
    score = torch.zeros(len(label), dtype=dtype)
    group = torch.zeros_like(label)

    # dL/ds at score 0: (positive, negative)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    analytic: dict[Variant, tuple[float, float]] = {
        "anchored": (-1 / (tau * (1 + num_plus)), 1 / (tau * (1 + num_minus))),
        "vanilla": (
            -num_minus / (tau * (1 + num_plus * num_minus)),
            num_plus / (tau * (1 + num_plus * num_minus)),
        ),
        "bce": (-1 / (2 * tau), 1 / (2 * tau)),
    }

    for variant, (plus, minus) in analytic.items():
        expected = torch.tensor([plus] * num_plus + [minus] * num_minus, dtype=dtype)
        weight = real_weights(score, label, group, tau=tau, variant=variant)
        torch.testing.assert_close(
            weight, expected, atol=0, rtol=tolerance, msg=partial("{}: {}".format, variant)
        )


@pytest.mark.parametrize("one_class_groups", RULES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_the_loss_equals_the_printed_equation(
    variant: Variant, one_class_groups: OneClassGroups, tau: float
) -> None:
    score, label, group = MIXED
    options: dict[str, Any] = {"tau": tau, "variant": variant, "one_class_groups": one_class_groups}
    expected = printed_loss(score.tolist(), label.tolist(), group.tolist(), **options)
    assert real_loss(score, label, group, **options).item() == pytest.approx(expected, rel=1e-12)


@settings(max_examples=60)
@given(batches(), st.sampled_from(VARIANTS), st.sampled_from(RULES))
def test_the_loss_equals_the_printed_equation_for_any_labels(
    rows: tuple[Tensor, Tensor, Tensor], variant: Variant, one_class_groups: OneClassGroups
) -> None:
    score, label, group = rows
    options: dict[str, Any] = {"variant": variant, "one_class_groups": one_class_groups}
    expected = printed_loss(score.tolist(), label.tolist(), group.tolist(), **options)
    assert real_loss(score, label, group, **options).item() == pytest.approx(
        expected, rel=1e-10, abs=1e-13
    )


# Gradients


@pytest.mark.parametrize("one_class_groups", RULES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_groups", [None, 13])
def test_the_closed_form_equals_autograd_and_finite_differences(
    variant: Variant, one_class_groups: OneClassGroups, num_groups: int | None
) -> None:
    score, label, group = MIXED
    options: dict[str, Any] = {
        "tau": 0.4,
        "variant": variant,
        "one_class_groups": one_class_groups,
        "num_groups": num_groups,
    }
    weight = real_weights(score, label, group, **options)

    leaf = score.clone().requires_grad_()
    (autograd,) = torch.autograd.grad(real_loss(leaf, label, group, **options), leaf)
    torch.testing.assert_close(weight, autograd, atol=1e-14, rtol=1e-12)

    def printed(values: Tensor) -> float:
        return printed_loss(values.tolist(), label.tolist(), group.tolist(), **options)

    step = 1e-6
    differences = [
        (printed(score + step * e) - printed(score - step * e)) / (2 * step)
        for e in torch.eye(len(score))
    ]

    torch.testing.assert_close(
        weight, torch.tensor(differences, dtype=torch.float64), atol=1e-8, rtol=1e-6
    )
    assert weight.abs().max() > 0.01, "a test of zeros proves nothing"


@settings(max_examples=60)
@given(
    batches(), st.sampled_from(VARIANTS), st.sampled_from(RULES), st.sampled_from([0.05, 0.5, 3.0])
)
def test_the_weights_equal_autograd_with_the_right_sign_and_within_the_bound(
    rows: tuple[Tensor, Tensor, Tensor],
    variant: Variant,
    one_class_groups: OneClassGroups,
    tau: float,
) -> None:
    score, label, group = rows
    options: dict[str, Any] = {
        "tau": tau,
        "variant": variant,
        "one_class_groups": one_class_groups,
        "num_groups": 1,
    }
    leaf = score.clone().requires_grad_()
    (autograd,) = torch.autograd.grad(real_loss(leaf, label, group, **options), leaf)
    weight = real_weights(score, label, group, **options)

    torch.testing.assert_close(weight, autograd, atol=1e-13, rtol=1e-10)
    assert weight.abs().max() <= 1 / tau
    assert (weight[label == 1] <= 0).all()
    assert (weight[label == 0] >= 0).all()
    assert (weight[label == -1] == 0).all()


def test_the_weights_equal_eq_9_and_10_as_printed() -> None:
    score, label, group = MIXED
    weight = real_weights(score, label, group, one_class_groups="keep", num_groups=1)
    for k in range(len(score)):
        if label[k] == -1:
            continue
        sign = -1 if label[k] == 1 else 1  # positives e^(-s/tau), negatives e^(s/tau)
        others = [
            i for i in range(len(score)) if i != k and group[i] == group[k] and label[i] == label[k]
        ]
        c = 1 + sum(math.exp(sign * score[i] / TAU) for i in others)
        expected = sign / TAU / (1 + c * math.exp(-sign * score[k] / TAU))
        assert weight[k].item() == pytest.approx(expected, rel=1e-12)


def test_the_bound_of_the_weights_is_reached_by_a_hopeless_mistake() -> None:
    score, label, group = batch(([-50.0, 50.0], [1, 0]))
    for variant in VARIANTS:
        weight = real_weights(score, label, group, variant=variant)
        torch.testing.assert_close(
            weight, torch.tensor([-2.0, 2.0], dtype=torch.float64), atol=1e-12, rtol=0
        )


def test_splitting_a_group_changes_its_gradient() -> None:
    """Negative control: the loss couples the rollouts of a group, so averaging it over parts gives
    another gradient.
    """
    score, label, group = batch(
        ([0.3, -0.2, 0.1, 0.7, -0.4, 0.2, -0.1, 0.0], [1, 0, 1, 0, 1, 1, 0, 0])
    )
    whole = real_weights(score, label, group)
    halves = (
        torch.cat([real_weights(score[h], label[h], group[h]) for h in (slice(0, 4), slice(4, 8))])
        / 2
    )
    assert (halves - whole).norm() / whole.norm() > 0.1


def test_the_surrogate_has_the_gradient_of_the_loss() -> None:
    """The backward pass of sum_k w_k * s_k, in parts and out of order, gives the loss's gradient of
    the parameters.
    """
    _, label, group = MIXED
    features = torch.randn(
        len(label), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    theta = torch.tensor([0.2, -0.1, 0.3], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(real_loss(features @ theta, label, group), theta)
    weight = real_weights(features @ theta, label, group)
    assert not weight.requires_grad
    for piece in torch.randperm(len(label), generator=torch.Generator().manual_seed(1)).split(4):
        (weight[piece] * (features[piece] @ theta)).sum().backward()
    torch.testing.assert_close(theta.grad, expected, atol=1e-14, rtol=1e-12)


# Groups, exclusion, the denominator


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("label", [[1, 1, 1], [0, 0, 0], [1, -1, 1], [0, -1, -1]], ids=str)
def test_a_group_of_one_class_is_skipped_or_kept_by_the_setting(
    variant: Variant, label: list[int]
) -> None:
    rows = batch(([0.2, -0.4, 0.6], label))
    assert real_loss(*rows, variant=variant).item() == 0
    assert real_weights(*rows, variant=variant).abs().max() == 0
    kept = real_loss(*rows, variant=variant, one_class_groups="keep").item()
    expected = printed_loss(*(r.tolist() for r in rows), variant=variant, one_class_groups="keep")
    assert kept == pytest.approx(expected, rel=1e-12)
    assert (kept > 0) == (variant != "vanilla"), (
        "Eq. 2 multiplies the sides: one of them empty leaves log(1 + 0)"
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_skipped_groups_count_and_excluded_ones_do_not(variant: Variant) -> None:
    trained = ([0.3, -0.2], [1, 0])
    alone = real_loss(*batch(trained), variant=variant)
    with_one_class = real_loss(*batch(trained, ([0.5, 0.1], [0, 0])), variant=variant)
    with_excluded = real_loss(*batch(trained, ([0.5, 0.1], [-1, -1])), variant=variant)
    assert with_one_class == alone / 2
    assert with_excluded == alone


@pytest.mark.parametrize("one_class_groups", RULES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("poison", [NAN, INF, -INF, 1e300])
def test_excluded_values_contribute_exactly_nothing(
    variant: Variant, one_class_groups: OneClassGroups, poison: float
) -> None:
    score, label, group = MIXED
    options: dict[str, Any] = {"variant": variant, "one_class_groups": one_class_groups}
    dirty = torch.where(label == -1, poison, score).requires_grad_()
    loss = real_loss(dirty, label, group, **options)
    (gradient,) = torch.autograd.grad(loss, dirty)

    kept = label != -1
    clean = score[kept].requires_grad_()
    clean_loss = real_loss(clean, label[kept], group[kept], **options)
    (clean_gradient,) = torch.autograd.grad(clean_loss, clean)

    assert torch.equal(loss, clean_loss)
    assert torch.equal(gradient[kept], clean_gradient)
    assert (gradient[~kept] == 0).all()

    weight = real_weights(dirty, label, group, **options)
    assert torch.equal(weight[kept], real_weights(clean, label[kept], group[kept], **options))
    assert (weight[~kept] == 0).all()


def test_a_nan_of_a_labelled_rollout_is_not_hidden() -> None:
    """Negative control: a broken model must show, and only in its own group."""
    score, label, group = batch(([NAN, 0.1], [1, 0]), ([0.2, 0.1], [1, 0]))
    assert real_loss(score, label, group).isnan()
    weight = real_weights(score, label, group)
    assert weight[0].isnan()
    assert weight[2:].isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("labels", [[], [-1, -1, -1]], ids=["no rollouts", "all excluded"])
def test_nothing_to_learn_is_exactly_zero_and_still_differentiable(
    variant: Variant, labels: list[int]
) -> None:
    score = torch.full((len(labels),), NAN, requires_grad=True)
    label = torch.tensor(labels, dtype=torch.long)
    loss = real_loss(score, label, label, variant=variant)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, score)
    assert torch.equal(gradient, torch.zeros_like(score))
    assert torch.equal(real_weights(score, label, label, variant=variant), torch.zeros(len(label)))


@settings(max_examples=40)
@given(
    batches(), st.randoms(use_true_random=False), st.sampled_from(VARIANTS), st.sampled_from(RULES)
)
def test_order_and_group_names_do_not_matter(
    rows: tuple[Tensor, Tensor, Tensor],
    random: Random,
    variant: Variant,
    one_class_groups: OneClassGroups,
) -> None:
    score, label, group = rows
    options: dict[str, Any] = {"variant": variant, "one_class_groups": one_class_groups}
    order = torch.tensor(random.sample(range(len(score)), len(score)))
    names = dict(zip(range(-2, 4), random.sample(range(-(10**9), 10**9), 6), strict=True))
    renamed = torch.tensor([names[g] for g in group.tolist()])
    moved = (score[order], label[order], renamed[order])

    torch.testing.assert_close(
        real_loss(*moved, **options), real_loss(*rows, **options), atol=1e-14, rtol=1e-12
    )
    torch.testing.assert_close(
        real_weights(*moved, **options),
        real_weights(*rows, **options)[order],
        atol=1e-14,
        rtol=1e-12,
    )


def test_groups_are_independent() -> None:
    score, label, group = MIXED
    weight = real_weights(score, label, group, num_groups=1)
    changed = torch.where(group == 7, score * -2, score)
    weight_changed = real_weights(changed, label, group, num_groups=1)
    assert torch.equal(weight_changed[group != 7], weight[group != 7])
    assert not torch.allclose(weight_changed[group == 7], weight[group == 7])


@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_with_the_global_denominator_add_up(variant: Variant) -> None:
    score, label, group = MIXED
    part = (group == 7) | (group == 4)
    whole = real_loss(score, label, group, variant=variant)
    parts = [
        real_loss(score[p], label[p], group[p], variant=variant, num_groups=NUM_LABELLED_GROUPS)
        for p in (part, ~part)
    ]

    torch.testing.assert_close(sum(parts), whole, atol=1e-15, rtol=1e-13)

    averaged = torch.stack(
        [real_loss(score[p], label[p], group[p], variant=variant) for p in (part, ~part)]
    ).mean()
    assert abs(averaged / whole - 1) > 0.1, "negative control: an average of averages"


@pytest.mark.parametrize(
    ("variant", "one_class_groups", "silent_groups"),
    [
        ("anchored", "skip", [10**12, 0, 4]),
        ("anchored", "keep", [4]),
        ("bce", "keep", [4]),
        ("vanilla", "keep", [10**12, 0, 4]),
    ],
)
def test_training_rollouts_are_those_with_a_weight(
    variant: Variant, one_class_groups: OneClassGroups, silent_groups: list[int]
) -> None:
    score, label, group = MIXED
    options: dict[str, Any] = {"variant": variant, "one_class_groups": one_class_groups}
    trains, num_groups = training_rollouts(label, group, **options)
    assert torch.equal(trains, (label != -1) & ~torch.isin(group, torch.tensor(silent_groups)))
    assert torch.equal(trains, real_weights(score, label, group, **options) != 0)
    assert num_groups == NUM_LABELLED_GROUPS
    dropped = real_weights(
        score[trains], label[trains], group[trains], **options, num_groups=num_groups
    )
    assert torch.equal(dropped, real_weights(score, label, group, **options)[trains])


def test_labels_and_groups_may_have_any_number_type() -> None:
    score, label, group = batch(([0.3, -0.2, 0.9], [1, 0, 0]))
    expected = real_weights(score, label, group)
    for other in (label.bool(), label.float(), label.to(torch.int8)):
        assert torch.equal(real_weights(score, other, group.to(torch.uint8)), expected)


# Precision


@pytest.mark.parametrize("one_class_groups", RULES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_loss_and_weights_are_finite_and_bounded_at_extreme_scores(
    variant: Variant, one_class_groups: OneClassGroups, ratio: float
) -> None:
    """Tries every label pattern of four rollouts at +-ratio * tau, in float32."""
    patterns = torch.cartesian_prod(*[torch.tensor([1, 0, -1])] * 4).repeat(3, 1)
    signs = torch.tensor([[1, -1, 1, -1], [1, 1, 1, 1], [-1, -1, -1, -1]]).repeat_interleave(81, 0)
    score = (signs * ratio * TAU).float().flatten().requires_grad_()
    label = patterns.flatten()
    group = torch.arange(len(patterns)).repeat_interleave(4)
    options: dict[str, Any] = {
        "variant": variant,
        "one_class_groups": one_class_groups,
        "num_groups": 1,
    }
    loss = real_loss(score, label, group, **options)
    (gradient,) = torch.autograd.grad(loss, score)
    weight = real_weights(score, label, group, **options)

    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert loss > ratio, "some pattern is all wrong"
    assert gradient.isfinite().all()
    assert weight.abs().max() <= 1 / TAU
    assert weight.abs().max() > 0.3 / TAU
    torch.testing.assert_close(gradient, weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_weights_are_accurate_far_from_zero(variant: Variant) -> None:
    # Two positives 0.25 apart at z ~ 1e4: a backward through the rounded log-sum-exp would be 1e-3
    # off.
    score, label, group = batch(([-5000.0, -4999.75, 0.0], [1, 1, 0]))
    expected = real_weights(score, label, group, variant=variant)
    leaf = score.float().requires_grad_()
    (gradient,) = torch.autograd.grad(real_loss(leaf, label, group, variant=variant), leaf)
    torch.testing.assert_close(gradient.double(), expected, atol=0, rtol=1e-6)
    torch.testing.assert_close(
        real_weights(leaf, label, group, variant=variant).double(), expected, atol=0, rtol=1e-6
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_keeps_the_tail_beyond_a_logit_of_20(variant: Variant) -> None:
    # The tail e^-z that F.softplus drops above 20. With z+ = 25: dL/ds of the positive misses 1/tau
    # by the factor 1 / (1 + e^25) = 1.4e-11, all of it far above float64's rounding.
    score, label, group = batch(([-25 * TAU, 0.0], [1, 0]))
    leaf = score.requires_grad_()
    (gradient,) = torch.autograd.grad(real_loss(leaf, label, group, variant=variant), leaf)
    missing = 1 + gradient[0].item() * TAU
    assert missing == pytest.approx(1 / (1 + math.exp(25)), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_scores_are_computed_in_float32(dtype: torch.dtype) -> None:
    score, label, group = MIXED
    low = score.to(dtype)
    assert torch.equal(real_loss(low, label, group), real_loss(low.float(), label, group))
    assert torch.equal(real_weights(low, label, group), real_weights(low.float(), label, group))
    assert (
        real_loss(low, label, group).dtype == real_weights(low, label, group).dtype == torch.float32
    )


# Errors


@pytest.mark.parametrize("function", [real_loss, real_weights])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"tau": 0.0}, "tau must be finite and > 0, got 0.0.", id="tau zero"),
        pytest.param({"tau": -0.5}, "tau must be finite and > 0, got -0.5.", id="tau negative"),
        pytest.param({"tau": NAN}, "tau must be finite and > 0, got nan.", id="tau nan"),
        pytest.param({"tau": INF}, "tau must be finite and > 0, got inf.", id="tau inf"),
        pytest.param({"num_groups": 0}, "num_groups must be > 0, got 0.", id="num_groups zero"),
        pytest.param(
            {"num_groups": -2}, "num_groups must be > 0, got -2.", id="num_groups negative"
        ),
        pytest.param(
            {"variant": "dpo"},
            "variant must be one of anchored, vanilla, bce, got 'dpo'.",
            id="variant",
        ),
        pytest.param(
            {"one_class_groups": "drop"},
            "one_class_groups must be skip or keep, got 'drop'.",
            id="rule",
        ),
        pytest.param(
            {"label_R": torch.tensor([1, 0, 2])},
            "label_R must hold 1 (correct), 0 (wrong) or -1 (excluded), got 2 at index 2.",
            id="label two",
        ),
        pytest.param(
            {"label_R": torch.tensor([1.0, 0.5, 0.0])},
            "label_R must hold 1 (correct), 0 (wrong) or -1 (excluded), got 0.5 at index 1.",
            id="label half",
        ),
        pytest.param(
            {"label_R": torch.tensor([1.0, NAN, 0.0])},
            "label_R must hold 1 (correct), 0 (wrong) or -1 (excluded), got nan at index 1.",
            id="label nan",
        ),
        pytest.param(
            {"group_R": torch.zeros(3)},
            "group_R must hold integers, got torch.float32.",
            id="group float",
        ),
        pytest.param(
            {"group_R": torch.zeros(2).long()},
            "label_R and group_R must both be [R], got [3] and [2].",
            id="group shape",
        ),
        pytest.param(
            {"label_R": torch.ones(4).long()},
            "score_R and label_R must both be [R], got [3] and [4].",
            id="label shape",
        ),
        pytest.param(
            {"score_R": torch.zeros(1, 3), "label_R": torch.zeros(1, 3)},
            "score_R and label_R must both be [R], got [1, 3] and [1, 3].",
            id="two-dimensional",
        ),
    ],
)
def test_bad_arguments_are_named(
    function: Callable[..., Tensor], change: dict[str, Any], message: str
) -> None:
    rows = {
        "score_R": torch.zeros(3),
        "label_R": torch.tensor([1, 0, 0]),
        "group_R": torch.zeros(3).long(),
    }
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        function(**(rows | change))


# Baseline, and the figure


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.7])
def test_grpo_weights_are_autograd_of_the_clipped_loss(advantage: float) -> None:
    log_ratio = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64, requires_grad=True)
    ratio = log_ratio.exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).sum()
    (expected,) = torch.autograd.grad(loss, log_ratio)
    weight = grpo_weights(log_ratio.detach(), torch.full((31,), advantage, dtype=torch.float64))
    torch.testing.assert_close(weight, expected, atol=1e-14, rtol=1e-14)
    assert 0 < (weight == 0).sum() < 31


def test_figure_1_draws_the_curves_of_the_paper(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "tools" / "plot_gradient_weights.py"
    spec = importlib.util.spec_from_file_location("plot_gradient_weights", source)
    assert spec is not None and spec.loader is not None

    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    score = torch.tensor([-1.0, 0.0, 0.5], dtype=torch.float64)
    plus = tool.real_magnitude(score, 1)
    minus = tool.real_magnitude(score, 0)

    # tau = 0.5, C = 4: 2 / (1 + 4 e^(2s)) for a positive, 2 / (1 + 4 e^(-2s)) for a negative.
    torch.testing.assert_close(plus, 2 / (1 + 4 * torch.exp(2 * score)), atol=1e-14, rtol=0)
    torch.testing.assert_close(minus, 2 / (1 + 4 * torch.exp(-2 * score)), atol=1e-14, rtol=0)
    assert all(a > b for a, b in pairwise(plus.tolist()))

    out = tmp_path / "new" / "figure.png"
    tool.draw(out)
    assert out.read_bytes().startswith(b"\x89PNG")
