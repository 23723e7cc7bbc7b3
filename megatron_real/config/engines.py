"""What each rollout engine can do.

Configuration, plan and the building of engines read this one table. An engine is a row here and a
module with two functions:

    missing(config) -> str          why it cannot serve this configuration on this machine; empty
                                    if it can
    build(config, say) -> Engine    the engine (rollout/engines/engine.py); collective over all
                                    ranks

Nothing else in the project compares an engine's name. docs/rollouts.md shows the table to users.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineTraits:
    """What an engine can do, for whoever decides something before it is built."""

    module: str
    """Module of `missing` and `build`."""
    package: str
    """What must be installed for it, by the name that pip knows."""
    own_processes: bool
    """It runs in processes of its own, on GPUs of its own, which ranks share; else in the processes
    that train."""
    may_lag: bool
    """It can generate while the policy trains (rollout.max_lag)."""
    tensor_parallel: bool
    """It can cut the model over several GPUs (rollout.tp)."""
    sized_kv_cache: bool
    """Its KV cache has the fixed size rollout.kv_cache_mib, which must hold at least one
    sequence."""
    dtypes: tuple[str, ...]
    """What model.dtype may be."""
    automatic: bool
    """`rollout.engine=auto` may take it; it takes the first that misses nothing."""


AUTO = "auto"
"""The value of rollout.engine that leaves the engine open."""

ENGINES: Mapping[str, EngineTraits] = {
    "vllm": EngineTraits(
        module="megatron_real.rollout.engines.vllm",
        package="vllm",
        own_processes=False,
        may_lag=False,
        tensor_parallel=True,
        sized_kv_cache=True,
        dtypes=("bf16", "fp32"),
        automatic=True,
    ),
    "vllm-server": EngineTraits(
        module="megatron_real.rollout.vllm_server.engine",
        package="vllm",
        own_processes=True,
        may_lag=True,
        tensor_parallel=True,
        sized_kv_cache=True,
        dtypes=("bf16", "fp32"),
        automatic=False,
    ),
    "transformers": EngineTraits(
        module="megatron_real.rollout.engines.transformers",
        package="transformers",
        own_processes=False,
        may_lag=False,
        tensor_parallel=False,
        sized_kv_cache=False,
        dtypes=("bf16", "fp32", "fp64"),
        automatic=True,
    ),
}
"""Value of rollout.engine -> what it can do; `auto` tries the automatic ones in this order."""


def candidates(name: str) -> dict[str, EngineTraits]:
    """Returns the engines that `rollout.engine=name` may stand for: one, or with `auto` several."""
    if name == AUTO:
        return {name: traits for name, traits in ENGINES.items() if traits.automatic}
    return {name: ENGINES[name]}


def has_own_processes(name: str) -> bool:
    """Returns whether every candidate of `name` runs in processes of its own."""
    return all(traits.own_processes for traits in candidates(name).values())


def names_with(trait: str) -> str:
    """Returns the engines that have the yes-or-no `trait`, as errors name them.

    Example: names_with("tensor_parallel") is "vllm or vllm-server".
    """
    return " or ".join(name for name, traits in ENGINES.items() if getattr(traits, trait))
