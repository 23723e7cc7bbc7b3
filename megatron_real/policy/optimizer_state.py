"""The optimizer's state as pieces of whole tensors, so that any layout reads what any other wrote.

Of each parameter there are three tensors of its global shape: the main parameter in fp32 and Adam's
two moments. They have the names of megatron-core's format `fully_reshardable`, but not its way of
making them. That gathers the whole state of a data-parallel group on every rank (12 bytes a
parameter) at each save and once more at each load; and with torch's Adam in place of
TransformerEngine's, loading fails on Adam's step (megatron-core 0.16.1), or leaves all parameters
with one step tensor between them, which Adam then counts up once for each. Here every rank names
what it owns: the distributed optimizer owns a run of a parameter's elements, which is at most a
handful of boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_real.parallel.cpu import device
from megatron_real.pinned import host_copies

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Owned:
    """The run of one parameter's elements whose state this rank has."""

    parameter: Tensor
    """The model's parameter."""
    first: int
    """Its first element owned."""
    state: dict[str, Tensor]
    """Name -> [elements owned] main parameter and moments."""
    alone: bool
    """Whether no other data-parallel rank has them too."""


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model: Sequence[Any]
) -> dict[str, ShardedTensor]:
    """Returns this rank's state as sharded tensors that are views of it: reading into them sets it.

    Args:
        optimizer: its state is begun where it has none yet.
        model: the leaves of the model's sharded state dict, which say where in the whole each
            parameter lies.
    """
    begin(optimizer)
    place = {
        leaf.data: leaf for leaf in model if isinstance(leaf, (ShardedTensor, ShardedTensorFactory))
    }

    # Keys need only be unique within a rank: what a piece is stands in the sharded tensor itself.
    pieces = {}
    for number, owned in enumerate(_owned(optimizer)):
        parameter = owned.parameter
        first = owned.first
        last = first + len(owned.state["param"])
        for part, whole in enumerate(_parts(place[parameter])):
            # A fused parameter has several parts, one after the other in its elements.
            start = whole.data.storage_offset() - parameter.storage_offset()
            low = max(first, start)
            high = min(last, start + whole.data.numel())

            shape = tuple(whole.data.shape)
            for offset, box_shape in boxes(shape, low - start, high - start):
                # The box's first element, counted in the part's row-major order.
                position = 0
                for index, size in zip(offset, shape, strict=True):
                    position = position * size + index

                begins = start + position - first
                for name, tensor in owned.state.items():
                    pieces[f"{number}.{part}.{offset}.{name}"] = _piece(
                        whole,
                        name,
                        tensor[begins : begins + prod(box_shape)],
                        offset,
                        box_shape,
                        owned.alone,
                    )
    return pieces


