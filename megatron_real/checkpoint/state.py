"""The policy's state as megatron-core's dist_checkpointing sees it, and that of an unfinished step.

Sharded tensors carry megatron-core's own names and global shapes, so a checkpoint does not depend
on the layout, and Megatron-LM's tools read the model of it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

from megatron_real.checkpoint.replicas import OneReplicaReads
from megatron_real.policy.optimizer_state import adam_step, set_adam_step, sharded_optimizer_state
from megatron_real.policy.policy import Policy, Update
from megatron_real.policy.train_step import Batch, Gradient, TokenStats, gathered_tokens
from megatron_real.records import Rollout


def sharded_state(policy: Policy) -> dict[str, Any]:
    """Returns model and optimizer as a sharded state dict. Collective."""
    policy.gather_parameters()
    state: dict[str, Any] = {}
    leaves = []
    for name, chunk in zip(_names_of_chunks(policy), policy.chunks, strict=True):
        state[name] = chunk.sharded_state_dict()
        leaves.extend(state[name].values())

    state["optimizer"] = sharded_optimizer_state(policy.optimizer, leaves)
    return state


def load_sharded_state(policy: Policy, folder: Path) -> None:
    """Reads what was saved of `sharded_state`, whatever its layout. Collective.

    It may have been saved with local layers or with TransformerEngine's. The latter's modules have
    an `_extra_state` each, which is empty without FP8. Local layers have none: where the checkpoint
    lacks one, the module keeps its own.

    Args:
        policy: the parameters and the optimizer's state are overwritten.
        folder: of the checkpoint's sharded tensors.

    Raises:
        CheckpointingException: a tensor is missing or has another shape.
    """
    state = sharded_state(policy)
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata

    # What only this run's layers have is kept aside, and put back once the rest is read.
    missing: dict[str, dict[str, Any]] = {}
    for part in _names_of_chunks(policy):
        # Deleted from what is loaded, or megatron-core would refuse the checkpoint as incomplete.
        missing[part] = {
            name: leaf.data
            for name, leaf in state[part].items()
            if isinstance(leaf, ShardedObject) and leaf.unique_key not in saved
        }
        for name in missing[part]:
            del state[part][name]

    # The optimizer's tensors are views of its state, so that they are read in place.
    strategy = OneReplicaReads(policy.groups.dp_cp)
    loaded = dist_checkpointing.load(state, str(folder), strategy)
    for part, chunk in zip(_names_of_chunks(policy), policy.chunks, strict=True):
        chunk.load_state_dict({**loaded[part], **missing[part]})


def _names_of_chunks(policy: Policy) -> list[str]:
    """Returns the keys of the model's chunks in a state dict, which are Megatron-LM's."""
    if len(policy.chunks) == 1:
        return ["model"]
    return [f"model{i}" for i in range(len(policy.chunks))]


def schedule_state(policy: Policy) -> dict[str, int]:
    """Returns where the learning-rate schedule is, and how many updates in a row were skipped."""
    return {
        "num_updates": policy.scheduler.num_steps,
        "adam_step": adam_step(policy.optimizer),
        "skipped_in_a_row": policy.skipped_in_a_row,
    }


def load_schedule_state(policy: Policy, state: Mapping[str, int]) -> None:
    """Sets the schedule of this run's configuration to the saved update."""
    set_adam_step(policy.optimizer, state["adam_step"])
    # From 0, and not from where it is: step() counts up.
    policy.scheduler.num_steps = 0
    policy.scheduler.step(increment=state["num_updates"])
    policy.skipped_in_a_row = state["skipped_in_a_row"]


def rng_state() -> dict[str, Any]:
    """Returns every random generator of this rank, as what torch.load(weights_only=True) reads."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = cast(
        tuple[Any, ...], numpy.random.get_state(legacy=True)
    )

    # numpy's array of uint32 as torch's int64: torch.load refuses the one and has not the other.
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": dict(get_cuda_rng_tracker().get_states()),
    }


def load_rng_state(state: Mapping[str, Any]) -> None:
    """Sets every random generator of this rank."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))

    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))

    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    get_cuda_rng_tracker().set_states(state["megatron"])


