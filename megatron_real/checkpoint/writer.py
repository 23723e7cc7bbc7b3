"""A sharded state dict, copied aside and written by a thread while training goes on.

The loop stands still for the copy only. The thread has a gloo group of its own, plans and writes by
torch.distributed.checkpoint with megatron-core's planner, and so makes the very files that
megatron-core's dist_checkpointing.save makes. megatron-core's own asynchronous writer (0.16.1 to
0.19.2) is not used: it starts a multiprocessing manager at the first save, forks a process for each
file of each save, copies a CPU tensor only if it is a view (so it would write weights that an
optimizer step is just changing), and hands back to the main thread for collectives at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.exchange_utils import (
    ShardDistribution,
    determine_main_replica_uniform_distribution,
)
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_real.parallel.cpu import device
from megatron_real.pinned import host_copies


class Staging:
    """Memory that a state is copied to, kept from one save to the next."""

    def __init__(self, replicas: dist.ProcessGroup) -> None:
        """
        Args:
            replicas: the ranks that hold the same parameters; they share the writing of them.
        """
        self._replicas = replicas
        self._shares: ShardDistribution | None = None
        self._copies: list[Tensor] = []

    def copy(self, state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Copies a sharded state dict to the host. Collective.

        Returns:
            This rank's share of the sharded state, copied, for `write`; and the rest of it, the
            same on every rank, for `write_common`.
        """
        # Whether all shards together make whole tensors is checked once: it takes a collective.
        sharded, common = save_preprocess(state, validate_access_integrity=self._shares is None)
        if self._replicas.size() > 1:
            # Who writes what is the same for every save.
            if self._shares is None:
                self._shares = determine_main_replica_uniform_distribution(sharded, self._replicas)
            distribute_main_replicas_with_precomputed_distribution(
                sharded, self._replicas, self._shares
            )

        tensors = [leaf for leaf in _leaves(sharded) if isinstance(leaf, ShardedTensor)]
        own = [leaf for leaf in tensors if is_main_replica(leaf.replica_id)]
        # The same tensors come in the same order at every save.
        if not self._copies:
            self._copies = host_copies([leaf.data for leaf in own])
        for leaf, copy in zip(own, self._copies, strict=True):
            leaf.data = copy.copy_(leaf.data.detach(), non_blocking=True)

        # What another rank writes must not be held while the model's own tensors change.
        for leaf in tensors:
            if not is_main_replica(leaf.replica_id):
                leaf.data = None
        if torch.cuda.is_available():
            torch.cuda.synchronize()

        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded, keep_only_main_replica=True
        )
        return by_key, common


def writing_thread() -> ThreadPoolExecutor:
    """Returns a thread for `write`, on this rank's GPU."""
    # CUDA's current device is a thread's own, and the first GPU in a new one.
    return ThreadPoolExecutor(
        1,
        thread_name_prefix="checkpoint",
        initializer=torch.cuda.set_device,
        initargs=(device(),),
    )


def write(folder: Path, by_key: Mapping[str, Any], group: dist.ProcessGroup | None) -> None:
    """Writes what `Staging.copy` gave, and fsyncs it.

    Collective over `group`, and safe in a thread.
    """
    save(
        mcore_to_pyt_state_dict(dict(by_key)),
        # Without copying ahead: that loader waits for the thread's CUDA stream after each 10 MB,
        # and so makes a context on GPU 0 for a thread of any rank, though all that it writes lies
        # on the host.
        storage_writer=FileSystemWriter(folder, sync_files=True, per_thread_copy_ahead=0),
        # Replicas were dealt out by `Staging.copy` already: nothing is there twice.
        planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        process_group=group,
        no_dist=group is None,
    )


def write_common(folder: Path, common: Mapping[str, Any]) -> None:
    """Writes what dist_checkpointing.load reads beside the shards. The first rank calls it."""
    torch.save(dict(common), folder / "common.pt")
    backend = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    versions = {f"{name}_version": 1 for name in backend}
    (folder / "metadata.json").write_text(json.dumps(backend | versions))


def _leaves(state: Any) -> Iterator[ShardedTensor | ShardedObject]:
    if isinstance(state, Mapping):
        for value in state.values():
            yield from _leaves(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _leaves(value)
    else:
        yield state
