"""Each emulated kernel of TransformerEngine equals an operator of torch that computes the same in
another way.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from megatron_real.rehearsal import transformer_engine
from megatron_real.rehearsal.transformer_engine import DType
from tests.emulated_te import kernels

CU = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
"""Three packed sequences of 3, 0 and 5 tokens."""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rmsnorm_and_its_gradients_equal_those_of_torch(zero_centered: bool) -> None:
    x = torch.randn(5, 16, requires_grad=True)
    weight = torch.randn(16, requires_grad=True)
    expected = torch.nn.functional.rms_norm(x, (16,), weight + float(zero_centered), eps=1e-5)
    upstream = torch.randn(5, 16)
    expected.backward(upstream)

    data = x.detach(), weight.detach()
    out, _, inverse = kernels.rmsnorm_fwd(*data, 1e-5, None, None, None, 0, zero_centered)
    grad_x, grad_weight = kernels.rmsnorm_bwd(upstream, data[0], inverse, data[1], 0, zero_centered)
    assert_close(out, expected.detach())
    assert_close(grad_x, x.grad)
    assert_close(grad_weight, weight.grad)


def gemm(a: torch.Tensor, transa: bool, b: torch.Tensor, transb: bool, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "out": None, "quantizer": None, "out_dtype": DType.kFloat32, "bias": None,
        "bias_type": None, "gelu": False, "gelu_in": None, "grad": False,
        "workspace": torch.empty(0), "workspace_size": 0, "accumulate": False,
        "use_split_accumulator": False,
    }  # fmt: skip
    return kernels.generic_gemm(a, transa, b, transb, **(arguments | options))


def test_gemm_is_a_linear_layer_and_its_gradients() -> None:
    """These are the three forms in which TransformerEngine's Linear calls it."""
    linear = torch.nn.Linear(6, 4)
    x = torch.randn(2, 3, 6, requires_grad=True)
    upstream = torch.randn(2, 3, 4)
    expected = linear(x)
    expected.backward(upstream)
    weight = linear.weight.detach()
    bias = linear.bias.detach()

    out, *_ = gemm(weight, True, x.detach(), False, bias=bias)
    grad_x, *_ = gemm(weight, False, upstream, False)
    main_grad = torch.ones(4, 6)
    _, grad_bias, *_ = gemm(
        x.detach(), False, upstream, True, out=main_grad, accumulate=True, grad=True, bias=bias
    )

    assert_close(out, expected.detach())
    assert_close(grad_x, x.grad)
    assert_close(main_grad - 1, linear.weight.grad)
    assert_close(grad_bias, linear.bias.grad)


