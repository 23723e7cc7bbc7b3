"""Matrix products of bf16 operands whose result stays in fp32, as the tensor cores accumulate it.

On a GPU the library's product writes fp32 itself. Where it cannot (a CPU, or a torch without that
overload), the operands are widened first: products of two bf16 numbers are exact in fp32, so that
both ways differ by the order of their sums alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def product_into(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor) -> None:
    """Writes a @ b to `out_MN`, whose dtype is that of the operands or wider."""
    if out_MN.dtype == a_MK.dtype:
        torch.mm(a_MK, b_KN, out=out_MN)
    elif a_MK.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype_out"):
        torch.mm(a_MK, b_KN, out_dtype=out_MN.dtype, out=out_MN)
    else:
        torch.mm(a_MK.to(out_MN.dtype), b_KN.to(out_MN.dtype), out=out_MN)


def add_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    """Adds a @ b to `sum_MN`, whose dtype is that of the operands or wider.

    On a GPU a wider sum is read and written by the product itself, and the product is not rounded
    before it is added.
    """
    if sum_MN.device.type == "cuda" and sum_MN.dtype != a_MK.dtype:
        _add_wide_product(sum_MN, a_MK, b_KN)
    else:
        sum_MN += a_MK @ b_KN


# An operator of its own, because fake tensors know no addmm that writes in place to another dtype.
@torch.library.custom_op("megatron_real::add_wide_product", mutates_args=("sum_MN",))
def _add_wide_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    if _adds_in_place(sum_MN.device):
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=sum_MN.dtype, out=sum_MN)
    else:
        sum_MN += a_MK @ b_KN


@_add_wide_product.register_fake
def _(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor) -> None:
    assert a_MK.dtype == b_KN.dtype and a_MK.device == b_KN.device == sum_MN.device
    assert sum_MN.shape == (a_MK.shape[0], b_KN.shape[1]) and a_MK.shape[1] == b_KN.shape[0]


@register_flop_formula(torch.ops.megatron_real.add_wide_product)
def _add_wide_product_flops(
    sum_shape: torch.Size, a_shape: torch.Size, b_shape: torch.Size, **_: object
) -> int:
    # torch's FLOP counter knows no operator of ours, and would miss the head's backward pass.
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@cache
def _adds_in_place(device: torch.device) -> bool:
    """Returns whether this torch adds a bf16 product to an fp32 matrix.

    The first versions with `out_dtype` have the overload and refuse it, so it is tried, once for
    each device.
    """
    if not hasattr(torch.ops.aten.addmm, "dtype_out"):
        return False

    factor = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    wide = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        # 16 x 16: whole tiles with aligned rows, so that a refusal is about the dtypes alone.
        torch.addmm(wide, factor, factor, out_dtype=torch.float32, out=wide)
    except RuntimeError:
        # Its message names a dtype, and says nothing that a caller could act upon.
        return False
    return True
