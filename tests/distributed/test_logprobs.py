"""Vocabulary-parallel log-probs and their gradients against a single-process
log_softmax in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_real.policy.logprobs import NO_TARGET, linear_logprobs, vocab_parallel_logprobs
from tests.amount import cover
from tests.distributed.world import World

pytestmark = pytest.mark.one_version

TOKENS = 24
HIDDEN = 16
VOCAB = 101
PER_RANK = 48
"""Rows of the head on each rank, padding included."""
TEMPERATURE = 0.6
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}


def inputs(dtype: torch.dtype, tp: int) -> dict[str, torch.Tensor]:
    """Returns inputs that are the same on every rank.

    At TP 4 the last rank's columns are all padding: 4 x 48 > 101 + 48.
    """
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw, dtype=torch.float64)
    # The first rows are the same at every TP: at least 128 are drawn, of which TP 1 and 2 use 104.
    weight = torch.randn(max(tp * PER_RANK, 128), HIDDEN, generator=draw, dtype=torch.float64)
    weight = weight[: max(tp * PER_RANK, 104)]
    target = torch.randint(0, VOCAB, (TOKENS,), generator=draw)
    target[::5] = NO_TARGET
    upstream = torch.randn(TOKENS, generator=draw, dtype=torch.float64)
    return {
        "hidden": hidden.to(dtype),
        "weight": weight.to(dtype),
        "target": target,
        "upstream": upstream,
    }


def expected(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Log-probs, entropies and gradients by torch's operators, in float64."""
    hidden = x["hidden"].double().requires_grad_()
    weight = x["weight"].double().requires_grad_()
    logits = hidden @ weight.t()
    logits.retain_grad()
    logp = (logits[:, :VOCAB] / TEMPERATURE).log_softmax(-1)
    has_target = x["target"] >= 0
    logprob = logp.gather(1, x["target"].clamp(min=0)[:, None])[:, 0] * has_target
    (logprob * x["upstream"]).sum().backward()
    entropy = -(logp.exp() * logp).sum(1) * has_target
    assert logits.grad is not None and hidden.grad is not None and weight.grad is not None
    return {
        "logprob": logprob.detach(), "entropy": entropy.detach(), "logits": logits.grad,
        "hidden": hidden.grad, "weight": weight.grad,
    }  # fmt: skip


def sharded(case: str, dtype: torch.dtype, chunk: int, sp: bool) -> dict[str, torch.Tensor]:
    """Returns one rank's outputs, and its gradients gathered whole."""
    tp = dist.get_world_size()
    rank = dist.get_rank()
    x = inputs(dtype, tp)
    columns = len(x["weight"]) // tp
    weight = x["weight"][rank * columns : (rank + 1) * columns].clone().requires_grad_()
    options: dict[str, Any] = {
        "tp_group": dist.group.WORLD,
        "temperature": TEMPERATURE,
        "vocab_size": VOCAB,
        "chunk_size": chunk,
    }

    if case == "linear":
        own_hidden = x["hidden"]
        if sp:
            own_hidden = own_hidden.chunk(tp)[rank]
        hidden = own_hidden.clone().requires_grad_()
        logprob = linear_logprobs(hidden, weight, x["target"], sequence_parallel=sp, **options)
        assert isinstance(logprob, torch.Tensor)
        (logprob * x["upstream"]).sum().backward()
        assert hidden.grad is not None and weight.grad is not None
        return {
            "logprob": logprob.detach(),
            "hidden": whole(hidden.grad) if sp else hidden.grad,
            "weight": whole(weight.grad),
        }

    logits = (x["hidden"] @ weight.t()).detach().requires_grad_()
    kept = logits.detach().clone()
    logprob, entropy = vocab_parallel_logprobs(logits, x["target"], return_entropy=True, **options)
    (logprob * x["upstream"]).sum().backward()
    assert torch.equal(logits.detach(), kept), "the logits were written to"
    assert logits.grad is not None
    return {
        "logprob": logprob.detach(),
        "entropy": entropy.detach(),
        "logits": whole(logits.grad.t().contiguous()).t(),
    }


def whole(shard: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, shard)
    return torch.cat(parts)