def boxes(
    shape: tuple[int, ...], low: int, high: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yields (offset, shape) of the boxes that elements [low, high) of a tensor make.

    Elements are counted in row-major order.

    Example: elements 2..8 of shape (3, 4) -> (0, 2) of (1, 2), then (1, 0) of (1, 4), then (2, 0)
    of (1, 1)
    """
    if low >= high:
        return

    # A range is at most: the end of a first row, whole rows, the beginning of a last row. Both ends
    # are ranges of one axis less.
    row = prod(shape[1:])
    if low % row == 0 and high % row == 0:
        offset = (low // row, *(0 for _ in shape[1:]))
        yield offset, ((high - low) // row, *shape[1:])
        return

    # The rows [first_whole, end_whole) are there as a whole.
    first_whole = -(-low // row)
    end_whole = high // row
    if first_whole > end_whole:
        # All of it is within one row.
        yield from _within_row(shape, end_whole, low - end_whole * row, high - end_whole * row)
        return

    end_of_first = row if low % row else 0
    before = first_whole - 1
    yield from _within_row(shape, before, low - before * row, end_of_first)
    yield from boxes(shape, first_whole * row, end_whole * row)
    yield from _within_row(shape, end_whole, 0, high - end_whole * row)


def _within_row(
    shape: tuple[int, ...], index: int, low: int, high: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offset, size in boxes(shape[1:], low, high):
        yield (index, *offset), (1, *size)


def begin(optimizer: MegatronOptimizer) -> None:
    """Gives the optimizer the state that it makes at its first update, where it has none yet."""
    for part in _parts_of(optimizer):
        inner = part.optimizer
        missing = [p for group in inner.param_groups for p in group["params"] if not inner.state[p]]
        if missing and isinstance(inner, torch.optim.Adam):
            # AdamW too, which is a subclass; megatron-core's function leaves out its step.
            for parameter in missing:
                moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
                inner.state[parameter] = {"step": torch.tensor(0.0), **moments}
        elif missing:
            part.init_state_fn(inner, part.config)


def adam_step(optimizer: MegatronOptimizer) -> int:
    """Returns the updates that Adam has counted: those that were made, not those skipped."""
    inner = _parts_of(optimizer)[0].optimizer
    # torch's Adam counts for each parameter, TransformerEngine's and apex's for each group.
    counts = [int(state["step"]) for state in inner.state.values() if "step" in state]
    counts += [int(group["step"]) for group in inner.param_groups if "step" in group]
    return max(counts, default=0)


def set_adam_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Sets the count, on which the bias correction depends, of every parameter."""
    for part in _parts_of(optimizer):
        inner = part.optimizer
        if isinstance(inner, torch.optim.Adam):
            for state in inner.state.values():
                state["step"] = torch.tensor(float(step))
        else:
            # TransformerEngine's and apex's Adam count in the groups.
            for group in inner.param_groups:
                group["step"] = step


class Offload:
    """Brings an optimizer's state to the host and back.

    There is one pinned buffer, allocated once, and one wait each way. megatron-core's own
    offload_to_cpu allocates pageable memory for each tensor of each step, and its way back takes
    along what belongs on the host: with torch's Adam the step counts, which it then reads back one
    by one.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._optimizer = optimizer
        self._copies: list[Tensor] = []
        self._away: list[Tensor] = []

    def to_host(self) -> None:
        """Frees the state's memory on the device; checkpoints read it on the host meanwhile."""
        begin(self._optimizer)
        self._away = []
        for part in _parts_of(self._optimizer):
            # Main parameters only where they are apart from the model's own: one that is fp32 is
            # its own main parameter, or a view of it is.
            for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
                for group in getattr(part, name, []):
                    # None where a precision-aware optimizer keeps them itself.
                    self._away.extend(main for main in group if main is not None)

            for state in part.optimizer.state.values():
                self._away.extend(state[name] for name in MOMENTS)

        # Pinned once: the state keeps its sizes, and every step can use the same copies.
        if not self._copies:
            self._copies = host_copies(self._away)
        for tensor, copy in zip(self._away, self._copies, strict=True):
            copy.copy_(tensor.detach(), non_blocking=True)
        torch.cuda.synchronize()

        # Only now that the copies have arrived may the device's memory go.
        for tensor, copy in zip(self._away, self._copies, strict=True):
            tensor.data = copy
        torch.cuda.empty_cache()

    def to_device(self) -> None:
        """Brings the state back, with whatever a checkpoint has put into it meanwhile."""
        for tensor, copy in zip(self._away, self._copies, strict=True):
            tensor.data = copy.to(device(), non_blocking=True, copy=True)
        self._away = []


def _parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """Returns the optimizers of a chain, or the only one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _owned(optimizer: MegatronOptimizer) -> Iterator[Owned]:
    """Yields what this rank has of each parameter, in the same order in every life of a run."""
    for part in _parts_of(optimizer):
        if isinstance(part, DistributedOptimizer):
            # gbuf_ranges has for each gradient buffer {dtypes: [bucket]}.
            buckets = [
                bucket
                for buckets_by_dtype in part.gbuf_ranges
                for of_dtype in buckets_by_dtype.values()
                for bucket in of_dtype
            ]

            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    group, order = part.model_param_group_index_map[parameter]
                    main = part.optimizer.param_groups[group]["params"][order]
                    # The run within the parameter; the other ranges are places in the buffer.
                    first = ranges["param"].start
                    yield Owned(parameter, first, _state(part, main), alone=True)
        else:
            for parameter, main in _whole(part):
                yield Owned(parameter, 0, _state(part, main), alone=False)


def _whole(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (parameter, main parameter) of an optimizer that is not distributed."""
    # Megatron's mixed-precision optimizer keeps lists of its own, the fp32 one has torch's groups
    # only.
    groups_without_copies = [group["params"] for group in part.optimizer.param_groups]
    if hasattr(part, "float16_groups"):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(models, mains, strict=True)
        groups_without_copies = part.fp32_from_fp32_groups

    # An fp32 parameter is its own main parameter.
    for group in groups_without_copies:
        for parameter in group:
            yield parameter, parameter


def _state(part: Any, main: Tensor) -> dict[str, Tensor]:
    # Views: what is read into them is in the optimizer at once.
    moments = part.optimizer.state[main]
    state = {"param": main.detach().view(-1)}
    for name in MOMENTS:
        state[name] = moments[name].detach().view(-1)
    return state


def _parts(leaf: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """Returns the parts of a parameter that have places of their own in the whole, as views."""
    if isinstance(leaf, ShardedTensor):
        return [leaf]
    built = leaf.build()
    if isinstance(built, ShardedTensor):
        return [built]
    if isinstance(built, dict):
        return list(built.values())
    return list(built)


def _piece(
    whole: ShardedTensor,
    name: str,
    view: Tensor,
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    alone: bool,
) -> ShardedTensor:
    """Returns one box as a sharded tensor of the state `name`.

    Args:
        whole: the part of the model's parameter that the box lies in.
        name: of the state.
        view: [elements of the box], a view of the state.
        offset: of the box in the part.
        shape: of the box.
        alone: no other data-parallel rank has it.
    """
    # Leading axes (the layer) become ordinary ones of length 1.
    ahead = whole.prepend_axis_num
    within = [a + b for a, b in zip(whole.global_offset[ahead:], offset, strict=True)]
    local_shape = (*(1 for _ in range(ahead)), *shape)

    replica = whole.replica_id
    if alone and not isinstance(replica, int):
        # Its last part counts the ranks that the distributed optimizer is over.
        replica = (*replica[:-1], 0)

    return replace(
        whole,
        key=f"optimizer.state.{name}.{whole.key}",
        data=view.view(local_shape),
        dtype=view.dtype,
        local_shape=local_shape,
        global_offset=(*whole.global_offset[:ahead], *within),
        axis_fragmentations=None,
        replica_id=replica,
        prepend_axis_num=0,
    )
