"""Estimates of the KL divergence from the log-prob of the sampled token, as terms of a loss.

Each is differentiated as it stands. The gradient of k1 has no relation to that of the divergence on
samples of the old policy: its expectation is 0. Those of k2 and k3 are in use; DeepSeekMath's Eq. 4
is k3 to the reference.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def kl_estimate(
    logprob: Tensor, other_logprob: Tensor, estimator: Literal["k1", "k2", "k3"]
) -> Tensor:
    """Returns the estimate of KL(pi || other) of each token, nats, elementwise.

    Args:
        logprob: log pi of the sampled tokens; differentiable.
        other_logprob: log-probs of the same tokens under the other policy; a constant.
        estimator: with d = logprob - other_logprob: k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d, which
            is never negative.
    """
    difference = logprob - other_logprob
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    # expm1: e^-d - 1 would lose all digits of a small difference.
    return torch.expm1(-difference) + difference
