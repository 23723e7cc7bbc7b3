"""TransformerEngine's compiled half, as far as dense bf16 and fp32 training calls it,
in torch's operators on a CPU.

Each function stands where `transformer_engine_torch` has one of the same name, takes its arguments
in its order, and computes what it documents; tests/unit/test_emulated_te.py compares each with an
operator of torch. Arguments that dense training never sets (fp8 quantizers, userbuffers, dropout)
must have their neutral value, else an assertion fails.

Shapes: T packed tokens, H heads, D head size, B sequences, L the longest of them.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_real.rehearsal.transformer_engine import DType

_TORCH_DTYPES = {
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
}


def rmsnorm_fwd(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, None, Tensor]:
    """Returns x / rms(x) * weight, None for a mean, and 1 / rms(x) in fp32."""
    assert quantizer is None and x.dim() == 2
    wide = x.float()
    inverse_rms = torch.rsqrt(wide.square().mean(-1) + eps)
    normalised = wide * inverse_rms[:, None] * (weight.float() + float(zero_centered_gamma))
    result = normalised.to(x.dtype)
    return (result if out is None else out.copy_(result)), None, inverse_rms


def rmsnorm_bwd(
    grad: Tensor,
    x: Tensor,
    inverse_rms: Tensor,
    weight: Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and of the weight."""
    normalised = x.float() * inverse_rms[:, None]
    scaled = grad.float() * (weight.float() + float(zero_centered_gamma))
    along = (scaled * normalised).mean(-1, keepdim=True)
    grad_x = (scaled - normalised * along) * inverse_rms[:, None]
    grad_weight = (grad.float() * normalised).sum(0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def generic_gemm(
    A: Tensor,
    transa: bool,
    B: Tensor,
    transb: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Any,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Any = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, Any]:
    """Returns op(B) @ op(A) in row-major order, and the bias's gradient where
    `grad` and a bias are given.

    The library is column-major: its A B is our B A. The operands are two-dimensional but for
    leading token dimensions.
    """
    assert quantizer is None and not gelu and comm_overlap is None
    assert A.dtype == B.dtype, f"operands of {A.dtype} and {B.dtype}"
    left = B.reshape(-1, B.shape[-1])
    right = A.reshape(-1, A.shape[-1])
    product = (left.t() if transb else left) @ (right.t() if transa else right)
    if out_dtype in _TORCH_DTYPES:
        product = product.to(_TORCH_DTYPES[out_dtype])

    bias_grad = None
    if bias is not None and bias.numel():
        if grad:
            bias_grad = left.sum(0).to(bias.dtype)
        else:
            product = product + bias
    if not transb:
        product = product.view(*B.shape[:-1], product.shape[-1])
    if out is not None:
        product = product.view(out.shape)
        product = out.add_(product) if accumulate else out.copy_(product)
    return product, bias_grad, None, extra_output


def sequences_of(cu_seqlens: Tensor) -> list[slice]:
    """Returns where each sequence lies among the packed tokens;
    those without a token are left out.
    """
    bounds = cu_seqlens.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]


