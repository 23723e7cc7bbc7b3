"""The objective: pure tensor maths, no Megatron, no process group.

    log-probs --sequence_scores--> scores --real_weights--> weights --> backward of sum_k w_k * s_k

`real_loss` is the same objective for a caller that holds whole groups at once and wants autograd to do the rest.
"""

from megatron_real.objective.baselines import grpo_weights
from megatron_real.objective.real import OneClassGroups, Variant, real_loss, real_weights
from megatron_real.objective.scores import sequence_scores

__all__ = [
    "OneClassGroups",
    "Variant",
    "grpo_weights",
    "real_loss",
    "real_weights",
    "sequence_scores",
]
