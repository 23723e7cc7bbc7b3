"""The objectives: pure tensor maths, no Megatron, no process group.

objective.py says what an objective is, registry.py which there are, functions.py applies them to a
whole minibatch. REAL's own functions come without the rest:

    log-probs --sequence_scores--> scores --real_weights--> weights --> backward of sum_k w_k * s_k

The names are imported on first use: the registry and the settings load without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_real.objective.baselines import grpo_weights
    from megatron_real.objective.functions import objective_loss, token_weights
    from megatron_real.objective.objective import KlConfig, Objective
    from megatron_real.objective.real import OneClassGroups, Variant, real_loss, real_weights
    from megatron_real.objective.registry import make_objective
    from megatron_real.objective.scores import sequence_scores

_MODULES = {
    "KlConfig": "objective",
    "Objective": "objective",
    "OneClassGroups": "real",
    "Variant": "real",
    "grpo_weights": "baselines",
    "make_objective": "registry",
    "objective_loss": "functions",
    "real_loss": "real",
    "real_weights": "real",
    "sequence_scores": "scores",
    "token_weights": "functions",
}

__all__ = [
    "KlConfig",
    "Objective",
    "OneClassGroups",
    "Variant",
    "grpo_weights",
    "make_objective",
    "objective_loss",
    "real_loss",
    "real_weights",
    "sequence_scores",
    "token_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'megatron_real.objective' has no attribute {name!r}")
    # Not stored in the module's globals: importlib's own cache makes the second look-up cheap.
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