def _attend(q_LHD: Tensor, k_LHD: Tensor, v_LHD: Tensor, scale: float) -> Tensor:
    """Returns [L, H, D] causal attention of one sequence; each key head serves a
    group of query heads.
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q_LHD, k_LHD, v_LHD))
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def fused_attn_fwd(
    max_seqlen_q: int, max_seqlen_kv: int, is_training: bool, scale: float, dropout: float,
    fast_zero_fill: bool, qkv_layout: Any, o_format: Any, scale_format: Any, bias_type: Any,
    mask_type: Any, softmax_type: Any, window: Any, bottom_right: Any,
    cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any,
) -> list[Tensor]:  # fmt: skip
    """Returns [T, H, D] causal attention within each packed sequence,
    and two statistics that nothing here reads.
    """
    assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
    assert mask_type.name == "NVTE_PADDING_CAUSAL_MASK" and q.dim() == 3 and dropout == 0.0
    assert q.shape[2] % 8 == 0 and q.shape[1] % k.shape[1] == 0
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for part in sequences_of(cu_seqlens_q):
        out[part] = _attend(q[part], k[part], v[part], scale)
    statistics = torch.zeros(q.shape[0], q.shape[1], 1)
    random_state = torch.zeros(2, dtype=torch.int64)
    return [out, statistics, random_state]


def fused_attn_bwd(
    max_seqlen_q: int, max_seqlen_kv: int, scale: float, dropout: float, fast_zero_fill: bool,
    qkv_layout: Any, o_format: Any, do_format: Any, dqkv_layout: Any, scale_format: Any,
    scale_format_2: Any, bias_type: Any, mask_type: Any, softmax_type: Any, window: Any,
    bottom_right: Any, deterministic: bool, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor,
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, d_o: Tensor, *_: Any,
) -> list[Tensor | None]:  # fmt: skip
    """Returns the gradients of q, k and v, and None for a bias."""
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for part in sequences_of(cu_seqlens_q):
        with torch.enable_grad():
            inputs = [x[part].detach().requires_grad_() for x in (q, k, v)]
            out = _attend(inputs[0], inputs[1], inputs[2], scale)
        for whole, own in zip(grads, torch.autograd.grad(out, inputs, d_o[part]), strict=True):
            whole[part] = own
    return [*grads, None]


def _rotated(
    t_THD: Tensor, freqs: Tensor, cu_seqlens: Tensor, cp_size: int, interleaved: bool, sign: int
) -> Tensor:
    assert not interleaved and cp_size == 1, "not emulated"
    assert freqs.dtype == torch.float32 and t_THD.dim() == 3
    out = torch.zeros_like(t_THD, memory_format=torch.contiguous_format)
    for part in sequences_of(cu_seqlens):
        x = t_THD[part].float()
        angle = freqs[: len(x)].view(len(x), 1, -1)
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        out[part] = (x * angle.cos() + sign * turned * angle.sin()).to(t_THD.dtype)
    return out


def fused_rope_forward(
    t: Tensor, freqs: Tensor, starts: Any, qkv_format: Any, interleaved: bool,
    cu_seqlens: Tensor, cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    """Returns [T, H, D] rotated by each token's place in its sequence."""
    return _rotated(t, freqs, cu_seqlens, cp_size, interleaved, 1)


def fused_rope_backward(
    grad: Tensor, freqs: Tensor, starts: Any, qkv_format: Any, interleaved: bool,
    cu_seqlens: Tensor, cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    """Returns the gradient rotated back: a rotation's transpose is its inverse."""
    return _rotated(grad, freqs, cu_seqlens, cp_size, interleaved, -1)


def convert_thd_to_bshd(t: Tensor, cu_seqlens: Tensor, batch: int, longest: int) -> Tensor:
    """Returns [B, L, ...] of packed [T, ...], with zeros behind each sequence."""
    out = t.new_zeros(batch, longest, *t.shape[1:])
    bounds = cu_seqlens.tolist()
    for i in range(batch):
        out[i, : bounds[i + 1] - bounds[i]] = t[bounds[i] : bounds[i + 1]]
    return out


def convert_bshd_to_thd(t: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Returns packed [T, ...] of [B, L, ...]; tokens behind the last sequence are 0."""
    out = t.new_zeros(num_tokens, *t.shape[2:])
    bounds = cu_seqlens.tolist()
    for i in range(len(bounds) - 1):
        out[bounds[i] : bounds[i + 1]] = t[i, : bounds[i + 1] - bounds[i]]
    return out


def multi_tensor_l2norm(
    chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool = False, *_: Any
) -> tuple[Tensor, Tensor | None]:
    """Returns [1] the norm of all tensors together, and on demand that of each."""
    norms = torch.stack([torch.linalg.vector_norm(t.float()) for t in lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else None


def multi_tensor_scale(
    chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], scale: float
) -> None:
    """Writes each tensor of the first list, scaled, to its partner in the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_adam(
    chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], lr: float, beta1: float,
    beta2: float, eps: float, step: int, mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """One step of Adam on lists of gradients, parameters and two moments;
    `mode` 1 decays as AdamW does.
    """
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, moment, square in zip(*lists, strict=True):
        assert gradient.dtype == parameter.dtype == moment.dtype == square.dtype == torch.float32
        if mode == 0:
            gradient = gradient + weight_decay * parameter
        moment.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (moment / correction1) / ((square / correction2).sqrt() + eps)
        if mode == 1:
            update = update + weight_decay * parameter
        parameter.sub_(lr * update)


KERNELS = (
    rmsnorm_fwd, rmsnorm_bwd, generic_gemm, fused_attn_fwd, fused_attn_bwd,
    fused_rope_forward, fused_rope_backward, convert_thd_to_bshd, convert_bshd_to_thd,
    multi_tensor_l2norm, multi_tensor_scale, multi_tensor_adam,
)  # fmt: skip
