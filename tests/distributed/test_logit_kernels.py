"""The log-prob head's Triton kernels, run by Triton's interpreter on a CPU,
against torch's operators and float64.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_real.policy.logprobs import NO_TARGET, linear_logprobs
from tests.amount import cover
from tests.distributed.world import World

pytest.importorskip("triton")
pytestmark = pytest.mark.one_version

TEMPERATURE = 0.6
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error of an output or gradient,
which rounding of the operands' dtype explains.
"""

SIZES = {
    "ragged": {"tokens": 12, "hidden": 5, "vocab": 131, "per_rank": 67, "chunk": 23},
    "one-chunk": {"tokens": 8, "hidden": 16, "vocab": 256, "per_rank": 64, "chunk": 1000},
    "one-token": {"tokens": 4, "hidden": 3, "vocab": 70, "per_rank": 35, "chunk": 1},
    "two-blocks": {"tokens": 4, "hidden": 4, "vocab": 4500, "per_rank": 4500, "chunk": 4500},
}
"""`ragged` has columns of padding on the last ranks, `two-blocks` a row that one
block of a program does not hold.
"""


def inputs(case: str, dtype: torch.dtype, tp: int) -> dict[str, torch.Tensor]:
    """Returns inputs that are the same on every rank.

    Logits of a few nats, so that probabilities are neither all equal nor all 0 or 1.
    """
    draw = torch.Generator().manual_seed(1)
    sizes = SIZES[case]
    tokens = sizes["tokens"]
    hidden = sizes["hidden"]
    vocab = sizes["vocab"]
    # At least the vocabulary, as a multiple of the ranks.
    rows = max(sizes["per_rank"] * tp, vocab + -vocab % tp)
    target = torch.randint(0, vocab, (tokens,), generator=draw)
    target[1::4] = NO_TARGET
    return {
        "hidden": torch.randn(tokens, hidden, generator=draw).to(dtype),
        "weight": torch.randn(rows, hidden, generator=draw).to(dtype),
        "target": target,
        "upstream": torch.randn(tokens, generator=draw),
    }


def reference(case: str, dtype: torch.dtype, tp: int) -> dict[str, torch.Tensor]:
    """Log-probs and gradients by torch's operators, in float64."""
    x = inputs(case, dtype, tp)
    vocab = SIZES[case]["vocab"]
    hidden = x["hidden"].double().requires_grad_()
    weight = x["weight"].double().requires_grad_()
    logp = (hidden @ weight.t())[:, :vocab].div(TEMPERATURE).log_softmax(-1)
    logprob = logp.gather(1, x["target"].clamp(min=0)[:, None])[:, 0] * (x["target"] >= 0)
    (logprob * x["upstream"]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return {"logprob": logprob.detach(), "hidden": hidden.grad, "weight": weight.grad}


def by_kernels_and_by_torch(
    case: str, dtype: torch.dtype, sp: bool, fp32_logits: bool
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns one rank's outputs, and its gradients gathered whole."""
    _import_triton_for_its_interpreter()
    kernels = _outputs(case, dtype, sp, fp32_logits)

    from megatron_real.policy import logit_kernels

    assert logit_kernels.INTERPRETED
    os.environ["TRITON_INTERPRET"] = "0"
    return kernels, _outputs(case, dtype, sp, fp32_logits)


def _import_triton_for_its_interpreter() -> None:
    """Triton's own functions become the interpreter's when it is imported,
    and this process was forked with them.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    for name in list(sys.modules):
        if name.split(".")[0] == "triton" and not name.startswith("triton._C"):
            del sys.modules[name]


def _outputs(case: str, dtype: torch.dtype, sp: bool, fp32_logits: bool) -> dict[str, torch.Tensor]:
    tp = dist.get_world_size()
    rank = dist.get_rank()
    x = inputs(case, dtype, tp)
    own_hidden = x["hidden"]
    if sp:
        own_hidden = own_hidden.chunk(tp)[rank]
    hidden = own_hidden.clone().requires_grad_()
    weight = x["weight"].chunk(tp)[rank].clone().requires_grad_()
    logprob = linear_logprobs(
        hidden,
        weight,
        x["target"],
        tp_group=dist.group.WORLD,
        temperature=TEMPERATURE,
        vocab_size=SIZES[case]["vocab"],
        chunk_size=SIZES[case]["chunk"],
        sequence_parallel=sp,
        fp32_logits=fp32_logits,
    )
    assert isinstance(logprob, torch.Tensor)
    (logprob * x["upstream"]).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return {
        "logprob": logprob.detach(),
        "hidden": _whole(hidden.grad) if sp else hidden.grad,
        "weight": _whole(weight.grad),
    }


def _whole(shard: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard)
    return torch.cat(parts)


def _relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(
    ("case", "tp", "dtype", "sp", "fp32_logits"),
    cover(list(SIZES), [2, 4, 1], list(TOLERANCE), [False, True], [False, True]),
)
def test_kernels_equal_torch(
    world: World, case: str, tp: int, dtype: torch.dtype, sp: bool, fp32_logits: bool
) -> None:
    expected = reference(case, dtype, tp)
    arguments: dict[str, Any] = {"case": case, "dtype": dtype, "sp": sp, "fp32_logits": fp32_logits}

    ranks = world.run(by_kernels_and_by_torch, tp, **arguments)

    for kernels, by_torch in ranks:
        for name, value in kernels.items():
            message = f"{name}: relative error"
            assert _relative(value, by_torch[name]) <= TOLERANCE[dtype], message
            # Both are compared with float64 too. Triton's interpreter cuts off the bits of bf16
            # that a GPU rounds (tests/unit/test_logit_kernels.py looks at the instruction), which
            # doubles the error of a gradient.
            factor = 2.5 if dtype == torch.bfloat16 else 1.2
            error = _relative(value, expected[name])
            assert error <= factor * _relative(by_torch[name], expected[name]) + 1e-6, message


def fp32_logits_and_rounded() -> tuple[float, float]:
    """Returns errors of log-probs of bf16 operands against float64,
    with the logits in fp32 and rounded.
    """
    x = inputs("ragged", torch.bfloat16, 1)
    expected = reference("ragged", torch.bfloat16, 1)["logprob"]
    vocab = SIZES["ragged"]["vocab"]
    errors = []
    for fp32_logits in (True, False):
        logprob = linear_logprobs(
            x["hidden"], x["weight"], x["target"],
            temperature=TEMPERATURE, vocab_size=vocab, fp32_logits=fp32_logits,
        )  # fmt: skip
        assert isinstance(logprob, torch.Tensor)
        errors.append(float((logprob - expected).abs().max()))
    return errors[0], errors[1]


def test_fp32_logits_leave_no_rounding_of_bf16() -> None:
    exact, rounded = fp32_logits_and_rounded()
    assert exact < 1e-5 < 1e-3 < rounded
