"""Rollouts laid out by group: a table instead of scatter_add, which on CUDA sums in a random order.

Every rank computes the weights of all rollouts for itself, and all must get the very same ones.

Legend: R rollouts, G groups with a member, M members of the largest group.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_table(group_R: Tensor, member_R: Tensor) -> tuple[Tensor, Tensor]:
    """Lays the members of each group out in a row.

    Args:
        group_R: [R] integers; equal values form a group.
        member_R: [R] bool: whether a rollout is in the table.

    Returns:
        index_GM, [G, M] int64: the rollout in each cell, 0 where there is none; and filled_GM,
        [G, M] bool: whether there is one. Both are empty without members.
    """
    # Members alone: no cell refers to another rollout, whose values may be NaN.
    index_K = member_R.nonzero().squeeze(1)
    unique_G, group_K = torch.unique(group_R[index_K], return_inverse=True)
    # Stable: members keep their order, so the sums of all ranks are equal to the bit.
    order_K = torch.argsort(group_K, stable=True)
    count_G = torch.bincount(group_K, minlength=len(unique_G))
    widest = max(count_G.tolist(), default=0)
    filled_GM = torch.arange(widest, device=group_R.device) < count_G.unsqueeze(1)

    index_GM = torch.zeros(filled_GM.shape, dtype=torch.int64, device=group_R.device)
    # masked_scatter fills row by row, which is the order of order_K: groups ascend, each in a run.
    index_GM = index_GM.masked_scatter(filled_GM, index_K[order_K])
    return index_GM, filled_GM


def masked_log_sum_exp(x_GM: Tensor, mask_GM: Tensor) -> Tensor:
    """Returns [G] log sum of e^x over the cells of the mask; every row must have one."""
    return x_GM.masked_fill(~mask_GM, -torch.inf).logsumexp(1)
