"""The log-prob head's two passes over a chunk of logits as Triton kernels, for GPUs.

Shapes: K tokens with a target, C vocabulary columns of one chunk.

`fold_chunk` reads each logit once in the forward pass, `write_gradient` reads and writes it once in
the backward pass; torch's operators, which logprobs.py keeps as the reference and for all other
devices, take five passes through a second buffer in fp32. All arithmetic is in fp32.

This module imports Triton. With TRITON_INTERPRET=1 in the environment when it is imported, Triton's
interpreter runs the kernels on CPU tensors, which is how tests/distributed/test_logit_kernels.py
compares them with the reference.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (Arguments of a kernel are Triton's pointers and scalars, which have no types outside of it.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = bool(knobs.runtime.interpret)
"""Whether the kernels run on CPU tensors, by Triton's interpreter."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Dtypes of logits that the kernels take; fp64 stays with torch."""

# The block and the warps of a sum decide its order. They are fixed, never tuned by the clock: a
# resumed run that picked others would differ in the last bit. Four logits a lane and load at 8
# warps: 8 KiB of bf16 in flight a program.
FOLD_BLOCK = 4096
FOLD_WARPS = 8

# Every element is computed alone here, so that whatever is picked gives the same bits. The list
# bounds what the first call compiles and times.
GRADIENT_CONFIGURATIONS = [
    triton.Config({"BLOCK": block}, num_warps=warps)
    for block, warps in [(2048, 8), (1024, 4), (2048, 4), (4096, 8), (8192, 16)]
]


