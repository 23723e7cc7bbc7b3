"""The optimizer's state as pieces of whole tensors, so that any layout reads what any other has written.

Of each parameter there are three tensors of its global shape: the main parameter in fp32 and Adam's two moments. They
have the names of megatron-core's format `fully_reshardable`, but not its way of making them. That gathers the whole
state of a data-parallel group on every rank (12 bytes a parameter) at each save and once more at each load; and with
torch's Adam in place of TransformerEngine's, loading fails on Adam's step (megatron-core 0.16.1), or leaves all
parameters with one step tensor between them, which Adam then counts up once for each. Here every rank names what it
owns: the distributed optimizer owns a run of a parameter's elements, which is at most a handful of boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_real.cpu import device
from megatron_real.pinned import host_copies

MOMENTS = ("exp_avg", "exp_avg_sq")
Owned = tuple[Tensor, int, dict[str, Tensor], bool]
"""(parameter of the model, first element owned, {name: [elements owned] state}, this rank alone owns them)."""


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model: Sequence[Any]
) -> dict[str, ShardedTensor]:
    """This rank's state as sharded tensors that are views of it: reading into them sets it.

    Args:
        model: the leaves of the model's sharded state dict, which say where in the whole each parameter lies.
    """
    begin(optimizer)
    place = {
        leaf.data: leaf for leaf in model if isinstance(leaf, (ShardedTensor, ShardedTensorFactory))
    }
    pieces = {}
    for number, (parameter, first, state, alone) in enumerate(_owned(optimizer)):
        for part, whole in enumerate(_parts(place[parameter])):
            start = (
                whole.data.storage_offset() - parameter.storage_offset()
            )  # a fused parameter has several parts
            low, high = (
                max(first, start),
                min(first + len(state["param"]), start + whole.data.numel()),
            )
            for offset, shape in boxes(tuple(whole.data.shape), low - start, high - start):
                for name, tensor in state.items():
                    begins = start + _flat(offset, tuple(whole.data.shape)) - first
                    view = tensor[begins : begins + prod(shape)]
                    pieces[f"{number}.{part}.{offset}.{name}"] = _piece(
                        whole, name, view, offset, shape, alone
                    )
    return pieces


def boxes(
    shape: tuple[int, ...], low: int, high: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offset, shape) of the boxes that elements [low, high) of a tensor make, elements in row-major order.

    Example: elements 2..8 of shape (3, 4) -> (0, 2) of (1, 2), then (1, 0) of (1, 4), then (2, 0) of (1, 1)
    """
    if low >= high:
        return
    row = prod(shape[1:])
    if low % row == 0 and high % row == 0:
        yield (low // row, *(0 for _ in shape[1:])), (high // row - low // row, *shape[1:])
        return
    begin, end = -(-low // row), high // row  # the whole rows
    if begin > end:  # within one row
        yield from _within_row(shape, end, low - end * row, high - end * row)
        return
    yield from _within_row(shape, begin - 1, low - (begin - 1) * row, row if low % row else 0)
    yield from boxes(shape, begin * row, end * row)
    yield from _within_row(shape, end, 0, high - end * row)


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
        if missing and isinstance(
            inner, torch.optim.Adam
        ):  # AdamW too; megatron-core's function leaves out its step
            for parameter in missing:
                moments = {name: torch.zeros_like(parameter) for name in MOMENTS}
                inner.state[parameter] = {"step": torch.tensor(0.0), **moments}
        elif missing:
            part.init_state_fn(inner, part.config)


def adam_step(optimizer: MegatronOptimizer) -> int:
    """Updates that Adam has counted: those that were made, not those that were skipped."""
    inner = _parts_of(optimizer)[0].optimizer
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
        else:  # TransformerEngine's and apex's count in the groups
            for group in inner.param_groups:
                group["step"] = step


class Offload:
    """Brings an optimizer's state to the host and back: one pinned buffer, allocated once, one wait each way.

    megatron-core's own offload_to_cpu allocates pageable memory for each tensor of each step, and its way back takes
    along what belongs on the host: with torch's Adam the step counts, which it then reads back one by one.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._optimizer = optimizer
        self._copies: list[Tensor] = []
        self._away: list[Tensor] = []

    def to_host(self) -> None:
        """Frees the state's memory on the device; checkpoints read it on the host meanwhile."""
        begin(self._optimizer)
        self._away = list(self._on_device())
        if not self._copies:
            self._copies = host_copies(self._away)
        for tensor, copy in zip(self._away, self._copies, strict=True):
            copy.copy_(tensor.detach(), non_blocking=True)
        torch.cuda.synchronize()
        for tensor, copy in zip(self._away, self._copies, strict=True):
            tensor.data = copy
        torch.cuda.empty_cache()

    def to_device(self) -> None:
        """Undoes it. What was read into the state meanwhile, from a checkpoint, is brought along."""
        for tensor, copy in zip(self._away, self._copies, strict=True):
            tensor.data = copy.to(device(), non_blocking=True, copy=True)
        self._away = []

    def _on_device(self) -> Iterator[Tensor]:
        """Moments, and main parameters where they are apart from the model's."""
        for part in _parts_of(self._optimizer):
            yield from _main_copies(part)
            for state in part.optimizer.state.values():
                yield from (state[name] for name in MOMENTS)


def _parts_of(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers of a chain, or the only one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _owned(optimizer: MegatronOptimizer) -> Iterator[Owned]:
    for part in _parts_of(optimizer):
        if isinstance(part, DistributedOptimizer):
            for by_dtype in part.gbuf_ranges:
                for bucket in (bucket for buckets in by_dtype.values() for bucket in buckets):
                    for parameter, ranges in bucket["param_map"].items():
                        group, order = part.model_param_group_index_map[parameter]
                        main = part.optimizer.param_groups[group]["params"][order]
                        yield parameter, ranges["param"].start, _state(part, main), True
        else:
            for parameter, main in _whole(part):
                yield parameter, 0, _state(part, main), False


def _whole(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter, main parameter) of an optimizer that is not distributed."""
    if hasattr(part, "float16_groups"):
        for models, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(models, mains, strict=True)
        own = part.fp32_from_fp32_groups
    else:
        own = [group["params"] for group in part.optimizer.param_groups]
    yield from ((parameter, parameter) for group in own for parameter in group)


def _main_copies(part: Any) -> Iterator[Tensor]:
    """The fp32 copies of parameters that are not fp32; an fp32 parameter is its own main parameter, or a view of it is."""
    names = ("shard_fp32_from_float16_groups", "fp32_from_float16_groups")
    for groups in (getattr(part, name, []) for name in names):
        for main in (main for group in groups for main in group):
            if main is not None:  # a precision-aware optimizer keeps them itself
                yield main


def _state(part: Any, main: Tensor) -> dict[str, Tensor]:
    state = part.optimizer.state[main]
    return {
        name: t.detach().view(-1)
        for name, t in (("param", main), *((m, state[m]) for m in MOMENTS))
    }


def _parts(leaf: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """The parts of a parameter that have places of their own in the whole, as views of it."""
    built = leaf.build() if isinstance(leaf, ShardedTensorFactory) else leaf
    return (
        [built]
        if isinstance(built, ShardedTensor)
        else list(built.values() if isinstance(built, dict) else built)
    )


def _piece(
    whole: ShardedTensor,
    name: str,
    view: Tensor,
    offset: tuple[int, ...],
    shape: tuple[int, ...],
    alone: bool,
) -> ShardedTensor:
    """The box as a sharded tensor of the state `name`. Leading axes (the layer) become ordinary ones of length 1."""
    ahead = whole.prepend_axis_num
    start = (
        *whole.global_offset[:ahead],
        *(a + b for a, b in zip(whole.global_offset[ahead:], offset, strict=True)),
    )
    local = (*(1 for _ in range(ahead)), *shape)
    replica = whole.replica_id
    if alone and not isinstance(
        replica, int
    ):  # its last part counts the ranks that the distributed optimizer is over
        replica = (*replica[:-1], 0)
    return replace(
        whole,
        key=f"optimizer.state.{name}.{whole.key}",
        data=view.view(local),
        dtype=view.dtype,
        local_shape=local,
        global_offset=start,
        axis_fragmentations=None,
        replica_id=replica,
        prepend_axis_num=0,
    )


def _flat(offset: tuple[int, ...], shape: tuple[int, ...]) -> int:
    position = 0
    for index, size in zip(offset, shape, strict=True):
        position = position * size + index
    return position
