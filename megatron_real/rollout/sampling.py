"""How completions are drawn, for each of the purposes that the configuration knows."""

from __future__ import annotations

from megatron_real.config import Config, SyncConfig
from megatron_real.records import Sampling


def training_sampling(config: Config) -> Sampling:
    """Returns how the groups of a training step are drawn."""
    rollout = config.rollout
    return Sampling(
        num_samples=rollout.group_size,
        temperature=rollout.temperature,
        max_tokens=rollout.max_response_tokens,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
    )


def evaluation_sampling(config: Config) -> Sampling:
    """Returns how held-out problems and benchmarks are answered."""
    return Sampling(
        num_samples=config.evaluation.samples,
        temperature=config.evaluation.temperature,
        max_tokens=config.rollout.max_response_tokens,
        top_p=config.evaluation.top_p,
    )


def probe_sampling(sync: SyncConfig, *, temperature: float) -> Sampling:
    """Returns how the probe of a weight sync is answered.

    Args:
        sync: how weights are synced and checked.
        temperature: of training, so that engine and trainer compute the same log-probs.
    """
    return Sampling(num_samples=1, temperature=temperature, max_tokens=sync.probe_tokens)
