"""A checkpoint's tensors are read by one replica each, which gives them to the others.

Data-parallel replicas hold the same weights. If each of them reads them, a file system serves the
model as often as there are replicas: 140 GB of a 70B model, 512 times at 4,096 ranks of TP 8.

megatron-core's FullyParallelLoadStrategyWrapper has the same purpose and needs GPUs (0.16.1 and
0.19.2: it calls torch.cuda.synchronize). Its parts are used: the one that deals out shards evenly,
and those that take a state dict apart and put it together again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from torch import Tensor

from megatron_real.parallel.cpu import device


class OneReplicaReads(FullyParallelLoadStrategyWrapper):
    """Strategy for dist_checkpointing.load, over the ranks that hold the same parameters."""

    def __init__(self, replicas: dist.ProcessGroup) -> None:
        """
        Args:
            replicas: all ranks read together, whichever group each is in.
        """
        super().__init__(TorchDistLoadShardedStrategy(), replicas)
        self._replicas = replicas

    def load(
        self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path, *options: Any
    ) -> dict[str, Any]:
        """Reads this rank's share of the tensors, in place, and gets the others. Collective.

        `options` are what later versions of megatron-core pass on: 0.19.2 names its way to write.
        """
        if self._replicas.size() == 1:
            return self.base_strategy.load(sharded_state_dict, checkpoint_dir, *options)

        # It also marks, in the state dict itself, which shards this rank reads.
        shares = self.apply_loading_parallelization(sharded_state_dict)
        assert shares is not None, "several replicas have shares"
        tensors, others, own, awaited = self._defer_loading_sharded_tensors(sharded_state_dict)

        # Other objects are TransformerEngine's, which are empty: every rank reads them.
        state: dict[str, Any] = self.base_strategy.load(others, checkpoint_dir, *options)
        loaded: dict[Any, Tensor] = self.base_strategy.load(own, checkpoint_dir, *options)

        # Every rank goes through the same shards in the same order.
        for shard, reader in shares.main_rank_for_shard.items():
            if len(shares.all_ranks_for_shard[shard]) > 1:
                loaded[shard] = self._shared(
                    loaded.get(shard), awaited.get(shard), shares.shard_to_metadata[shard], reader
                )
        self.fill_in_deferred_sharded_tensors(tensors, loaded)
        merge(state, tensors)
        return state

    def _shared(
        self,
        loaded: Tensor | None,
        awaited: ShardedTensor | None,
        like: ShardedTensor,
        reader: int,
    ) -> Tensor:
        """Broadcasts a tensor over the replicas.

        Args:
            loaded: on the reader, what it has read.
            awaited: on another rank, the shard whose tensor is overwritten; None on a rank that
                does not hold it.
            like: says its shape and dtype.
            reader: rank within the replicas.

        Returns:
            The tensor that holds the values now.
        """
        # The reader's own tensor, or the place where this rank wants it, or a buffer that is thrown
        # away: all take part in the broadcast.
        target = loaded
        if target is None and awaited is not None:
            target = awaited.data
        if target is None:
            target = torch.empty(like.local_shape, dtype=like.dtype)

        # The optimizer's state may lie on the host while the process group is of GPUs.
        buffer = target.detach().to(device()).contiguous()
        source = dist.get_global_rank(self._replicas, reader)
        dist.broadcast(buffer, src=source, group=self._replicas)

        if loaded is None and buffer.data_ptr() != target.data_ptr():
            target.detach().copy_(buffer)
        return target
