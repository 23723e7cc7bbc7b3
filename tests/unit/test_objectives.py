"""The objectives against values by hand, autograd and finite differences, with everything excluded
that can be.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_real import KlConfig, make_objective, objective_loss, token_weights
from megatron_real.objective.facts import RolloutTable
from megatron_real.objective.functions import kl_penalty
from megatron_real.objective.kl import kl_estimate
from megatron_real.objective.policy_gradient import PolicyGradient
from megatron_real.objective.registry import OBJECTIVES

ALL = list(OBJECTIVES)

# One group of three rollouts of 2, 1 and 3 tokens; the first is right. Log-ratios, all with old
# log-prob -1: rollout 0 (right)  +0.1, +0.3     rollout 1 (wrong)  -0.4     rollout 2 (wrong)  0.0,
# +0.2, -0.2
DELTA = [0.1, 0.3, -0.4, 0.0, 0.2, -0.2]
ROLLOUT_T = torch.tensor([0, 0, 1, 2, 2, 2])
LABEL_R = torch.tensor([1, 0, 0])
GROUP_R = torch.tensor([4, 4, 4])
OLD_T = torch.full((6,), -1.0, dtype=torch.float64)
LOGPROB_T = OLD_T + torch.tensor(DELTA, dtype=torch.float64)

# Rewards 1, 0, 0: mean 1/3, sum of squares 4/9 + 1/9 + 1/9 = 2/3, sample variance 1/3. So A =
# 2/sqrt(3), -1/sqrt(3) twice.
A_RIGHT = 2 / math.sqrt(3)
A_WRONG = -1 / math.sqrt(3)


def loss_of(name: str, **settings: Any) -> float:
    objective = make_objective(name, **settings)
    return float(objective_loss(objective, LOGPROB_T, OLD_T, ROLLOUT_T, LABEL_R, GROUP_R))


def test_grpo_equals_its_value_by_hand() -> None:
    """Ratios e^0.1 and e^0.3 clip at 1.2 where A > 0; e^-0.4 = 0.67 clips at 0.8 where A < 0; the
    third keeps 1, e^0.2 and e^-0.2 (0.819, within). Token means within a rollout, then the mean
    over 3.
    """
    right = -(math.exp(0.1) + 1.2) / 2 * A_RIGHT
    wrong_short = -0.8 * A_WRONG
    wrong_long = -(1 + math.exp(0.2) + math.exp(-0.2)) / 3 * A_WRONG
    assert loss_of("grpo") == pytest.approx((right + wrong_short + wrong_long) / 3, rel=1e-12)


def test_dr_grpo_equals_its_value_by_hand() -> None:
    """Advantages 2/3, -1/3, -1/3; sums of tokens over the constant 10, then the mean over 3."""
    right = -(math.exp(0.1) + 1.2) * 2 / 3
    wrong = (0.8 + 1 + math.exp(0.2) + math.exp(-0.2)) / 3
    assert loss_of("dr_grpo", max_tokens=10.0) == pytest.approx((right + wrong) / 30, rel=1e-12)


def test_dapo_equals_its_value_by_hand() -> None:
    """Upper bound 1.28 and one mean over the 6 tokens."""
    right = -(math.exp(0.1) + 1.28) * A_RIGHT
    wrong = -(0.8 + 1 + math.exp(0.2) + math.exp(-0.2)) * A_WRONG
    assert loss_of("dapo") == pytest.approx((right + wrong) / 6, rel=1e-12)
    # A single group: the mean over its tokens is the same.
    assert loss_of("dapo", token_mean="group") == pytest.approx((right + wrong) / 6, rel=1e-12)


def test_dapos_overlong_punishment_equals_its_value_by_hand() -> None:
    """max_tokens 3 and a buffer of 2: lengths 1, 2, 3 are punished by 0, 1/2, 1.

    Rewards 1/2, 0, -1: mean -1/6.
    """
    table = RolloutTable(LABEL_R, GROUP_R, LABEL_R.double(), torch.bincount(ROLLOUT_T))
    objective = make_objective("dapo", overlong_buffer=2, max_tokens=3)
    deviation = math.sqrt(((2 / 3) ** 2 + (1 / 6) ** 2 + (5 / 6) ** 2) / 2)
    expected = [2 / 3 / deviation, 1 / 6 / deviation, -5 / 6 / deviation]
    assert objective.facts(table).advantage_R.tolist() == pytest.approx(expected, rel=1e-12)


def test_gspo_equals_its_value_by_hand() -> None:
    """Scores 0.2, -0.4, 0: the first clips at 1.1 (A > 0), the second at 0.9 (A < 0),
    the third is 1.
    """
    expected = -(1.1 * A_RIGHT + 0.9 * A_WRONG + 1.0 * A_WRONG) / 3
    assert loss_of("gspo", clip_low=0.1, clip_high=0.1) == pytest.approx(expected, rel=1e-12)


def test_cispo_equals_its_value_by_hand() -> None:
    """Weights e^0.1 and 1.2 (bound), e^-0.4 (no lower bound), 1, 1.2 (e^0.2 = 1.22), e^-0.2,
    times A log pi.
    """
    weights = [math.exp(0.1), 1.2, math.exp(-0.4), 1.0, 1.2, math.exp(-0.2)]
    advantages = [A_RIGHT, A_RIGHT, A_WRONG, A_WRONG, A_WRONG, A_WRONG]
    terms = [-w * a * (delta - 1) for w, a, delta in zip(weights, advantages, DELTA, strict=True)]
    assert loss_of("cispo", clip_high=0.2) == pytest.approx(sum(terms) / 6, rel=1e-12)
    weights[2] = 0.7  # two-sided: e^-0.4 = 0.67 is raised
    terms = [-w * a * (delta - 1) for w, a, delta in zip(weights, advantages, DELTA, strict=True)]
    two_sided = loss_of("cispo", bounds="two_sided", clip_low=0.3, clip_high=0.2)
    assert two_sided == pytest.approx(sum(terms) / 6, rel=1e-12)


def test_sapo_equals_its_value_by_hand() -> None:
    def gate(delta: float, tau: float) -> float:
        return 4 / tau / (1 + math.exp(-tau * (math.exp(delta) - 1)))

    right = -(gate(0.1, 1.0) + gate(0.3, 1.0)) / 2 * A_RIGHT
    wrong_short = -gate(-0.4, 1.05) * A_WRONG
    wrong_long = -(gate(0.0, 1.05) + gate(0.2, 1.05) + gate(-0.2, 1.05)) / 3 * A_WRONG
    assert loss_of("sapo") == pytest.approx((right + wrong_short + wrong_long) / 3, rel=1e-12)


def test_disco_equals_its_value_by_hand() -> None:
    """Likelihoods -0.8, -1.4, -1.

    KL of old to new: the mean of -delta over 6 tokens is 0, below delta.
    """
    soft_mean = 2 * math.log((math.exp(-1.4 / 2) + math.exp(-1.0 / 2)) / 2)
    assert loss_of("disco", tau=2.0) == pytest.approx(-(-0.8 - soft_mean), rel=1e-12)


def test_disco_punishes_divergence() -> None:
    """With all log-probs 0.1 lower the KL is 0.1, and the penalty 10 / 2 * (0.1 -
    0.02)^2 is added.
    """
    objective = make_objective("disco", tau=2.0, beta=10.0, delta=0.02)
    lower_T = LOGPROB_T - 0.1
    loss = objective_loss(objective, lower_T, OLD_T, ROLLOUT_T, LABEL_R, GROUP_R)
    gap = loss_of("disco", tau=2.0)  # invariant under a common shift of all likelihoods
    assert float(loss) == pytest.approx(gap + 5 * 0.08**2, rel=1e-12)


def test_lpo_equals_its_value_by_hand() -> None:
    """Target softmax of R / std with std = 1/sqrt(3); policy softmax of the summed log-ratios 0.4,
    -0.4, 0.
    """
    root = math.sqrt(3)
    target = [math.exp(root), 1.0, 1.0]
    target = [t / sum(target) for t in target]
    policy = [math.exp(0.4), math.exp(-0.4), 1.0]
    policy = [p / sum(policy) for p in policy]
    forward = sum(t * math.log(t / p) for t, p in zip(target, policy, strict=True))
    reverse = sum(p * math.log(p / t) for t, p in zip(target, policy, strict=True))
    assert loss_of("lpo") == pytest.approx(forward, rel=1e-12)
    assert loss_of("lpo", divergence="reverse") == pytest.approx(reverse, rel=1e-12)


def test_conspo_equals_its_value_by_hand() -> None:
    """One right answer at -0.8 against -1.4 and -1, margin 0.1, tau 0.5."""
    contrast = math.log(1 + math.exp((-1.4 + 0.8 + 0.1) / 0.5) + math.exp((-1 + 0.8 + 0.1) / 0.5))
    assert loss_of("conspo", margin=0.1, tau=0.5) == pytest.approx(contrast, rel=1e-12)


def test_the_real_objective_equals_real_loss() -> None:
    """2 right and 3 wrong at score 0 give log 3 + log 4 = 2.48490665 (Eq. 8)."""
    old_T = torch.full((5,), -2.0, dtype=torch.float64)
    loss = objective_loss(
        make_objective("real"),
        old_T,
        old_T,
        torch.arange(5),
        torch.tensor([1, 1, 0, 0, 0]),
        torch.zeros(5, dtype=torch.int64),
    )
    assert float(loss) == pytest.approx(math.log(3) + math.log(4), rel=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_estimates_equal_their_values_by_hand(estimator: Any) -> None:
    """With pi 0.5 nats above the other: k1 = 0.5, k2 = 0.125, k3 = e^-0.5 - 1 + 0.5."""
    expected = {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 0.5}[estimator]
    value = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.5]), estimator)
    assert value.tolist() == pytest.approx([expected], rel=1e-6)


def minibatch(seed: int, *, spread: float = 0.5) -> dict[str, Any]:
    """Makes five groups: mixed ones, one of one class, one wholly excluded, and one with excluded
    rollouts of NaN.
    """
    labels = [1, 0, 0, 1, 1, 1, -1, -1, 0, 1, -1, 0, 1, 0]
    groups = [3, 3, 3, 3, 8, 8, 5, 5, 2, 2, 2, 2, 9, 9]
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 6, (len(labels),), generator=generator)
    rollout_T = torch.repeat_interleave(torch.arange(len(labels)), lengths)
    shape = rollout_T.shape
    old_T = -torch.rand(shape, generator=generator, dtype=torch.float64) * 3
    noise_T = torch.randn(shape, generator=generator, dtype=torch.float64)
    reference_T = old_T + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return {
        "logprob_T": old_T + spread * noise_T,
        "old_logprob_T": old_T,
        "rollout_T": rollout_T,
        "label_R": torch.tensor(labels),
        "group_R": torch.tensor(groups),
        "reference_T": reference_T,
    }


PENALTIES = {
    "none": KlConfig(),
    "reference": KlConfig(to="reference", coefficient=0.3),
    "old": KlConfig(to="old", estimator="k2", coefficient=0.3),
}


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("name", [n for n in ALL if n != "cispo"])
def test_token_weights_equal_finite_differences_of_the_loss(name: str, penalty: str) -> None:
    """Takes central differences of the loss in every token; CISPO's weights are constants and have
    no such test.
    """
    objective = make_objective(name, kl=PENALTIES[penalty])
    case = minibatch(seed=1)
    weight_T = token_weights(objective, **case)
    step = 1e-6

    for token in range(len(weight_T)):
        losses = []
        for sign in (1, -1):
            moved_T = case["logprob_T"].clone()
            moved_T[token] += sign * step
            losses.append(float(objective_loss(objective, **{**case, "logprob_T": moved_T})))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float(weight_T[token]) == pytest.approx(slope, rel=1e-5, abs=1e-8), token


@pytest.mark.parametrize("name", [n for n in ALL if make_objective(n).has_scores])
def test_closed_form_weights_equal_autograd(name: str) -> None:
    """Compares what the trainer takes from `score_weights` with autograd through the whole loss."""
    objective = make_objective(name)
    case = minibatch(seed=2)
    label_R = case["label_R"]
    group_R = case["group_R"]
    lengths_R = torch.bincount(case["rollout_T"], minlength=len(label_R))
    facts = objective.facts(RolloutTable(label_R, group_R, label_R.double(), lengths_R))

    def means(value_T: Tensor) -> Tensor:
        sums_R = torch.zeros(len(label_R), dtype=torch.float64)
        return sums_R.index_add(0, case["rollout_T"], value_T) / lengths_R

    score_R = means(case["logprob_T"] - case["old_logprob_T"])
    weight_R = objective.score_weights(score_R, means(case["old_logprob_T"]), facts)
    weight_T = token_weights(objective, **case)
    torch.testing.assert_close(
        weight_T, (weight_R / lengths_R)[case["rollout_T"]], rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("name", ALL)
def test_excluded_rollouts_change_no_weight(name: str) -> None:
    """NaN and inf in excluded rollouts and in their rewards change no weight, and get weight 0."""
    objective = make_objective(name, kl=PENALTIES["reference"])
    case = minibatch(seed=3)
    clean_T = token_weights(objective, **case)
    excluded_T = case["label_R"][case["rollout_T"]] == -1

    assert excluded_T.any() and (clean_T[excluded_T] == 0).all()

    rewards = case["label_R"].double()
    rewards[case["label_R"] == -1] = math.nan
    for key in ("logprob_T", "old_logprob_T", "reference_T"):
        case[key] = torch.where(excluded_T, math.nan, case[key])
    poisoned_T = token_weights(objective, **case, reward_R=rewards)

    assert torch.equal(poisoned_T, clean_T)


@pytest.mark.parametrize("name", ALL)
def test_order_does_not_matter(name: str) -> None:
    """Tokens and rollouts have the same weights in any order."""
    objective = make_objective(name)
    case = minibatch(seed=4)
    weight_T = token_weights(objective, **case)
    generator = torch.Generator().manual_seed(0)
    token_order = torch.randperm(len(weight_T), generator=generator)
    rollout_order = torch.randperm(len(case["label_R"]), generator=generator)
    new_position_R = torch.argsort(rollout_order)
    shuffled = {
        "logprob_T": case["logprob_T"][token_order],
        "old_logprob_T": case["old_logprob_T"][token_order],
        "rollout_T": new_position_R[case["rollout_T"][token_order]],
        "label_R": case["label_R"][rollout_order],
        "group_R": case["group_R"][rollout_order],
    }

    torch.testing.assert_close(
        token_weights(objective, **shuffled), weight_T[token_order], rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("name", [n for n in ALL if make_objective(n).reach == "token"])
def test_an_objective_of_reach_token_needs_no_other_token(name: str) -> None:
    """With reach `token`, the weights of a part of a sequence, computed from that part alone, equal
    those of the whole.

    The facts (lengths, advantages, denominators) are the minibatch's; only log-probs are missing.
    """
    objective = make_objective(name, kl=PENALTIES["old"])
    case = minibatch(seed=5)
    whole_T = token_weights(objective, **case)
    label_R = case["label_R"]
    lengths_R = torch.bincount(case["rollout_T"])
    facts = objective.facts(RolloutTable(label_R, case["group_R"], label_R.double(), lengths_R))
    cut = len(whole_T) // 3  # in the middle of a sequence

    for part in (slice(0, cut), slice(cut, None)):
        leaf_K = case["logprob_T"][part].clone().requires_grad_()
        old_K = case["old_logprob_T"][part]
        rollout_K = case["rollout_T"][part]
        loss = objective.token_loss(leaf_K, old_K, rollout_K, facts).sum()
        loss = loss + kl_penalty(objective, leaf_K, old_K, None, rollout_K, facts)
        (weight_K,) = torch.autograd.grad(loss, leaf_K)
        trains_K = facts.trains_R[rollout_K]
        torch.testing.assert_close(
            torch.where(trains_K, weight_K, 0.0), whole_T[part], rtol=1e-12, atol=1e-15
        )


@pytest.mark.parametrize("name", [n for n in ALL if n != "disco"])
def test_equal_rewards_teach_nothing(name: str) -> None:
    """With all right or all wrong the weight is 0 and never NaN; objectives with advantages count
    the group.

    DisCO's penalty on the divergence is on every labelled rollout, whatever its group.
    """
    objective = make_objective(name)
    for label in (0, 1):
        weight_T = token_weights(
            objective,
            LOGPROB_T,
            OLD_T,
            ROLLOUT_T,
            torch.full((3,), label),
            GROUP_R,
            reward_R=torch.full((3,), 0.1 + label, dtype=torch.float64),
        )
        assert (weight_T == 0).all()
        table = RolloutTable(
            torch.full((3,), label),
            GROUP_R,
            torch.full((3,), 0.1, dtype=torch.float64),
            torch.bincount(ROLLOUT_T),
        )
        facts = objective.facts(table)
        assert not facts.trains_R.any()
        if isinstance(objective, PolicyGradient):
            assert facts.num_equal_groups == 1


def test_a_penalty_trains_groups_that_the_objective_skips() -> None:
    table = RolloutTable(
        torch.ones(3, dtype=torch.int64),
        GROUP_R,
        torch.ones(3, dtype=torch.float64),
        torch.bincount(ROLLOUT_T),
    )
    facts = make_objective("grpo", kl=KlConfig(to="old")).facts(table)

    assert facts.trains_R.all() and not facts.learns_R.any()
    assert (
        not make_objective("grpo", kl=KlConfig(to="old", coefficient=0.0))
        .facts(table)
        .trains_R.any()
    )


def test_vanilla_keeps_no_group_of_one_class() -> None:
    """Its loss couples the two sides, so `keep` gives such a group no gradient, and none of it is
    packed.
    """
    table = RolloutTable(
        torch.tensor([1, 1, 1, 0]),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([1.0, 1.0, 1.0, 0.0]),
        torch.full((4,), 3),
    )
    vanilla = make_objective("real", variant="vanilla", one_class_groups="keep").facts(table)
    assert vanilla.trains_R.tolist() == [False, False, True, True] and vanilla.num_groups == 2


def test_real_valued_rewards_are_used_where_the_objective_takes_rewards() -> None:
    """Rewards 0.9, 0.5 and 0.1 have mean 0.5 and deviation 0.4: advantages 1, 0 and -1, whatever
    the labels.
    """
    table = RolloutTable(
        torch.tensor([1, 1, 0]),
        GROUP_R,
        torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64),
        torch.bincount(ROLLOUT_T),
    )
    facts = make_objective("grpo").facts(table)
    assert facts.advantage_R.tolist() == pytest.approx([1.0, 0.0, -1.0], abs=1e-12)
    assert facts.learns_R.tolist() == [True, False, True]


REFUSED = [
    pytest.param({"name": "gropo"}, "did you mean grpo", id="unknown objective"),
    pytest.param({"name": "grpo", "tau": 0.5}, "grpo has no setting 'tau'; it takes", id="setting"),
    pytest.param(
        {"name": "real", "tau": 0.0}, "objective.tau is 0.0; it must be above 0", id="bound"
    ),
    pytest.param(
        {"name": "real", "bce_reduction": "mean"}, "set objective.variant=bce", id="no effect"
    ),
    pytest.param(
        {"name": "dapo", "overlong_buffer": 9, "max_tokens": 8}, "shorten the buffer", id="buffer"
    ),
]


@pytest.mark.parametrize(("words", "sentence"), REFUSED)
def test_an_invalid_coefficient_is_refused(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make_objective(**words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_logprob_T": OLD_T[:1]}, "must all be [T], got "),
        ({"logprob_T": LOGPROB_T[None]}, "must all be [T], got "),
        ({"rollout_T": ROLLOUT_T.double()}, "rollout_T must hold integers, got torch.float64."),
        ({"rollout_T": ROLLOUT_T + 1}, "rollout_T must lie in [0, 3), got 1 to 3."),
        ({"label_R": torch.tensor(1)}, "label_R must be [R], got []."),
        ({"group_R": GROUP_R[:1]}, "must all be [R], got [[3], [1], [3], [3]]."),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    arguments = {
        "logprob_T": LOGPROB_T,
        "old_logprob_T": OLD_T,
        "rollout_T": ROLLOUT_T,
        "label_R": LABEL_R,
        "group_R": GROUP_R,
    } | change
    objective = make_objective("gspo")
    for function in (objective_loss, token_weights):
        with pytest.raises(ValueError, match=re.escape(message)):
            function(objective, **arguments)


def test_a_reference_without_its_log_probs_is_refused() -> None:
    objective = make_objective("grpo", kl=PENALTIES["reference"])
    with pytest.raises(ValueError, match="give reference_T"):
        objective_loss(objective, LOGPROB_T, OLD_T, ROLLOUT_T, LABEL_R, GROUP_R)
    with pytest.raises(ValueError, match=r"objective.kl.to=reference"):
        KlConfig(to="old", reference_path="there")