@triton.jit
def fold_kernel(
    logits,
    row_stride,
    target,
    lse,
    picked,
    num_columns,
    first,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """Brings lse and picked up to this chunk's columns [first, first + num_columns).

    Each row has one program.
    """
    # row * row_stride outgrows 32 bits.
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * row_stride

    # The sum is kept relative to the highest logit so far, so that no exponential overflows.
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(row_logits + column, mask=column < num_columns, other=float("-inf"))
        z = x.to(tl.float32) * inverse_temperature
        higher = tl.maximum(highest, tl.max(z, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher), 0)
        highest = higher
    chunk_lse = highest + tl.log(total)

    # Before the first chunk the running value is -inf, and its exponential 0.
    running = tl.load(lse + row)
    top = tl.maximum(running, chunk_lse)
    tl.store(lse + row, top + tl.log(tl.exp(running - top) + tl.exp(chunk_lse - top)))

    # Where the target is not in this chunk, 0 is added.
    column = tl.load(target + row) - first
    inside = (column >= 0) & (column < num_columns)
    x = tl.load(row_logits + column, mask=inside, other=0.0)
    tl.store(picked + row, tl.load(picked + row) + x.to(tl.float32) * inverse_temperature)


@triton.jit
def gradient_kernel(
    logits,
    gradient,
    row_stride,
    target,
    lse,
    num_columns,
    first,
    inverse_temperature,
    BLOCK: tl.constexpr,
):
    """Writes softmax minus one-hot to `gradient`. Each row and block has one program.

    `gradient` may be `logits`; both have the same strides.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_columns
    at = row * row_stride + column

    x = tl.load(logits + at, mask=mask, other=0.0).to(tl.float32)
    p = tl.exp(x * inverse_temperature - tl.load(lse + row))
    onehot = (column == tl.load(target + row) - first).to(tl.float32)
    tl.store(gradient + at, (p - onehot).to(gradient.dtype.element_ty), mask=mask)


# In place, so that each trial needs the chunk as it was. The interpreter has no clock to tune by.
_tuned_gradient_kernel = triton.autotune(
    configs=GRADIENT_CONFIGURATIONS[:1] if INTERPRETED else GRADIENT_CONFIGURATIONS,
    key=[],
    restore_value=["logits", "gradient"],
)(gradient_kernel)


# Operators, because fake tensors pass through an operator but not through a kernel.
@torch.library.custom_op("megatron_real::fold_chunk", mutates_args=("lse_K", "picked_K"))
def fold_chunk(
    logits_KC: Tensor,
    target_K: Tensor,
    lse_K: Tensor,
    picked_K: Tensor,
    first: int,
    temperature: float,
) -> None:
    """Brings the log-sum-exp and the targets' logits up to one more chunk of columns.

    Args:
        logits_KC: [K, C] bf16, fp16 or fp32, rows contiguous; column c is token first + c.
        target_K: [K] int64 tokens.
        lse_K: [K] fp32, log-sum-exp of logits / temperature over the columns so far, -inf before
            the first; updated.
        picked_K: [K] fp32, the target's logit / temperature once its column has come, 0 before;
            updated.
        first: token of the chunk's first column.
        temperature: sampling temperature, > 0.
    """
    if not logits_KC.numel():
        # A grid of no program is an error of CUDA.
        return

    fold_kernel[(len(logits_KC),)](
        logits_KC,
        logits_KC.stride(0),
        target_K,
        lse_K,
        picked_K,
        logits_KC.shape[1],
        first,
        1 / temperature,
        BLOCK=FOLD_BLOCK,
        num_warps=FOLD_WARPS,
    )


@torch.library.custom_op("megatron_real::write_gradient", mutates_args=("gradient_KC",))
def write_gradient(
    logits_KC: Tensor,
    target_K: Tensor,
    lse_K: Tensor,
    gradient_KC: Tensor,
    first: int,
    temperature: float,
) -> None:
    """Writes the gradient of -logprob with respect to logits / temperature: softmax minus one-hot.

    Args:
        logits_KC: [K, C] bf16, fp16 or fp32, rows contiguous; column c is token first + c.
        target_K: [K] int64 tokens.
        lse_K: [K] fp32, log-sum-exp of logits / temperature over the whole vocabulary.
        gradient_KC: [K, C] of any of these dtypes and of the strides of `logits_KC`, which it may
            be; overwritten.
        first: token of the chunk's first column.
        temperature: sampling temperature, > 0.
    """
    num_rows, num_columns = logits_KC.shape
    if not logits_KC.numel():
        return

    assert gradient_KC.stride() == logits_KC.stride()

    # A program for each row and block; BLOCK is known only once the autotuner has picked.
    _tuned_gradient_kernel[lambda meta: (num_rows, triton.cdiv(num_columns, meta["BLOCK"]))](
        logits_KC,
        gradient_KC,
        logits_KC.stride(0),
        target_K,
        lse_K,
        num_columns,
        first,
        1 / temperature,
    )


@fold_chunk.register_fake
def _(
    logits_KC: Tensor,
    target_K: Tensor,
    lse_K: Tensor,
    picked_K: Tensor,
    first: int,
    temperature: float,
) -> None:
    _check_statistics(logits_KC, target_K, lse_K)
    _check_statistics(logits_KC, target_K, picked_K)


@write_gradient.register_fake
def _(
    logits_KC: Tensor,
    target_K: Tensor,
    lse_K: Tensor,
    gradient_KC: Tensor,
    first: int,
    temperature: float,
) -> None:
    _check_statistics(logits_KC, target_K, lse_K)
    assert gradient_KC.stride() == logits_KC.stride()


def _check_statistics(logits_KC: Tensor, target_K: Tensor, statistic_K: Tensor) -> None:
    """Asserts what the kernels rely on and cannot see, so that a rehearsal without a GPU does."""
    assert logits_KC.dtype in DTYPES and logits_KC.stride(1) == 1
    assert target_K.dtype == torch.int64 and statistic_K.dtype == torch.float32
    assert target_K.is_contiguous() and statistic_K.is_contiguous()
    assert logits_KC.device == target_K.device == statistic_K.device
    assert len(logits_KC) == len(target_K) == len(statistic_K)
