"""A checksum of tensors that is cheap enough for every weight sync, the same on CPUs and GPUs."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 15
"""Words of 8 bytes in a block."""

_TOGETHER = {"cpu": 1, "cuda": 1 << 10}
"""Blocks that are summed at a time. The sum does not depend on it.

On a CPU it is one, which stays in the cache from the product to the sum. On a GPU it is 256 MiB,
where a launch costs as much as the arithmetic of many blocks.
"""

# Knuth's MMIX generator: a multiplier whose products look random in every bit.
_MULTIPLIER = 0x5851F42D4C957F2D


def checksum(tensor: Tensor) -> int:
    """Returns a number of 64 bits that depends on every bit of the tensor and on the bit's place.

    Equal bits give equal numbers. The number is the sum, modulo 2^64, of each word of 8 bytes times
    an odd number that its place determines. Multiplying by an odd number can be undone, so a single
    word that changes always changes the sum. The upper half of each word is first folded into its
    lower half, because a product carries upwards only.
    """
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    # A view as int64 wants whole words that begin at a multiple of 8 bytes.
    if data.storage_offset() % 8 or data.numel() % 8:
        data = torch.cat([data, data.new_zeros(-data.numel() % 8)])

    words = data.view(torch.int64)

    # A word's factor is its place within the block times the factor of the block, both odd.
    place = torch.arange(_BLOCK, device=data.device) * _MULTIPLIER | 1
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    num_blocks = len(words) // _BLOCK
    whole = words[: num_blocks * _BLOCK].view(num_blocks, _BLOCK)
    factor = torch.arange(num_blocks, device=data.device) * 2 + 1

    together = _TOGETHER["cuda" if data.is_cuda else "cpu"]
    for start in range(0, num_blocks, together):
        blocks = whole[start : start + together]
        # int64 is signed, and >> repeats its sign: the mask keeps the 32 bits that were moved.
        folded = blocks ^ ((blocks >> 32) & 0xFFFFFFFF)
        total += ((folded * place).sum(1) * factor[start : start + together]).sum()

    # The last block, which is shorter: its factor is the next odd number.
    rest = words[num_blocks * _BLOCK :]
    folded = rest ^ ((rest >> 32) & 0xFFFFFFFF)
    total += (folded * place[: len(rest)]).sum() * (2 * num_blocks + 1)
    # int64 wraps around, which is the sum modulo 2^64.
    return int(total)
