"""The rollout stage and its engines; the lifecycle's names are NeMo-Aligner's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from megatron_real.config import Config, check_engine
from megatron_real.rollout.engine import Engine
from megatron_real.rollout.stage import RolloutStage

__all__ = ["Engine", "RolloutStage", "build_engine"]


def build_engine(config: Config, *, say: Callable[[str], None]) -> Engine:
    """The engine that the config names, built on all ranks together; `say` tells the user which one and why.

    Raises:
        ValueError: it is not installed, or does not take the model.
    """
    from megatron_real.rollout import vllm_engine

    wanted, why = config.rollout.engine, ""
    if wanted == "vllm-server":
        if not config.rollout.servers and importlib.util.find_spec("vllm") is None:
            raise ValueError("rollout.engine=vllm-server starts vLLM, which is not installed; install vllm")
        from megatron_real.rollout.server_engine import VllmServerEngine

        return VllmServerEngine(config, say=say)
    missing = "" if wanted == "transformers" else vllm_engine.missing(config)
    if wanted == "vllm" and missing:
        raise ValueError(f"rollout.engine=vllm, but {missing}; install vllm, or set rollout.engine=transformers")
    if wanted == "auto":
        why = f" (rollout.engine=auto: {missing or 'vllm is installed'})"
    if wanted == "transformers" or missing:
        from megatron_real.rollout.transformers_engine import TransformersEngine

        if config.rollout.tp > 1:
            raise ValueError(f"rollout.tp = {config.rollout.tp} needs vLLM, but {missing}; set rollout.tp=1")
        say(f"rollouts by transformers{why}")
        return TransformersEngine(config.model, batch_size=config.rollout.batch_size)
    check_engine(config)  # with engine=auto the configuration could not know that it would be vLLM
    say(f"rollouts by vllm{why}")
    return vllm_engine.VllmEngine(config)
