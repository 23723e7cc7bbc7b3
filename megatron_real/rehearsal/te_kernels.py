"""Emulates TransformerEngine's kernels on fake CUDA tensors: what each allocates, and its FLOPs.

Each function stands where `transformer_engine_torch` has one of the same name, and takes its
arguments in its order; tests/emulated_te/kernels.py has the same ones with numbers. Workspaces
within cuDNN are not known, and not counted.

Shapes: T packed tokens, H heads, D head size, B sequences, L the longest of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes as outside_modes

from megatron_real.rehearsal import transformer_engine
from megatron_real.rehearsal.device import launched
from megatron_real.rehearsal.meter import Meter

_DTYPES = {
    transformer_engine.DType.kFloat32: torch.float32,
    transformer_engine.DType.kFloat16: torch.float16,
    transformer_engine.DType.kBFloat16: torch.bfloat16,
}


def install() -> None:
    """Imports TransformerEngine's Python over these kernels.

    This must come after device.install, and before megatron is imported.
    """
    transformer_engine.import_over(transformer_engine.extension(KERNELS))

    from transformer_engine.pytorch.attention.dot_product_attention import utils

    choose = utils.get_attention_backend

    def choose_as_for_tensors(attention_params: Any = None) -> Any:
        """Chooses as for a real tensor: the choice asks for the class, and a fake has its own."""
        attention_params.qkv_type = Tensor
        return choose(attention_params)

    utils.get_attention_backend = choose_as_for_tensors


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Tensor | None, quantizer: Any, *_: Any
) -> tuple[Tensor, None, Tensor]:
    """Returns the normalised [T, hidden], None, and 1 / rms [T] in fp32; one pass makes them."""
    assert quantizer is None and x.dim() == 2 and x.shape[-1:] == weight.shape
    launched("te.rmsnorm_fwd")
    inverse_rms = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if out is None:
        out = torch.empty_like(x)
    return out, None, inverse_rms


def rmsnorm_bwd(
    grad: Tensor, x: Tensor, inverse_rms: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and of the weight."""
    assert grad.shape == x.shape
    launched("te.rmsnorm_bwd")
    return torch.empty_like(x), torch.empty_like(weight)


