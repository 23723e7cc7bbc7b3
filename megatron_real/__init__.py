"""Trains language models by REAL (Rewards as Labels, arXiv:2602.05630) on Megatron-LM.

Every public name is imported on first use, so that the configuration and the records of runs load
without torch. docs/python.md shows what belongs together: a run from Python (`load_config`,
`train`, `RunRecords`), and the losses for a training loop of your own
(examples/own_megatron_loop.py).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from megatron_real.config import Config
    from megatron_real.config import load as load_config
    from megatron_real.objective import (
        KlConfig,
        make_objective,
        objective_loss,
        real_loss,
        real_weights,
        sequence_scores,
        token_weights,
    )
    from megatron_real.policy.logprobs import linear_logprobs, vocab_parallel_logprobs
    from megatron_real.runs.run_records import RunRecords
    from megatron_real.session import train

_HOME = {
    "Config": "megatron_real.config:Config",
    "KlConfig": "megatron_real.objective:KlConfig",
    "RunRecords": "megatron_real.runs.run_records:RunRecords",
    "linear_logprobs": "megatron_real.policy.logprobs:linear_logprobs",
    "load_config": "megatron_real.config:load",
    "make_objective": "megatron_real.objective:make_objective",
    "objective_loss": "megatron_real.objective:objective_loss",
    "real_loss": "megatron_real.objective:real_loss",
    "real_weights": "megatron_real.objective:real_weights",
    "sequence_scores": "megatron_real.objective:sequence_scores",
    "token_weights": "megatron_real.objective:token_weights",
    "train": "megatron_real.session:train",
    "vocab_parallel_logprobs": "megatron_real.policy.logprobs:vocab_parallel_logprobs",
}
"""Public name -> the module that has it, and its name there."""

__all__ = [
    "Config",
    "KlConfig",
    "RunRecords",
    "linear_logprobs",
    "load_config",
    "make_objective",
    "objective_loss",
    "real_loss",
    "real_weights",
    "sequence_scores",
    "token_weights",
    "train",
    "vocab_parallel_logprobs",
]


def __getattr__(name: str) -> Any:
    # Python asks a module's __getattr__ for names that it lacks (PEP 562).
    if name not in _HOME:
        raise AttributeError(f"module 'megatron_real' has no attribute {name!r}")
    module, _, own_name = _HOME[name].partition(":")
    return getattr(importlib.import_module(module), own_name)


def __dir__() -> list[str]:
    # Without this dir() has only the names that were used already.
    return [*__all__, "__version__"]
