"""What REAL is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def grpo_weights(log_ratio: Tensor, advantage: Tensor, *, epsilon: float = 0.2) -> Tensor:
    """Returns the gradient of GRPO's clipped loss in each token's log-ratio.

    The loss is -min(r A, clip(r, 1 - epsilon, 1 + epsilon) A) with the ratio r = pi / pi_old and
    the advantage A. Its gradient in log r is -A r, and 0 once r has left the trust region in the
    direction that A pulls (arXiv:2402.03300, Eq. 3, without the KL term and the mean over tokens).

    Args:
        log_ratio: [...] log pi - log pi_old of a token, nats.
        advantage: [...] group-normalised reward.
        epsilon: half-width of the trust region.

    Returns:
        [...] d loss / d log_ratio.
    """
    ratio = torch.exp(log_ratio)
    # Only the side to which the advantage pulls: the way back is always open.
    clipped = torch.where(advantage > 0, ratio > 1 + epsilon, ratio < 1 - epsilon)
    return torch.where(clipped, 0.0, -advantage * ratio)
