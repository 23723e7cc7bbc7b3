"""Trains language models by REAL (Rewards as Labels, arXiv:2602.05630) on Megatron-LM.

The public functions for a training loop of your own (examples/own_megatron_loop.py) are imported on first use, so that
the configuration and the records load without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megatron_real.objective import real_loss, real_weights, sequence_scores
    from megatron_real.policy.logprobs import linear_logprobs, vocab_parallel_logprobs

_HOME = {
    "real_loss": "megatron_real.objective",
    "real_weights": "megatron_real.objective",
    "sequence_scores": "megatron_real.objective",
    "linear_logprobs": "megatron_real.policy.logprobs",
    "vocab_parallel_logprobs": "megatron_real.policy.logprobs",
}

__all__ = ["linear_logprobs", "real_loss", "real_weights", "sequence_scores", "vocab_parallel_logprobs"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'megatron_real' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
