"""How prompts are spread over engines, their seeds, and rollouts that are excluded for their
mismatch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_real.config import Config, ModelConfig, RolloutConfig
from megatron_real.records import (
    EXCLUDED,
    POSITIVE,
    Completion,
    Label,
    Prompt,
    Rollout,
    Status,
    Verdict,
)
from megatron_real.rollout import build_engine
from megatron_real.rollout.engines import vllm as vllm_engine
from megatron_real.rollout.spread import ExpectedLengths, prompt_seed, samples_together, spread
from megatron_real.rollout.stage import without_mismatch


def prompt(uid: str, tokens: int = 2) -> Prompt:
    return Prompt(uid, "", (7,) * tokens, ("",))


def rollout(uid: str, length: int, label: int = POSITIVE) -> Rollout:
    return Rollout(
        prompt(uid),
        0,
        0,
        Completion((7,) * length, (-1.0,) * length, "", True),
        Verdict(Status.OK, Label(label), 1.0),
    )


@pytest.mark.parametrize(
    ("costs", "engines", "expected"),
    [
        pytest.param([5, 1, 4, 1], 2, [[0, 3], [1, 2]], id="the longest first"),
        pytest.param([1, 1, 1, 1, 1], 2, [[0, 2, 4], [1, 3]], id="equal costs in turn"),
        pytest.param(
            [9, 1, 1, 1, 1, 1],
            3,
            [[0], [1, 3, 5], [2, 4]],
            id="one long prompt has an engine for itself",
        ),
        pytest.param([3], 4, [[0], [], [], []], id="more engines than prompts"),
        pytest.param([], 2, [[], []], id="nothing"),
    ],
)
def test_prompts_are_spread_over_engines_by_their_cost(
    costs: list[float], engines: int, expected: list[list[int]]
) -> None:
    assert spread(costs, engines) == expected


@given(st.lists(st.floats(0, 1e4), max_size=60), st.integers(1, 8))
def test_spread_takes_each_prompt_once_and_bounds_the_longest_share(
    costs: list[float], engines: int
) -> None:
    """Graham's bound for any order: the engine that ends last began its last prompt when all others
    were busy.
    """
    shares = spread(costs, engines)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    longest = max(sum(costs[i] for i in share) for share in shares)
    bound = sum(costs) / engines + (1 - 1 / engines) * max(costs, default=0)
    assert longest <= bound * (1 + 1e-9), "beyond rounding"


def test_the_expected_length_is_that_of_earlier_answers() -> None:
    lengths = ExpectedLengths()
    assert lengths.costs([prompt("a"), prompt("b", 5)], 4) == [2 + 4 * 1, 5 + 4 * 1]

    # A prompt that was seen has its own mean; "b" was not, and has the mean over prompts.
    lengths.learn([rollout("a", 10), rollout("a", 30), rollout("c", 100)])
    assert lengths.costs([prompt("a"), prompt("b"), prompt("c")], 2) == [
        2 + 2 * 20,
        2 + 2 * 60,
        2 + 2 * 100,
    ]

    # What counts is a prompt's latest visit.
    lengths.learn([rollout("c", 10)])
    assert lengths.costs([prompt("c")], 1) == [12]


def test_seeds_differ_by_step_place_and_prompt_alone() -> None:
    seeds = {
        prompt_seed(s, a, (i, 0), prompt(u))
        for s in range(5)
        for a in range(2)
        for i in range(5)
        for u in "abc"
    }
    assert len(seeds) == 150 and all(0 <= seed < 2**63 for seed in seeds)
    assert prompt_seed(3, 0, (1, 0), prompt("a", 2)) == prompt_seed(3, 0, (1, 0), prompt("a", 9))


def test_rollouts_beyond_the_bound_are_excluded_and_counted() -> None:
    rollouts = [
        rollout("a", 3),
        rollout("b", 3),
        rollout("c", 3),
        rollout("d", 3, EXCLUDED),
        rollout("e", 3),
    ]
    rollouts[3] = dataclasses.replace(rollouts[3], verdict=Verdict(Status.TIMEOUT, EXCLUDED, None))
    kept = without_mismatch(rollouts, lambda _: [0.1, 0.3, math.nan, 9.0, 0.2], bound=0.2)
    assert [r.verdict.status for r in kept] == ["ok", "mismatch", "mismatch", "timeout", "ok"]
    assert [r.label for r in kept] == [POSITIVE, EXCLUDED, EXCLUDED, EXCLUDED, POSITIVE]


def test_a_lost_completion_does_not_change_the_expected_length() -> None:
    """It may have had the longest answer of all, and holds no token."""
    lost = dataclasses.replace(rollout("a", 0), verdict=Verdict(Status.LOST, EXCLUDED, None))
    lengths = ExpectedLengths()
    lengths.learn([rollout("a", 100), lost, dataclasses.replace(lost, prompt=prompt("b"))])
    assert lengths.of == {"a": 100}


def test_the_limits_of_vllm_are_checked_where_auto_takes_it(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "missing", lambda _: "")
    config = Config(
        model=ModelConfig(path=str(tiny_model())), rollout=RolloutConfig(engine="auto", tp=3)
    )
    with pytest.raises(
        ValueError, match=r"rollout\.tp = 3 does not divide the model's 4 attention heads"
    ):
        build_engine(config, say=lambda _: None)


def test_an_engine_that_auto_takes_must_do_what_is_asked(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_engine, "missing", lambda _: "vllm does not import")
    config = Config(
        model=ModelConfig(path=str(tiny_model())), rollout=RolloutConfig(engine="auto", tp=2)
    )
    with pytest.raises(ValueError) as refused:
        build_engine(config, say=lambda _: None)
    assert str(refused.value) == (
        "rollout.engine=auto became transformers (vllm does not import), but rollout.tp = 2 needs "
        "rollout.engine=vllm or vllm-server, not transformers; set rollout.tp=1"
    )


@pytest.mark.parametrize(
    ("prompts", "samples", "engines", "together"),
    [
        pytest.param(128, 8, 128, 8, id="a prompt for every engine: groups stay whole"),
        pytest.param(128, 8, 512, 2, id="four engines a prompt"),
        pytest.param(128, 8, 200, 4, id="halves"),
        pytest.param(10, 6, 25, 2, id="thirds: halves would leave five engines idle"),
        pytest.param(2, 4, 64, 1, id="more engines than samples"),
    ],
)
def test_samples_of_a_group_part_where_engines_would_idle(
    prompts: int, samples: int, engines: int, together: int
) -> None:
    assert samples_together(prompts, samples, engines) == together
