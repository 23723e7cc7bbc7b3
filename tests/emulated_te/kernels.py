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
    if out is not None:
        result = out.copy_(result)
    return result, None, inverse_rms


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
    if transa:
        right = right.t()
    product = left.t() @ right if transb else left @ right
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
        if accumulate:
            product = out.add_(product)
        else:
            product = out.copy_(product)
    return product, bias_grad, None, extra_output


def sequences_of(cu_seqlens: Tensor) -> list[slice]:
    """Returns where each sequence lies among the packed tokens;
    those without a token are left out.
    """
    bounds = cu_seqlens.tolist()
    return [slice(a, b) for a, b in itertools.pairwise(bounds) if b > a]


def _probabilities(
    q_LHD: Tensor, k_SHD: Tensor, scale: float, lse_LH1: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Returns [H, L, S] attention's probabilities and [H, L, 1] their log-sum-exp, in fp32.

    With a log-sum-exp given, which may be over more keys than these, they are relative to it.
    """
    scores_HLS = torch.einsum("lhd,shd->hls", q_LHD.float(), k_SHD.float()) * scale
    if causal:
        assert len(q_LHD) == len(k_SHD)
        later = torch.ones(scores_HLS.shape[1:], dtype=torch.bool).triu(1)
        scores_HLS = scores_HLS.masked_fill(later, -torch.inf)
    if lse_LH1 is None:
        lse_HL1 = scores_HLS.logsumexp(-1, keepdim=True)
    else:
        lse_HL1 = lse_LH1.transpose(0, 1)
    return torch.exp(scores_HLS - lse_HL1), lse_HL1


def _is_causal(mask_type: Any) -> bool:
    assert mask_type.name in ("NVTE_PADDING_CAUSAL_MASK", "NVTE_PADDING_MASK")
    return bool(mask_type.name == "NVTE_PADDING_CAUSAL_MASK")


def _pairs_of_sequences(cu_q: Tensor, cu_kv: Tensor) -> list[tuple[slice, slice]]:
    return list(zip(sequences_of(cu_q), sequences_of(cu_kv), strict=True))


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
    assert q.dim() == 3 and dropout == 0.0
    assert q.shape[2] % 8 == 0 and q.shape[1] % k.shape[1] == 0
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    statistics = torch.zeros(q.shape[0], q.shape[1], 1)
    for own, other in _pairs_of_sequences(cu_seqlens_q, cu_seqlens_kv):
        # Each key head serves a group of query heads.
        key, value = (x[other].repeat_interleave(group, 1) for x in (k, v))
        p_HLS, lse_HL1 = _probabilities(q[own], key, scale, None, _is_causal(mask_type))
        out[own] = torch.einsum("hls,shd->lhd", p_HLS, value.float()).to(q.dtype)
        statistics[own] = lse_HL1.transpose(0, 1)
    random_state = torch.zeros(2, dtype=torch.int64)
    return [out, statistics, random_state]


def fused_attn_bwd(
    max_seqlen_q: int, max_seqlen_kv: int, scale: float, dropout: float, fast_zero_fill: bool,
    qkv_layout: Any, o_format: Any, do_format: Any, dqkv_layout: Any, scale_format: Any,
    scale_format_2: Any, bias_type: Any, mask_type: Any, softmax_type: Any, window: Any,
    bottom_right: Any, deterministic: bool, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor,
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, d_o: Tensor, fake_dtype: Any,
    auxiliary: list[Tensor], *_: Any,
) -> list[Tensor | None]:  # fmt: skip
    """Returns the gradients of q, k and v, and None for a bias.

    The output and the log-sum-exp may be over more keys than this call's: each key's share is
    exact then too.
    """
    heads = k.shape[1]
    groups = q.shape[1] // heads
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    for own, other in _pairs_of_sequences(cu_seqlens_q, cu_seqlens_kv):
        query = q[own].float()
        gradient = d_o[own].float()
        key, value = (x[other].float().repeat_interleave(groups, 1) for x in (k, v))
        p_HLS, _lse = _probabilities(query, key, scale, auxiliary[0][own], _is_causal(mask_type))
        along_HL1 = (gradient * o[own].float()).sum(-1).t().unsqueeze(-1)
        grad_p_HLS = torch.einsum("lhd,shd->hls", gradient, value)
        grad_scores_HLS = p_HLS * (grad_p_HLS - along_HL1) * scale

        grads[0][own] = torch.einsum("hls,shd->lhd", grad_scores_HLS, key).to(q.dtype)
        grad_key = torch.einsum("hls,lhd->shd", grad_scores_HLS, query)
        grad_value = torch.einsum("hls,lhd->shd", p_HLS, gradient)
        for whole, one in ((grads[1], grad_key), (grads[2], grad_value)):
            whole[other] = one.unflatten(1, (heads, groups)).sum(2).to(k.dtype)
    return [*grads, None]


def _halves(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where the first and the second half of each sequence lie among this rank's tokens.

    Under context parallelism a rank has two pieces of each sequence, one from the front and one
    from the back.
    """
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for part in sequences_of(cu_seqlens):
        middle = (part.start + part.stop) // 2
        halves[0].append(torch.arange(part.start, middle))
        halves[1].append(torch.arange(middle, part.stop))
    return torch.cat(halves[0]), torch.cat(halves[1])


def thd_read_half_tensor(t: Tensor, cu_seqlens: Tensor, half: int) -> Tensor:
    """Returns [T / 2, ...] one half of each sequence."""
    return t[_halves(cu_seqlens)[half]]


def thd_read_second_half_lse(
    lse_HT: Tensor, cu_seqlens: Tensor, packed: bool, second_half_length: int
) -> Tensor:
    """Returns [H, T / 2] the log-sum-exps of the second half of each sequence."""
    second = _halves(cu_seqlens)[1]
    assert packed and len(second) == second_half_length
    return lse_HT[:, second]


def thd_second_half_lse_correction(
    lse_HT: Tensor, step_lse: Tensor, cu_seqlens: Tensor, packed: bool
) -> None:
    """Adds a step's keys, which only the second halves see, to the log-sum-exps in place."""
    assert packed
    second = _halves(cu_seqlens)[1]
    lse_HT[:, second] = torch.logaddexp(lse_HT[:, second], step_lse)


def thd_out_correction(
    out_THD: Tensor, step_out: Tensor, old_lse_HT: Tensor, lse_HT: Tensor, step_lse: Tensor,
    cu_seqlens: Tensor, only_second_half: bool, packed: bool,
) -> None:  # fmt: skip
    """Rescales the output to the new log-sum-exp and adds a step's with its share, in place."""
    assert packed
    rows = torch.arange(len(out_THD))
    if only_second_half:
        rows = _halves(cu_seqlens)[1]
    old_share = torch.exp(old_lse_HT - lse_HT)[:, rows].t().unsqueeze(-1)
    step_share = torch.exp(step_lse - lse_HT[:, rows]).t().unsqueeze(-1)
    mixed = out_THD[rows].float() * old_share + step_out.float() * step_share
    out_THD[rows] = mixed.to(out_THD.dtype)


def thd_grad_correction(
    grad: Tensor, step_grad: Tensor, cu_seqlens: Tensor, first_half: str, second_half: str
) -> None:
    """Copies or adds a step's gradient to each half of the sequences, in place, or zeroes it.

    Where a half is left alone or zeroed, the step has a gradient of the other half only.
    """
    actions = (first_half, second_half)
    whole = all(action in ("add", "copy") for action in actions)
    for rows, action in zip(_halves(cu_seqlens), actions, strict=True):
        if action == "zero":
            grad[rows] = 0
            continue
        if action == "none":
            continue
        step = step_grad
        if whole:
            step = step_grad[rows]
        if action == "add":
            step = grad[rows] + step
        grad[rows] = step


def _rotated(
    t_THD: Tensor,
    freqs: Tensor,
    cu_seqlens: Tensor,
    cp: tuple[int, int],
    interleaved: bool,
    sign: int,
) -> Tensor:
    cp_size, cp_rank = cp
    assert not interleaved, "not emulated"
    assert freqs.dtype == torch.float32 and t_THD.dim() == 3
    out = torch.zeros_like(t_THD, memory_format=torch.contiguous_format)
    # The bounds are of whole sequences, of which this rank has the pieces cp_rank from either end.
    for part in sequences_of(cu_seqlens // cp_size):
        x = t_THD[part].float()
        places = torch.arange(len(x))
        if cp_size > 1:
            half = len(x) // 2
            front = cp_rank * half + torch.arange(half)
            back = (2 * cp_size - 1 - cp_rank) * half + torch.arange(half)
            places = torch.cat([front, back])
        angle = freqs[places].view(len(x), 1, -1)
        first, second = x.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
        out[part] = (x * angle.cos() + sign * turned * angle.sin()).to(t_THD.dtype)
    return out


def fused_rope_forward(
    t: Tensor, freqs: Tensor, starts: Any, qkv_format: Any, interleaved: bool,
    cu_seqlens: Tensor, cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    """Returns [T, H, D] rotated by each token's place in its sequence."""
    return _rotated(t, freqs, cu_seqlens, (cp_size, cp_rank), interleaved, 1)


def fused_rope_backward(
    grad: Tensor, freqs: Tensor, starts: Any, qkv_format: Any, interleaved: bool,
    cu_seqlens: Tensor, cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    """Returns the gradient rotated back: a rotation's transpose is its inverse."""
    return _rotated(grad, freqs, cu_seqlens, (cp_size, cp_rank), interleaved, -1)


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
    norm = norms.norm().reshape(1)
    if per_tensor:
        return norm, norms
    return norm, None


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
    correction1 = 1.0
    correction2 = 1.0
    if bias_correction:
        correction1 = 1 - beta1**step
        correction2 = 1 - beta2**step
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
    thd_read_half_tensor, thd_read_second_half_lse, thd_second_half_lse_correction,
    thd_out_correction, thd_grad_correction,
)  # fmt: skip
