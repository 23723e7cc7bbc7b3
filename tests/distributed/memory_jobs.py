"""What the memory tests measure on every rank of real models:
each allocation and release of torch's allocator.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from megatron_real.batching import minibatches
from megatron_real.config import Config
from megatron_real.objective import make_objective
from tests.distributed import jobs
from tests.distributed.reference import Sample


def measured(config: Config, samples: list[Sample]) -> dict[str, int]:
    """Measures one rank: its parameters, the bytes that it holds between passes,
    and what each pass adds at its peak.

    A first update comes before: it makes the optimizer's states and megatron-core's communication
    buffers.
    """
    before = living_bytes()
    policy = jobs.new_policy(config, config.model.path)
    (cut,) = minibatches(
        jobs.rollouts_of(samples),
        make_objective("real", one_class_groups="keep"),
        groups_per_minibatch=1000,
    )
    batch = policy.packer.pack(cut, off_policy=False)
    policy.update(batch)
    held = living_bytes() - before

    buffers = [buffer for chunk in policy.ddp for buffer in chunk.buffers]
    # The update comes before the old log-probs: without them it is forward and backward alone.
    update = peak_bytes(lambda: policy.update(batch))
    old_logprobs = peak_bytes(lambda: policy.step.old_logprobs(batch))
    return {
        "parameters": sum(p.numel() for chunk in policy.chunks for p in chunk.parameters()),
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "held": held,
        "update": update,
        "old_logprobs": old_logprobs,
    }


def living_bytes() -> int:
    """Returns the bytes of all tensors of this process; a shared storage counts once."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most that `run` holds of its own at any time: every allocation and release of torch's
    allocator counts.

    The profiler misses what gloo's threads release, so the lower of two runs is taken.
    """
    return min(_peak(run) for _ in range(2))


def _peak(run: Callable[[], Any]) -> int:
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()

    # Only what is allocated here counts: memory from before may be released here too.
    ours: dict[int, int] = {}
    live = peak = 0
    for address, size in _allocations(recorded):
        # An address that is given out again was released, even where the profiler missed it.
        live -= ours.pop(address, 0)
        if size > 0:
            ours[address] = size
            live += size
            peak = max(peak, live)
    return peak


def _allocations(recorded: Any) -> list[tuple[int, int]]:
    """Returns (address, bytes) in order of time; the bytes of a release are negative."""

    def walk(events: Iterable[Any]) -> Iterator[Any]:
        for event in events:
            if event.tag == _EventType.Allocation:
                yield event
            yield from walk(event.children)

    tree = recorded.profiler.kineto_results.experimental_event_tree()
    events = sorted(walk(tree), key=lambda e: e.start_time_ns)
    return [(e.extra_fields.ptr, e.extra_fields.alloc_size) for e in events]