@dataclass(frozen=True)
class Unfinished:
    """A step of which some updates are made and some are not."""

    updates: list[Update]
    """Those that are made."""
    old_logprobs: list[Tensor | None]
    """[batches] of each: [response tokens of the minibatch's rollouts, in order] log-probs under
    the weights that generated them; None for the batches that are done with."""
    stats: TokenStats
    """Token-level figures of the whole step: all log-probs that they compare are known."""

    def state_dict(self) -> dict[str, Any]:
        """Returns plain values and tensors, as torch.load(weights_only=True) reads them."""
        # The gradient's own tensors, not the copies that asdict makes.
        updates = [{**asdict(u), "gradient": dict(vars(u.gradient))} for u in self.updates]
        return {
            "updates": updates,
            "old_logprobs": self.old_logprobs,
            "stats": {"sums": self.stats.sums, "largest": self.stats.largest},
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Unfinished:
        """Returns what `state_dict` was made of."""
        updates = [Update(**{**u, "gradient": Gradient(**u["gradient"])}) for u in state["updates"]]
        return cls(updates, list(state["old_logprobs"]), TokenStats(**state["stats"]))


def unfinished(policy: Policy, batches: Sequence[Batch], updates: Sequence[Update]) -> Unfinished:
    """Returns what the rest of a step needs, the same on every rank. Collective.

    Args:
        policy: the model.
        batches: all of the step's.
        updates: those made so far, at least one and not all of them.
    """
    done = len(updates)
    assert 0 < done < len(batches), "a step without updates is begun anew from its rollouts"

    # Of batches that still come. Their weights are gone, so the log-probs cannot be computed again.
    old_logprobs: list[Tensor | None] = [None] * done
    for batch in batches[done:]:
        # [micro-batches]; the other stages have none.
        values = []
        if policy.groups.is_last_stage:
            values = [results.old_logprob_T for results in batch.results]
        old_logprobs.append(gathered_tokens(policy.groups, batch, values))
    return Unfinished(list(updates), old_logprobs, policy.token_stats(batches))


def prepare_step(
    policy: Policy, rollouts: Sequence[Rollout], begun: Unfinished | None, *, lagging: bool = False
) -> tuple[list[Batch], list[Update]]:
    """Returns a step's batches, ready for their updates, and the updates that were made already.

    Args:
        policy: the model.
        rollouts: all of the step's.
        begun: what an earlier life of the run has left of the step; None where it is new.
        lagging: the rollouts were generated by older weights (Policy.prepare).
    """
    if begun is None:
        return policy.prepare(rollouts, lagging=lagging), []

    # The batches are packed anew, in whatever layout, and given the old log-probs that were kept.
    groups = policy.groups
    batches = policy.cut(rollouts)
    for batch, old_N in zip(batches, begun.old_logprobs, strict=True):
        if old_N is None:
            continue
        batch.has_old_logprobs = True
        if not groups.is_last_stage:
            continue

        for micro, results in zip(batch.micro_batches, batch.results, strict=True):
            old_logprob_N = old_N.to(micro.engine_logprob_T)
            # Index -1 marks a position without a target: any token may be read there.
            old_logprob_T = old_logprob_N[micro.index_T.clamp(min=0)]
            # 0 without a target, as a pass would have left it.
            results.old_logprob_T = torch.where(micro.index_T >= 0, old_logprob_T, 0)

    # The figures are sums over ranks: one rank takes all of them as its share.
    if groups.writes_logprobs and groups.dp.rank() == 0:
        tokens = batches[0].tokens
        tokens.sums.copy_(begun.stats.sums)
        tokens.largest.fill_(begun.stats.largest)
    return batches, list(begun.updates)
