"""A checksum of tensors that is cheap enough for every weight sync, the same on CPUs and GPUs."""

from __future__ import annotations

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> int:
    """A number of 64 bits that depends on every bit of the tensor and on its place; equal bits give equal numbers.

    The sum of each 8 bytes times an odd number of their place, modulo 2^64: what changes alone always changes it. Their
    upper half is first folded into the lower one, because a product carries upwards only.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8 or data.numel() % 8:
        data = torch.cat([data, data.new_zeros(-data.numel() % 8)])
    # A block stays in the processor's cache from the product to the sum.
    place = torch.arange(_BLOCK, device=data.device) * _MULTIPLIER | 1
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for number, block in enumerate(data.view(torch.int64).split(_BLOCK)):
        folded = block ^ ((block >> 32) & 0xFFFFFFFF)
        total += (folded * place[: len(block)]).sum() * (2 * number + 1)
    return int(total)


_BLOCK = 1 << 15
_MULTIPLIER = 0x5851F42D4C957F2D  # Knuth's MMIX generator: a multiplier whose products look random in every bit
