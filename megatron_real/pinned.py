"""Host memory that a GPU copies to and from without waiting: a flat buffer of pinned memory.

torch's own pinned allocator hands out powers of two, up to twice of what is asked for, and a tensor
at a time: the copy of a 7B model's optimizer would take up to twice its 90 GB of host memory. Here
ordinary memory is registered with the driver instead. Without CUDA it stays ordinary memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 256
"""Bytes to which each tensor's start is aligned."""
_PAGE = 4096
"""Bytes of a page of memory."""


def host_copies(like: Sequence[Tensor]) -> list[Tensor]:
    """Returns an uninitialised host tensor for each of `like`, of its shape and dtype.

    They are views of one buffer, which lives as long as any of them.

    Raises:
        MemoryError: the driver does not pin so much memory; the sentence gives the amount.
    """
    starts = []
    end = 0
    for tensor in like:
        starts.append(end)
        end += _rounded(tensor.nbytes, _ALIGNMENT)
    size = _rounded(end, _PAGE)

    # A page more than needed, so that whole pages can be pinned wherever the memory begins.
    flat = torch.empty(size + _PAGE, dtype=torch.uint8)
    if torch.cuda.is_available() and size:
        flat = _pinned(flat, size)

    copies = []
    for start, tensor in zip(starts, like, strict=True):
        part = flat[start : start + tensor.nbytes]
        # view() to a wider dtype asks for an aligned start.
        copies.append(part.view(tensor.dtype).view(tensor.shape))
    return copies


def _rounded(num_bytes: int, multiple: int) -> int:
    return -(-num_bytes // multiple) * multiple


def _pinned(memory: Tensor, size: int) -> Tensor:
    """Returns `size` bytes of `memory`, pinned.

    They are whole pages, since the driver pins those, and none of them twice.
    """
    # From the first start of a page on.
    flat = memory[-memory.data_ptr() % _PAGE :][:size]
    runtime = torch.cuda.cudart()
    address = flat.data_ptr()

    # The driver keeps CUDA's own result; 0 is success, also where the bindings give an enum.
    result = int(runtime.cudaHostRegister(address, flat.nbytes, 0))
    if result:
        raise MemoryError(
            f"the driver does not pin {flat.nbytes / 2**30:.1f} GiB of host memory (CUDA error "
            f"{result}); raise the locked-memory limit (ulimit -l), or leave more of the host's "
            f"memory free"
        )

    # torch frees the memory with its storage; the driver must have let go of it by then.
    weakref.finalize(flat.untyped_storage(), runtime.cudaHostUnregister, address)
    return flat