@pytest.mark.parametrize(
    ("case", "tp", "chunk", "dtype"),
    cover(["linear", "linear-sp", "logits"], [2, 4, 1], [7, 1000], list(TOLERANCE)),
)
def test_equal_to_log_softmax(
    world: World, case: str, tp: int, chunk: int, dtype: torch.dtype
) -> None:
    function = case.removesuffix("-sp")
    sp = case.endswith("-sp")
    x = inputs(dtype, tp)
    reference = expected(x)

    ranks = world.run(sharded, tp, case=function, dtype=dtype, chunk=chunk, sp=sp)

    for results in ranks:
        for name, value in results.items():
            error = (value.double() - reference[name]).norm() / reference[name].norm()
            assert error <= TOLERANCE[dtype], name
        assert not results["logprob"][x["target"] == NO_TARGET].any()


def without_targets(sp: bool) -> tuple[float, ...]:
    """Scores a micro-batch of padding alone, as a context-parallel shard that is all prompt."""
    tp = dist.get_world_size()
    num_tokens = 8
    hidden = torch.randn(num_tokens // tp if sp else num_tokens, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCAB // tp, HIDDEN, requires_grad=True)
    target = torch.full((num_tokens,), NO_TARGET)
    logprob = linear_logprobs(
        hidden, weight, target, tp_group=dist.group.WORLD, sequence_parallel=sp
    )
    logits = (weight @ weight.t())[:num_tokens].detach().requires_grad_()
    from_logits = vocab_parallel_logprobs(logits, target, tp_group=dist.group.WORLD)
    assert isinstance(logprob, torch.Tensor) and isinstance(from_logits, torch.Tensor)
    (logprob + from_logits).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    results = (logprob + from_logits, hidden.grad, weight.grad)
    return tuple(float(x.abs().sum()) for x in results)


@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
def test_no_target_at_all_gives_zeros(world: World, sp: bool) -> None:
    assert world.run(without_targets, 2, sp=sp) == [(0.0, 0.0, 0.0)] * 2


def error_of_unreduced_gradient() -> float:
    """Returns the relative error of a hidden gradient that is not reduced over TP.

    The forward pass is right, so that a test of values alone would not see it.
    """
    x = inputs(torch.float64, dist.get_world_size())
    columns = len(x["weight"]) // dist.get_world_size()
    weight = x["weight"][dist.get_rank() * columns :][:columns]
    hidden = x["hidden"].clone().requires_grad_()
    logits = hidden @ weight.t()
    options: dict[str, Any] = {
        "tp_group": dist.group.WORLD,
        "temperature": TEMPERATURE,
        "vocab_size": VOCAB,
    }
    logprob = vocab_parallel_logprobs(logits, x["target"], **options)
    assert isinstance(logprob, torch.Tensor)
    (logprob * x["upstream"]).sum().backward()
    reference = expected(x)["hidden"]
    assert hidden.grad is not None
    return float((hidden.grad - reference).norm() / reference.norm())


def test_control_unreduced_hidden_gradient_is_seen(world: World) -> None:
    assert min(world.run(error_of_unreduced_gradient, 2)) > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"vocab_size": 9}, "vocab_size is 9"),
        ({"target_T": torch.tensor([1, 8])}, "target 8 is outside"),
        ({"target_T": torch.tensor([1])}, r"got \[2, 8\] and \[1\]"),
        ({"target_T": torch.tensor(1)}, r"got \[2, 8\] and \[\]"),
        ({"target_T": torch.tensor([1.0, 2.0])}, "int64 token ids, got torch.float32"),
        ({"logits_TV": torch.zeros(8)}, r"got \[8\] and \[2\]"),
        ({"logits_TV": torch.zeros(2, 1, 8)}, r"got \[2, 1, 8\] and \[2\]"),
        ({"logits_TV": torch.zeros(2, 8).long()}, "must be floats, got torch.int64"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    arguments = {"logits_TV": torch.zeros(2, 8), "target_T": torch.tensor([1, 2])} | change
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprobs(arguments.pop("logits_TV"), arguments.pop("target_T"), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_TH": torch.zeros(4)}, r"got \[4\], \[8, 4\] and \[2\]"),
        ({"weight_VH": torch.zeros(())}, r"got \[2, 4\], \[\] and \[2\]"),
        ({"target_T": torch.tensor(1)}, r"got \[2, 4\], \[8, 4\] and \[\]"),
        ({"hidden_TH": torch.zeros(3, 4)}, "hidden has 3 tokens on each of 1 ranks"),
        ({"hidden_TH": torch.zeros(2, 5)}, "must have one H and one dtype"),
        ({"weight_VH": torch.zeros(8, 4).double()}, "must have one H and one dtype"),
    ],
)
def test_refuses_hidden_states(change: dict[str, torch.Tensor], message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden_TH": torch.zeros(2, 4),
        "weight_VH": torch.zeros(8, 4),
        "target_T": torch.tensor([1, 2]),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**arguments)
