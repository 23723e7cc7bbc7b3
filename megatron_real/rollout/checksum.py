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
    place = torch.arange(_BLOCK, device=data.device) * _MULTIPLIER | 1
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    words = data.view(torch.int64)
    num_blocks = len(words) // _BLOCK
    whole = words[: num_blocks * _BLOCK].view(num_blocks, _BLOCK)
    factor = torch.arange(num_blocks, device=data.device) * 2 + 1
    together = _TOGETHER["cuda" if data.is_cuda else "cpu"]
    for start in range(0, num_blocks, together):
        blocks = whole[start : start + together]
        folded = blocks ^ ((blocks >> 32) & 0xFFFFFFFF)
        total += ((folded * place).sum(1) * factor[start : start + together]).sum()

    rest = words[num_blocks * _BLOCK :]
    folded = rest ^ ((rest >> 32) & 0xFFFFFFFF)
    total += (folded * place[: len(rest)]).sum() * (2 * num_blocks + 1)
    return int(total)


_BLOCK = 1 << 15
_TOGETHER = {"cpu": 1, "cuda": 1 << 10}
"""Blocks at a time: on a CPU one, which stays in its cache from the product to the sum; on a GPU 256 MiB, since a launch
costs as much there as the arithmetic of many blocks. The sum is the same."""
_MULTIPLIER = 0x5851F42D4C957F2D  # Knuth's MMIX generator: a multiplier whose products look random in every bit
