"""How much disk a run takes, before it starts. Loadable without torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_real.config import Config
from megatron_real.weights.architecture import Architecture

ROLLOUT_BYTES = 8
"""Bytes that a token of a saved rollout takes at most: its id, its log-prob and its text; 6.4 on a
mixture of words."""

_MODEL_BYTES = {"bf16": 2, "fp32": 4, "fp64": 8}
_OPTIMIZER_BYTES = 12
"""Bytes of a parameter in the optimizer: its own weights and two moments, in fp32 each."""


@dataclass(frozen=True)
class DiskNeeds:
    """What the files of a run take at most at once, in bytes."""

    checkpoint: int
    """One checkpoint: weights and optimizer."""
    num_checkpoints: int
    """Checkpoints that are kept at the end of the run, and the one that is being written."""
    rollouts: int
    """All rollouts that are kept."""
    export: int
    """The trained weights as an HF directory."""

    @property
    def checkpoints(self) -> int:
        """All checkpoints together."""
        return self.checkpoint * self.num_checkpoints

    @property
    def total(self) -> int:
        """Everything that grows with the model or with the run."""
        return self.checkpoints + self.rollouts + self.export


def disk_needs(
    config: Config, architecture: Architecture, *, mean_response: float | None = None
) -> DiskNeeds:
    """Counts the bytes of a run's files.

    Args:
        config: of the run.
        architecture: the model's sizes.
        mean_response: tokens; half of the longest response where it is not known.
    """
    weights = architecture.num_parameters * _MODEL_BYTES[config.model.dtype]
    # Half of the limit, as nobody knows before the first step.
    tokens = mean_response or config.rollout.max_response_tokens / 2
    groups = config.rollout.num_prompts
    if config.rollout.keep_groups:
        groups = min(groups, config.rollout.keep_groups)
    rollouts_of_a_step = groups * config.rollout.group_size

    # The newest steps are kept, and of the older ones every so many-th.
    steps = config.trainer.steps
    if config.rollout.keep_steps:
        older = max(0, steps - config.rollout.keep_steps)
        steps -= older
        if config.rollout.keep_every:
            steps += older // config.rollout.keep_every

    return DiskNeeds(
        checkpoint=weights + architecture.num_parameters * _OPTIMIZER_BYTES,
        num_checkpoints=_num_checkpoints(config),
        rollouts=round(steps * rollouts_of_a_step * tokens * ROLLOUT_BYTES),
        export=weights if config.trainer.export else 0,
    )


def _num_checkpoints(config: Config) -> int:
    """Returns as many as retire() in saved.py keeps after the last step, and one being written.

    The best one is taken to be none of the others.
    """
    keep = config.checkpoint
    last = config.trainer.steps
    if not keep.every:
        # One is saved when the run is stopped.
        return 1

    saved_at = {*range(keep.every, last + 1, keep.every), last}
    kept = set(sorted(saved_at)[-keep.keep :])
    if keep.keep_every:
        kept |= {step for step in saved_at if step % keep.keep_every == 0}
    best = keep.keep_best and bool(config.data.heldout) and len(saved_at) > len(kept)
    # The one that is being written is beside all that are kept: they are deleted after it is whole.
    return len(kept) + int(best) + 1
