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
    """Of one rank: its parameters, the bytes that it holds between passes,
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
    return {
        "parameters": sum(p.numel() for chunk in policy.chunks for p in chunk.parameters()),
        "gradients": sum(b.grad_data.nbytes for b in buffers),
        "held": held,
        "update": peak_bytes(
            lambda: policy.update(batch)
        ),  # no old log-probs yet: forward and backward alone
        "old_logprobs": peak_bytes(lambda: policy.step.old_logprobs(batch)),
    }


def living_bytes() -> int:
    """Bytes of all tensors of this process."""
    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}.values())


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
    ours: dict[int, int] = {}  # what was there before is released in here, too
    live = peak = 0
    for address, size in _allocations(recorded):
        live -= ours.pop(
            address, 0
        )  # also where the release was missed: the address is given out again
        if size > 0:
            ours[address] = size
            live += size
            peak = max(peak, live)
    return peak


def _allocations(recorded: Any) -> list[tuple[int, int]]:
    """(address, bytes) in order of time; the bytes of a release are negative."""

    def walk(events: Iterable[Any]) -> Iterator[Any]:
        for event in events:
            if event.tag == _EventType.Allocation:
                yield event
            yield from walk(event.children)

    tree = recorded.profiler.kineto_results.experimental_event_tree()
    events = sorted(walk(tree), key=lambda e: e.start_time_ns)
    return [(e.extra_fields.ptr, e.extra_fields.alloc_size) for e in events]
