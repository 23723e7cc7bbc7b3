"""The rollout stage and its engines; the lifecycle's names are NeMo-Aligner's."""

from __future__ import annotations

from megatron_real.config import Config
from megatron_real.rollout.engine import Engine
from megatron_real.rollout.stage import RolloutStage

__all__ = ["Engine", "RolloutStage", "build_engine"]


def build_engine(config: Config) -> Engine:
    """The engine that the config names; `auto` is the best one installed."""
    from megatron_real.rollout.transformers_engine import TransformersEngine

    return TransformersEngine(config.model.path, dtype=config.model.dtype, batch_size=config.rollout.batch_size)