def generic_gemm(
    A: Tensor, transa: bool, B: Tensor, transb: bool, out: Tensor | None, quantizer: Any,
    out_dtype: Any, bias: Tensor | None, bias_type: Any, gelu: bool, gelu_in: Any, grad: bool,
    workspace: Tensor, workspace_size: int, accumulate: bool, use_split_accumulator: bool,
    comm_overlap: Any = None, comm_type: Any = None, extra_output: Any = None,
    bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> tuple[Tensor, Tensor | None, None, Any]:  # fmt: skip
    """Returns op(B) @ op(A) in row-major order, and the gradient of a bias where one is wanted.

    Bias and accumulation happen inside the product's kernel.
    """
    assert quantizer is None and not gelu and comm_overlap is None
    if A.dtype != B.dtype or A.device != B.device:
        raise RuntimeError(
            f"a product of {A.dtype} on {A.device} and {B.dtype} on {B.device}: cuBLAS has none"
        )
    # cuBLAS counts by columns: the first argument is the right factor of a row-major product.
    left = B.reshape(-1, B.shape[-1])
    right = A.reshape(-1, A.shape[-1])
    left_shape = left.shape
    if transb:
        left_shape = left_shape[::-1]
    right_shape = right.shape
    if transa:
        right_shape = right_shape[::-1]
    rows, inner = left_shape
    inner_right, columns = right_shape
    if inner != inner_right:
        raise RuntimeError(f"a product of {tuple(B.shape)} and {tuple(A.shape)}: sizes differ")
    # A multiplication and an addition are 2 FLOPs.
    launched("te.gemm", 2 * rows * inner * columns)

    if out is None:
        shape: tuple[int, ...] = (*B.shape[:-1], columns)
        if transb:
            shape = (rows, columns)
        dtype = _DTYPES.get(out_dtype, A.dtype)
        out = torch.empty(shape, dtype=dtype, device=A.device)
    bias_grad = None
    if grad and bias is not None and bias.numel():
        bias_grad = torch.empty_like(bias)
    return out, bias_grad, None, extra_output


def fused_attn_fwd(
    max_seqlen_q: int, max_seqlen_kv: int, is_training: bool, scale: float, dropout: float,
    fast_zero_fill: bool, qkv_layout: Any, o_format: Any, scale_format: Any, bias_type: Any,
    mask_type: Any, softmax_type: Any, window: Any, bottom_right: Any,
    cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any,
) -> list[Tensor]:  # fmt: skip
    """Returns attention's output, and what its backward pass needs besides.

    Returns:
        The output [T, H, D], the log-sum-exp of each query and head [T, H, 1] in fp32, and the
        state of a random generator.
    """
    _check_bounds(q, cu_seqlens_q, cu_seqlens_kv)
    assert mask_type.name in ("NVTE_PADDING_CAUSAL_MASK", "NVTE_PADDING_MASK") and dropout == 0.0
    # cuDNN's fused kernel takes head sizes in multiples of 8, and whole groups of query heads.
    assert q.dim() == 3 and q.shape[2] % 8 == 0 and q.shape[1] % k.shape[1] == 0
    # Two products: queries with keys, and the weights with values.
    launched("te.fused_attn_fwd", 4 * _pairs(q, cu_seqlens_q, cu_seqlens_kv, mask_type))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    statistics = torch.empty(q.shape[0], q.shape[1], 1, dtype=torch.float32, device=q.device)
    return [out, statistics, torch.empty(2, dtype=torch.int64, device=q.device)]


def fused_attn_bwd(
    max_seqlen_q: int, max_seqlen_kv: int, scale: float, dropout: float, fast_zero_fill: bool,
    qkv_layout: Any, o_format: Any, do_format: Any, dqkv_layout: Any, scale_format: Any,
    scale_format_2: Any, bias_type: Any, mask_type: Any, softmax_type: Any, window: Any,
    bottom_right: Any, deterministic: bool, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor,
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, d_o: Tensor, *_: Any,
) -> list[Tensor | None]:  # fmt: skip
    """Returns the gradients of q, k and v, and None for a bias: five products for forward's two."""
    _check_bounds(q, cu_seqlens_q, cu_seqlens_kv)
    assert o.shape == d_o.shape == q.shape
    launched("te.fused_attn_bwd", 10 * _pairs(q, cu_seqlens_q, cu_seqlens_kv, mask_type))
    return [*(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)), None]


def _check_bounds(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor) -> None:
    """Checks the dtype and the device of the bounds of sequences."""
    for bounds in (cu_seqlens_q, cu_seqlens_kv):
        if bounds.dtype != torch.int32 or bounds.device != q.device:
            raise RuntimeError(
                f"bounds of sequences are {bounds.dtype} on {bounds.device}; attention's kernel "
                f"takes torch.int32 on {q.device}"
            )


def _pairs(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, mask_type: Any) -> int:
    """Returns the multiplications of one product of queries and keys.

    They are those of the whole square, or half of them where attention is causal.
    """
    queries = Meter.values(cu_seqlens_q)
    keys = Meter.values(cu_seqlens_kv)
    assert queries is not None and keys is not None, "the bounds of the sequences are not known"
    pairs = sum(
        one * other
        for one, other in zip(_lengths(queries), _lengths(keys), strict=True)
    )  # fmt: skip
    if mask_type.name == "NVTE_PADDING_CAUSAL_MASK":
        # Half of the pairs: a query sees no later key.
        return q.shape[1] * q.shape[2] * pairs // 2
    return q.shape[1] * q.shape[2] * pairs


def _lengths(bounds: Tensor) -> list[int]:
    """Returns the lengths [B] of sequences whose bounds [B + 1] these are."""
    with outside_modes():
        lengths: list[int] = bounds.diff().tolist()
    return lengths


