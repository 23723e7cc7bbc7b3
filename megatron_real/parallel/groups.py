"""Process groups of the parallel layout.

This is the one place that sets up torch.distributed and megatron-core's parallel state.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d

from megatron_real.config import ParallelConfig
from megatron_real.parallel import cpu


def join_world(timeout_minutes: float) -> None:
    """Joins the processes that torchrun or srun started; a process started alone is a world of one.

    The backend is NCCL on GPUs and gloo elsewhere. A second call does nothing.

    Args:
        timeout_minutes: a collective of the default group that waits longer fails.
    """
    on_cpu = cpu.enable()
    if dist.is_initialized():
        return

    # Those of an earlier run in this process: each group of gloo has threads, which poll.
    _LEFT.clear()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)

    options: dict[str, Any] = {"timeout": timedelta(minutes=timeout_minutes)}
    if not on_cpu:
        # Named, or NCCL guesses it from the rank: barriers would warn, and might use another rank's
        # GPU.
        options["device_id"] = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(options["device_id"])
    if "MASTER_PORT" not in os.environ:
        # Nobody else to meet: a store in this process needs no port that another run might hold.
        options |= {"store": HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo" if on_cpu else "nccl", **options)


def leave_world() -> None:
    """Leaves the world, all ranks together. Collective."""
    if dist.is_initialized():
        # A rank that exits while another still talks to it makes that one's gloo threads abort.
        # All collectives of the run are over, and none begins after this one.
        dist.barrier()
        _LEFT.extend(distributed_c10d._world.pg_map)
        dist.destroy_process_group()


_LEFT: list[dist.ProcessGroup] = []
"""The process groups that this process left last, kept until it joins a world again.

Where it joins none they stay until its modules are torn down.

A thread that ends with the interpreter must not drop the last reference to one: torch's destructor
lets go of Python's lock, Python ends the thread where it takes it again, and C++ aborts the process
for that, after a run that went well.
"""


@dataclass(frozen=True)
class ProcessGroups:
    """This rank's place in the layout: megatron-core's collection, and its groups by name."""

    megatron: object
    """megatron-core's ProcessGroupCollection."""
    tp: dist.ProcessGroup
    """Tensor-parallel ranks."""
    pp: dist.ProcessGroup
    """Pipeline stages."""
    cp: dist.ProcessGroup
    """Context-parallel ranks."""
    dp: dist.ProcessGroup
    """Data-parallel ranks with the same part of the model and of the context."""
    dp_cp: dist.ProcessGroup
    """Data- and context-parallel ranks: those that sum gradients."""

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank's pipeline stage ends with the log-probs."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def writes_logprobs(self) -> bool:
        """Whether this rank writes the log-probs of its data-parallel shard.

        One rank of each shard does: that of the last stage which is first in TP and CP.
        """
        return self.is_last_stage and self.tp.rank() == 0 and self.cp.rank() == 0


def set_up(
    parallel: ParallelConfig, *, seed: int = 1234, timeout_minutes: float = 75.0
) -> ProcessGroups:
    """Builds the process groups for a layout, and seeds megatron-core's RNG tracker.

    The groups of an earlier call are replaced.

    Args:
        parallel: the layout.
        seed: of the RNG tracker.
        timeout_minutes: a collective of these groups that waits longer fails.

    Raises:
        ValueError: the layout does not divide the world.
    """
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    # megatron-core's groups are globals of the process and refuse to be made twice.
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        # Not the default group's timeout: megatron-core has one of its own, of 30 minutes.
        distributed_timeout_minutes=timeout_minutes,
    )

    model_parallel_cuda_manual_seed(seed)
    return ProcessGroups(
        megatron=ProcessGroupCollection.use_mpu_process_groups(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
