"""Every objective under layouts with every level of every factor: loss and gradients are those
of the paper's formula.

The reference (reference_objectives.py) differentiates the printed formula through transformers'
model in float64. One run of a layout takes all objectives in turn over one megatron-core model.
Micro-batches, data-parallel ranks and, where CP is 2, the sequences themselves are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_real.objective import make_objective
from megatron_real.objective.registry import OBJECTIVES
from tests.amount import on_first_version
from tests.distributed import objective_jobs, reference
from tests.distributed import reference_objectives as formulas
from tests.distributed.layouts import CORE, Dtype, Layout, pairwise_cover
from tests.distributed.test_invariance import PLAIN, TOLERANCE, config_of, model_paths, worst_error
from tests.distributed.world import World

ModelMaker = Callable[..., Path]
Expected = Callable[[Layout, str], tuple[float, dict[str, torch.Tensor]]]


def layers_of(layout: Layout) -> int:
    """Layers of the model: as few as the pipeline can cut.

    How many there are makes no difference to an objective, and with eight (test_invariance.py) this
    file takes thrice as long.
    """
    return max(2, layout.pp * layout.vpp)


def reference_path(tiny_model: ModelMaker, model: str, layers: int) -> Path:
    """The weights that the KL is measured against: neither the policy's nor those
    that drew the rollouts.
    """
    family = model.split("-")[0]
    tied = model.endswith("tied")
    return tiny_model(family, moved=-0.02, tie_word_embeddings=tied, num_hidden_layers=layers)


def logprobs_and_entropies(
    model: Any, sample: reference.Sample
) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([sample.prompt + sample.response])
    logits = model(ids).logits[0, len(sample.prompt) - 1 : -1] / reference.TEMPERATURE
    every_logprob = logits.log_softmax(-1)
    picked = every_logprob.gather(1, torch.tensor(sample.response)[:, None])[:, 0]
    entropy = -(every_logprob.exp() * every_logprob).sum(-1)
    if sample.trained is None:
        return picked, entropy
    trained = torch.tensor(sample.trained)
    return picked[trained], entropy[trained]


@pytest.fixture(scope="session")
def expected(tiny_model: ModelMaker) -> Expected:
    """Loss and gradients by formula, once per model, number of layers, order,
    kind of minibatch and case.
    """

    @cache
    def computed(
        model: str, layers: int, order: int, first: bool
    ) -> tuple[Any, list[formulas.Sequence]]:
        path, old_path = model_paths(tiny_model, model, layers)
        policy = reference.load(path)
        old = policy
        if not first:
            old = reference.load(old_path)
        frozen = reference.load(reference_path(tiny_model, model, layers))

        sequences = []
        for sample in reference.minibatch(order, vocab=101):
            if sample.label == -1:
                continue
            logprob, entropy = logprobs_and_entropies(policy, sample)
            with torch.no_grad():
                old_logprob = reference.logprobs(old, sample)
                reference_logprob = reference.logprobs(frozen, sample)
            sequences.append(
                formulas.Sequence(
                    logprob, old_logprob, reference_logprob, entropy, sample.label, sample.group
                )
            )
        return policy, sequences

    @cache
    def compute(
        model: str, layers: int, order: int, first: bool, case: str
    ) -> tuple[float, dict[str, torch.Tensor]]:
        policy, sequences = computed(model, layers, order, first)
        loss = formulas.CASES[case].formula(sequences)
        names, parameters = zip(*policy.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        return float(loss), dict(zip(names, gradients, strict=True))

    def expected_of(layout: Layout, case: str) -> tuple[float, dict[str, torch.Tensor]]:
        return compute(layout.model, layers_of(layout), layout.order, layout.first, case)

    return expected_of


def described(cases: list[str]) -> dict[str, tuple[str, Any, Any]]:
    """Cases as plain values that travel to the workers."""
    rows = {case: formulas.CASES[case] for case in cases}
    return {case: (row.name, dict(row.settings), row.kl) for case, row in rows.items()}


def run(
    world: World, tiny_model: ModelMaker, layout: Layout, dtype: Dtype, cases: list[str]
) -> dict[str, Any]:
    layers = layers_of(layout)
    path, old_path = model_paths(tiny_model, layout.model, layers)
    config = config_of(layout, path, dtype)
    # A model that computes entropies serves every case; those without a bonus ignore them.
    config = replace(config, objective=make_objective("real", entropy_bonus=0.1))

    results = world.run(
        objective_jobs.gradients,
        layout.size,
        config=config,
        old_path=None if layout.first else str(old_path),
        reference_path=str(reference_path(tiny_model, layout.model, layers)),
        samples=reference.minibatch(layout.order, vocab=101),
        cases=described(cases),
    )

    for case in cases:
        assert len({r[case]["loss"] for r in results}) == 1, f"every rank knows the loss of {case}"
    return dict(results[0])


def cases_of(layout: Layout) -> list[str]:
    """The cases that are run in a row of the core: all.

    On the second version of megatron-core each case is run once: an objective is computed from
    log-probs, to which the version can make no other difference than the one that the matrix of one
    objective sees (test_invariance.py).
    """
    cases = list(formulas.CASES)
    if on_first_version():
        return cases
    return cases[CORE.index(layout) :: len(CORE)]


def check(
    world: World,
    tiny_model: ModelMaker,
    expected: Expected,
    layout: Layout,
    dtype: Dtype,
    cases: list[str],
) -> None:
    results = run(world, tiny_model, layout, dtype, cases)

    for case in cases:
        loss, gradients = expected(layout, case)
        error, name = worst_error(results[case]["gradients"], gradients)
        assert error <= TOLERANCE[dtype], f"{case}: gradient of {name}"
        # Absolutely too: the loss of an objective whose advantages cancel is near 0.
        close = pytest.approx(loss, rel=TOLERANCE[dtype], abs=TOLERANCE[dtype])
        assert results[case]["loss"] == close, case


def test_every_objective_has_a_case() -> None:
    assert {case.name for case in formulas.CASES.values()} == set(OBJECTIVES)


@pytest.mark.parametrize("layout", CORE, ids=str)
def test_float64(world: World, tiny_model: ModelMaker, expected: Expected, layout: Layout) -> None:
    check(world, tiny_model, expected, layout, "fp64", cases_of(layout))


@pytest.mark.one_version
def test_float32(world: World, tiny_model: ModelMaker, expected: Expected) -> None:
    check(world, tiny_model, expected, CORE[1], "fp32", list(formulas.CASES))


@pytest.mark.grid
@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
@pytest.mark.parametrize("layout", pairwise_cover(), ids=str)
def test_every_case_on_every_row(
    world: World, tiny_model: ModelMaker, expected: Expected, layout: Layout, dtype: Dtype
) -> None:
    check(world, tiny_model, expected, layout, dtype, list(formulas.CASES))


def test_ratios_are_clipped_on_both_sides(world: World, tiny_model: ModelMaker) -> None:
    """Ratios leave the trust regions above and below 1: without that, the rows above would test
    no clip.
    """
    layout = replace(PLAIN, dp=2, cp=2)

    results = run(world, tiny_model, layout, "fp64", ["grpo", "dapo", "gspo", "real", "sapo"])
    for case in ("grpo", "dapo", "gspo"):
        assert min(results[case]["clipped"]) > 0.005, case
    for case in ("real", "sapo"):
        assert results[case]["clipped"] == (0.0, 0.0), case

    counts = low_ratio_tokens(tiny_model, layout)
    assert 0 < counts[1] < counts[0] < counts[2], "some tokens, of right and of wrong answers"
    assert {results[case]["low_ratio"] for case in results} == {counts}


def low_ratio_tokens(tiny_model: ModelMaker, layout: Layout) -> tuple[int, int, int]:
    """Counts tokens whose ratio is below 0.8, those of right answers among them, and all tokens,
    in groups that have both labels.
    """
    path, old_path = model_paths(tiny_model, layout.model, layers_of(layout))
    policy = reference.load(path)
    old = reference.load(old_path)
    samples = reference.minibatch(layout.order, vocab=101)
    labels: dict[int, set[int]] = {}
    for sample in samples:
        labels.setdefault(sample.group, set()).add(sample.label)

    low = positive = every = 0
    for sample in samples:
        if sample.label == -1 or not {0, 1} <= labels[sample.group]:
            continue
        with torch.no_grad():
            ratio = (reference.logprobs(policy, sample) - reference.logprobs(old, sample)).exp()
        low += int((ratio < 0.8).sum())
        positive += int((ratio < 0.8).sum()) * sample.label
        every += len(ratio)
    return low, positive, every


def test_the_mismatch_does_not_depend_on_the_objective(
    world: World, tiny_model: ModelMaker
) -> None:
    """The weight sync's probe measures it before there are any old log-probs."""
    path, _ = model_paths(tiny_model, PLAIN.model, layers_of(PLAIN))
    samples = reference.minibatch(1, vocab=101)
    config = config_of(replace(PLAIN, dp=2), path, "fp64")

    means = world.run(objective_jobs.mismatches, 2, config=config, samples=samples)[0]

    assert all(mean > 0 for mean in means["real"])
    for name in OBJECTIVES:
        assert means[name] == means["real"], name


def test_control_a_mean_per_micro_batch_is_caught(
    world: World, tiny_model: ModelMaker, expected: Expected
) -> None:
    """DAPO's denominator counted in each micro-batch by itself:
    the gradient is off by more than 2 %.
    """
    path, old_path = model_paths(tiny_model, PLAIN.model, layers_of(PLAIN))

    (gradients,) = world.run(
        objective_jobs.averaged_per_micro_batch,
        1,
        config=config_of(PLAIN, path, "fp64"),
        old_path=str(old_path),
        samples=reference.minibatch(PLAIN.order, vocab=101),
    )

    _, true_gradients = expected(PLAIN, "dapo")
    assert worst_error(gradients, true_gradients)[0] > 0.02