# The next five are what ring attention over context-parallel ranks needs.
def thd_read_half_tensor(t: Tensor, cu_seqlens: Tensor, half: int) -> Tensor:
    """Returns [T / 2, ...] one of the two pieces of each sequence on a context-parallel rank."""
    launched("te.thd_read_half_tensor")
    return torch.empty(t.shape[0] // 2, *t.shape[1:], dtype=t.dtype, device=t.device)


def thd_read_second_half_lse(
    lse: Tensor, cu_seqlens: Tensor, packed: bool, second_half_length: int
) -> Tensor:
    """Returns the log-sum-exps [H, T / 2] of the second pieces."""
    assert packed
    launched("te.thd_read_second_half_lse")
    return torch.empty(lse.shape[0], second_half_length, dtype=lse.dtype, device=lse.device)


def thd_second_half_lse_correction(
    lse: Tensor, step_lse: Tensor, cu_seqlens: Tensor, packed: bool
) -> None:
    """Adds a step of the ring to the log-sum-exps of the second pieces, in place."""
    assert packed and lse.shape[1] == 2 * step_lse.shape[1]
    launched("te.thd_second_half_lse_correction")


def thd_out_correction(out: Tensor, step_out: Tensor, *_: Any) -> None:
    """Adds a step of the ring to the output with its share, in place."""
    assert out.dtype == step_out.dtype
    launched("te.thd_out_correction")


def thd_grad_correction(grad: Tensor, step_grad: Tensor, *_: Any) -> None:
    """Adds a step of the ring to a gradient, in place."""
    assert grad.dtype == step_grad.dtype
    launched("te.thd_grad_correction")


def fused_rope_forward(
    t: Tensor, freqs: Tensor, starts: Any, qkv_format: Any, interleaved: bool, cu_seqlens: Tensor,
    cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    """Returns t [T, H, D] rotated, contiguous."""
    return _rotated("te.fused_rope_forward", t, freqs)


def fused_rope_backward(
    grad: Tensor, freqs: Tensor, starts: Any, qkv_format: Any, interleaved: bool,
    cu_seqlens: Tensor, cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    """Returns the gradient [T, H, D] rotated back, contiguous."""
    return _rotated("te.fused_rope_backward", grad, freqs)


def _rotated(name: str, t: Tensor, freqs: Tensor) -> Tensor:
    """Counts a rotation and returns its output, which is contiguous."""
    assert freqs.dtype == torch.float32 and freqs.device == t.device and t.dim() == 3
    launched(name)
    return torch.empty(t.shape, dtype=t.dtype, device=t.device)


def convert_thd_to_bshd(t: Tensor, cu_seqlens: Tensor, batch: int, longest: int) -> Tensor:
    """Returns packed [T, ...] as [B, L, ...], for attention in fp32, which no fused kernel has."""
    launched("te.convert_thd_to_bshd")
    return torch.empty(batch, longest, *t.shape[1:], dtype=t.dtype, device=t.device)


def convert_bshd_to_thd(t: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Returns [B, L, ...] packed as [T, ...]."""
    launched("te.convert_bshd_to_thd")
    return torch.empty(num_tokens, *t.shape[2:], dtype=t.dtype, device=t.device)


def multi_tensor_l2norm(
    chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool = False, *_: Any
) -> tuple[Tensor, Tensor | None]:
    """Returns the norm [1] of all tensors together, whose value only a GPU knows, and None."""
    assert not per_tensor
    return torch.linalg.vector_norm(lists[0][0]).float().reshape(1), None


def multi_tensor_scale(
    chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], scale: float
) -> None:
    """Writes each tensor of the first list, scaled, into its partner in the second.

    Nothing is allocated.
    """
    launched("te.multi_tensor_scale")


def multi_tensor_adam(
    chunk_size: int, overflow: Tensor, lists: list[list[Tensor]], *_: Any
) -> None:
    """Makes a step of Adam in place; nothing is allocated."""
    for gradient, parameter, moment, square in zip(*lists, strict=True):
        dtypes = {tensor.dtype for tensor in (gradient, parameter, moment, square)}
        assert dtypes == {torch.float32}, f"Adam of {dtypes}"
        assert gradient.shape == parameter.shape == moment.shape == square.shape
    launched("te.multi_tensor_adam")


KERNELS = (
    rmsnorm_fwd, rmsnorm_bwd, generic_gemm, fused_attn_fwd, fused_attn_bwd, fused_rope_forward,
    fused_rope_backward, convert_thd_to_bshd, convert_bshd_to_thd, multi_tensor_l2norm,
    multi_tensor_scale, multi_tensor_adam, thd_read_half_tensor, thd_read_second_half_lse,
    thd_second_half_lse_correction, thd_out_correction, thd_grad_correction,
)  # fmt: skip