def test_fused_attention_is_softmax_of_each_sequence() -> None:
    q, k, v = (torch.randn(8, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = torch.zeros(8, 4, 8)
    for start, end in ((0, 3), (3, 8)):
        length = end - start
        hidden = torch.ones(length, length).triu(1).bool()
        for head in range(4):
            key = k[start:end, head // 2]
            value = v[start:end, head // 2]
            scores = (q[start:end, head] @ key.t() * 0.3).masked_fill(hidden, -torch.inf)
            out = out.clone()
            out[start:end, head] = scores.softmax(-1) @ value
    upstream = torch.randn(8, 4, 8)
    out.backward(upstream)

    q_data, k_data, v_data = (x.detach() for x in (q, k, v))
    mask = types.SimpleNamespace(name="NVTE_PADDING_CAUSAL_MASK")
    layouts = (None, None, None, None)  # these kernels read none of them
    result, statistics, _ = kernels.fused_attn_fwd(
        5, 5, True, 0.3, 0.0, True, *layouts, mask, None, None, None, CU, CU,
        q_data, k_data, v_data,
    )  # fmt: skip
    grads = kernels.fused_attn_bwd(
        5, 5, 0.3, 0.0, True, *layouts, None, None, None, mask, None, None, None, False, CU, CU,
        q_data, k_data, v_data, result, upstream, torch.float32, [statistics],
    )  # fmt: skip

    assert_close(result, out.detach())
    for grad, x in zip(grads, (q, k, v), strict=False):
        assert_close(grad, x.grad)


def test_attention_in_two_steps_is_attention() -> None:
    """Ring attention's merge: each half of the keys is attended to by itself, and the halves are
    joined by their log-sum-exps.
    """
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    q, k, v = (torch.randn(8, 2, 8, requires_grad=True) for _ in range(3))
    heads_first = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    )
    out = heads_first.transpose(0, 1)
    upstream = torch.randn(8, 2, 8)
    out.backward(upstream)

    q_data, k_data, v_data = (x.detach() for x in (q, k, v))
    scale = 8**-0.5
    mask = types.SimpleNamespace(name="NVTE_PADDING_MASK")
    layouts = (None, None, None, None)  # these kernels read none of them
    total: Any = None
    lse: Any = None
    halves = [
        (
            kernels.thd_read_half_tensor(k_data, bounds, half),
            kernels.thd_read_half_tensor(v_data, bounds, half),
        )
        for half in (0, 1)
    ]
    for key, value in halves:
        step, statistics, _ = kernels.fused_attn_fwd(
            8, 4, True, scale, 0.0, True, *layouts, mask, None, None, None, bounds, bounds // 2,
            q_data, key, value,
        )  # fmt: skip
        step_lse = statistics.squeeze(-1).t()
        if total is None:
            total = step
            lse = step_lse
            continue
        old = lse
        lse = torch.logaddexp(old, step_lse)
        kernels.thd_out_correction(total, step, old, lse, step_lse, bounds, False, True)

    assert_close(total, out.detach())

    # The first half of the keys overwrites its part of the gradient, the second adds to its part.
    grads = [torch.zeros_like(x) for x in (q_data, k_data, v_data)]
    for (key, value), actions in zip(halves, (("copy", "none"), ("none", "add")), strict=True):
        step_grads = kernels.fused_attn_bwd(
            8, 4, scale, 0.0, True, *layouts, None, None, None, mask, None, None, None, False,
            bounds, bounds // 2, q_data, key, value, total, upstream, torch.float32,
            [lse.t().unsqueeze(-1)],
        )  # fmt: skip
        query_grad, *key_value_grads = step_grads[:3]
        assert query_grad is not None
        grads[0] += query_grad
        for grad, step_grad in zip(grads[1:], key_value_grads, strict=True):
            assert step_grad is not None
            kernels.thd_grad_correction(grad, step_grad, bounds, *actions)

    for grad, x in zip(grads, (q, k, v), strict=True):
        assert_close(grad, x.grad)


def test_halves_are_those_of_each_sequence() -> None:
    """Sequences of 2 and 6 tokens have the first halves 0 and 2 to 4, and the second halves 1 and 5
    to 7.
    """
    bounds = torch.tensor([0, 2, 8], dtype=torch.int32)
    lse = torch.arange(8.0).expand(2, 8).clone()
    second = torch.tensor([1.0, 5.0, 6.0, 7.0]).expand(2, 4)
    assert_close(kernels.thd_read_second_half_lse(lse, bounds, True, 4), second)

    kernels.thd_second_half_lse_correction(lse, second, bounds, True)
    expected = torch.arange(8.0)
    expected[[1, 5, 6, 7]] += torch.log(torch.tensor(2.0))  # e^x + e^x
    assert_close(lse, expected.expand(2, 8))

    grad = torch.ones(8, 1)
    kernels.thd_grad_correction(grad, torch.arange(8.0)[:, None], bounds, "copy", "add")
    assert grad.flatten().tolist() == [0, 2, 2, 3, 4, 6, 7, 8]

    kernels.thd_grad_correction(grad, torch.full((4, 1), 9.0), bounds, "zero", "copy")
    assert grad.flatten().tolist() == [0, 9, 0, 0, 0, 9, 9, 9]


def test_rope_turns_pairs_as_complex_numbers() -> None:
    t = torch.randn(8, 2, 6)
    frequencies = torch.randn(5, 3)
    freqs = torch.cat([frequencies, frequencies], -1).view(5, 1, 1, 6)
    out = kernels.fused_rope_forward(t, freqs, None, None, False, CU, 1, 0)
    places = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])
    turn = torch.polar(torch.ones(8, 1, 3), frequencies[places][:, None])
    expected = torch.complex(t[..., :3], t[..., 3:]) * turn

    assert_close(out, torch.cat([expected.real, expected.imag], -1))
    assert_close(kernels.fused_rope_backward(out, freqs, None, None, False, CU, 1, 0), t)

    # Of a sequence of 8 on two ranks, the second one has the tokens 2, 3 and 4, 5.
    bounds = torch.tensor([0, 8], dtype=torch.int32)
    freqs = torch.randn(8, 1, 1, 6)
    whole = kernels.fused_rope_forward(t, freqs, None, None, False, bounds, 1, 0)
    part = kernels.fused_rope_forward(t[2:6], freqs, None, None, False, bounds, 2, 1)

    assert_close(part, whole[2:6])


def test_packed_and_padded_forms_are_pad_sequence() -> None:
    t = torch.randn(8, 2, 3)
    parts = [t[:3], t[3:3], t[3:]]
    padded = kernels.convert_thd_to_bshd(t, CU, 3, 5)
    assert_close(padded, torch.nn.utils.rnn.pad_sequence(parts, batch_first=True))
    assert_close(kernels.convert_bshd_to_thd(padded, CU, 8), t)


def test_norms_and_scaling_of_lists_equal_those_of_each_tensor() -> None:
    tensors = [torch.randn(3), torch.randn(2, 4)]
    norm, each = kernels.multi_tensor_l2norm(0, torch.zeros(1), [tensors], True)
    assert_close(norm[0], torch.cat([t.flatten() for t in tensors]).norm())
    assert each is not None
    assert_close(each, torch.stack([t.norm() for t in tensors]))
    halves = [torch.empty_like(t) for t in tensors]
    kernels.multi_tensor_scale(0, torch.zeros(1), [tensors, halves], 0.5)
    assert_close(halves, [t / 2 for t in tensors])


@pytest.mark.parametrize(("mode", "optimizer"), [(0, torch.optim.Adam), (1, torch.optim.AdamW)])
def test_adam_equals_the_optimizers_of_torch(mode: int, optimizer: Any) -> None:
    start = torch.randn(7)
    gradients = torch.randn(3, 7)
    parameter = torch.nn.Parameter(start.clone())
    reference = optimizer([parameter], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    value = start.clone()
    moment = torch.zeros(7)
    square = torch.zeros(7)
    for step, gradient in enumerate(gradients, 1):
        parameter.grad = gradient.clone()
        reference.step()
        lists = [[gradient.clone()], [value], [moment], [square]]
        kernels.multi_tensor_adam(0, torch.zeros(1), lists, 0.1, 0.8, 0.9, 1e-3, step, mode, 1, 0.2)

    assert_close(value, parameter.detach())


def test_every_kernel_has_a_test_here_and_the_rest_says_that_it_is_missing() -> None:
    assert {kernel.__name__ for kernel in kernels.KERNELS} == {
        "rmsnorm_fwd", "rmsnorm_bwd", "generic_gemm", "fused_attn_fwd",
        "fused_attn_bwd", "fused_rope_forward", "fused_rope_backward", "convert_thd_to_bshd",
        "convert_bshd_to_thd", "multi_tensor_l2norm", "multi_tensor_scale", "multi_tensor_adam",
        "thd_read_half_tensor", "thd_read_second_half_lse", "thd_second_half_lse_correction",
        "thd_out_correction", "thd_grad_correction",
    }  # fmt: skip
    with pytest.raises(NotImplementedError, match=r"transformer_engine_torch\.swiglu is not emul"):
        transformer_engine.extension(kernels.KERNELS).swiglu(torch.zeros(1))
