"""Replaces torch.distributed: every call is checked by NCCL's rules and counted; nothing is sent.

A group made for NCCL takes CUDA tensors of the dtypes that NCCL has, one made for gloo CPU tensors;
tensors are contiguous, and sizes fit. What a peer would have sent stays unknown: the meter answers
for it. Object collectives give every rank this rank's own object.
"""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_real.rehearsal.meter import call_site
from megatron_real.rehearsal.report import Collective, Group

NCCL_DTYPES = frozenset(
    {
        torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
        torch.float8_e4m3fn, torch.float8_e5m2,
    }
)  # fmt: skip
"""The dtypes that NCCL sends (torch/csrc/distributed/c10d/NCCLUtils.cpp, ncclDataType)."""


class BrokenRule(RuntimeError):
    """Raised for a call that NCCL or gloo would refuse, or that would hang.

    The message names the call, the tensor and the line.
    """


class _Work:
    """The handle of a call that has ended already."""

    def wait(self, timeout: Any = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


def _work(is_asynchronous: bool) -> _Work | None:
    """What a collective returns: torch gives a handle of asynchronous calls alone."""
    if is_asynchronous:
        return _Work()
    return None


class _Coalesced:
    """Stands for torch's manager of coalesced calls, which are counted one by one."""

    def __enter__(self) -> _Coalesced:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def append(self, _work: Any) -> None:
        pass

    def wait(self) -> None:
        pass


class World:
    """The process groups of one rank, and what was called on them since the last `take`."""

    def __init__(self) -> None:
        self._calls: Counter[tuple[str, str, int, str]] = Counter()
        self._bytes: Counter[tuple[str, str, int, str]] = Counter()
        self._known: dict[int, Group] = {}
        self._world = Group("world", "nccl", 1, None)
        self._rank = 0
        self._size = 1
        # An id is a group's for as long as the group lives.
        self._kept: list[Any] = []

    def place(self, rank: int, size: int) -> None:
        """Makes this process `rank` of `size`, as a launcher does; there are no others."""
        self._rank = rank
        self._size = size

    def _init(self, init: Callable[..., None]) -> Callable[..., None]:
        """Returns what replaces torch.distributed's init_process_group."""

        def init_process_group(
            backend: str, *, timeout: timedelta, device_id: torch.device | None = None, **_: Any
        ) -> None:
            if backend == "nccl" and device_id is None:
                self._refuse("init_process_group", "NCCL is not told which GPU this rank has")
            minutes = timeout.total_seconds() / 60
            self._world = Group("world", backend, self._size, minutes)
            # torch's own backend for such a purpose: it answers at once and sends nothing.
            init("fake", rank=self._rank, world_size=self._size, store=FakeStore())

        return init_process_group

    def groups(self) -> tuple[Group, ...]:
        """Returns the process groups that this rank is in."""
        return (self._world, *self._known.values())

    def take(self) -> tuple[Collective, ...]:
        """Returns what was called since the last `take`, and begins anew."""
        taken = tuple(
            Collective(*key[:3], key[3], calls, self._bytes[key])
            for key, calls in sorted(self._calls.items())
        )
        self._calls.clear()
        self._bytes.clear()
        return taken

    def install(self) -> None:
        """Replaces torch.distributed's functions.

        This must come before megatron is imported, which keeps some of them by name.
        """
        replacements: dict[str, Callable[..., Any]] = {
            "init_process_group": self._init(dist.init_process_group),
            "new_group": self._named_group(dist.new_group),
            "get_backend": lambda group=None: self._group(group).backend,
            "all_reduce": self._all_reduce,
            "broadcast": self._broadcast,
            "all_gather": self._all_gather,
            "all_gather_into_tensor": self._all_gather_into_tensor,
            "_all_gather_base": self._all_gather_into_tensor,
            "reduce_scatter_tensor": self._reduce_scatter_tensor,
            "_reduce_scatter_base": self._reduce_scatter_tensor,
            "isend": self._p2p("isend"),
            "irecv": self._p2p("irecv"),
            "send": self._p2p("send"),
            "recv": self._p2p("recv"),
            "P2POp": _P2POp,
            "batch_isend_irecv": lambda ops: [op.op(op.tensor, group=op.group) for op in ops],
            "all_gather_object": self._all_gather_object,
            "gather_object": self._gather_object,
            "broadcast_object_list": self._broadcast_object_list,
            "barrier": lambda *_, **__: None,
            "_coalescing_manager": lambda *_, **__: _Coalesced(),
        }
        for name, function in replacements.items():
            # In both: torch itself calls the one, libraries call the other.
            for module in (dist, c10d):
                if hasattr(module, name):
                    setattr(module, name, function)

    def _group(self, group: Any) -> Group:
        """Returns what is known of a group; a group that is not known counts as the world's."""
        return self._known.get(id(group), self._world)

    def _named_group(self, new_group: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what replaces torch.distributed's new_group, and notes what was asked for."""

        def named_group(
            ranks: Any = None,
            timeout: timedelta | None = None,
            backend: str | None = None,
            pg_options: Any = None,
            group_desc: str | None = None,
            **_: Any,
        ) -> Any:
            group = new_group(ranks, backend="fake")
            # A rank that is not in the group gets a number for it.
            if group is not None and not isinstance(group, int):
                minutes = None
                if timeout is not None:
                    minutes = timeout.total_seconds() / 60
                name = (group_desc or "unnamed").removesuffix("_GROUP").lower()
                self._known[id(group)] = Group(name, backend or "nccl", group.size(), minutes)
                self._kept.append(group)
            return group

        return named_group

    def _check(self, call: str, group: Any, *tensors: Tensor) -> Group:
        """Applies the rules to the tensors of one call, and counts the first one's bytes."""
        known = self._group(group)
        device = "cpu"
        if known.backend == "nccl":
            device = "cuda"
        for tensor in tensors:
            what = f"a {tensor.dtype} tensor {tuple(tensor.shape)} on {tensor.device}"
            if tensor.device.type != device:
                self._refuse(call, f"{what} on a group of {known.backend} ({known.name})")
            if known.backend == "nccl" and tensor.dtype not in NCCL_DTYPES:
                self._refuse(call, f"{what}: NCCL has no such dtype")
            if not tensor.is_contiguous():
                self._refuse(call, f"{what} is not contiguous: strides {tensor.stride()}")

        dtype = str(tensors[0].dtype).removeprefix("torch.")
        key = (call, known.name, known.ranks, dtype)
        self._calls[key] += 1
        # Of this rank's own tensor: what travels is a multiple of it, which the kind of call
        # decides.
        self._bytes[key] += tensors[0].numel() * tensors[0].element_size()
        return known

    @staticmethod
    def _refuse(call: str, reason: str) -> None:
        raise BrokenRule(f"{call}: {reason}, at {call_site(3)}")

    def _all_reduce(
        self, tensor: Tensor, op: Any = None, group: Any = None, async_op: bool = False
    ) -> Any:
        self._check("all_reduce", group, tensor)
        return _work(async_op)

    def _broadcast(
        self,
        tensor: Tensor,
        src: int | None = None,
        group: Any = None,
        async_op: bool = False,
        group_src: int | None = None,
    ) -> Any:
        self._check("broadcast", group, tensor)
        # `src` counts in the whole job, on a group as well: to take a rank within the group is
        # a common mistake.
        if src is not None and group is not None and src not in dist.get_process_group_ranks(group):
            self._refuse("broadcast", f"global rank {src} is not in the group")
        return _work(async_op)

    def _all_gather(
        self, tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        known = self._check("all_gather", group, tensor, *tensor_list)
        if len(tensor_list) != known.ranks:
            self._refuse("all_gather", f"{len(tensor_list)} outputs for {known.ranks} ranks")
        return _work(async_op)

    def _all_gather_into_tensor(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        known = self._check("all_gather_into_tensor", group, input_tensor, output_tensor)
        self._fits("all_gather_into_tensor", known, whole=output_tensor, part=input_tensor)
        return _work(async_op)

    def _reduce_scatter_tensor(
        self,
        output: Tensor,
        input: Tensor,
        op: Any = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        known = self._check("reduce_scatter_tensor", group, input, output)
        self._fits("reduce_scatter_tensor", known, whole=input, part=output)
        return _work(async_op)

    def _fits(self, call: str, known: Group, *, whole: Tensor, part: Tensor) -> None:
        """Refuses a call whose parts of all ranks do not make the whole."""
        if whole.numel() != known.ranks * part.numel() or whole.dtype != part.dtype:
            self._refuse(
                call,
                f"{tuple(part.shape)} {part.dtype} on each of {known.ranks} ranks do not make "
                f"{tuple(whole.shape)} {whole.dtype}",
            )

    def _p2p(self, name: str) -> Callable[..., Any]:
        """Returns what replaces a call between two ranks."""

        def call(tensor: Tensor, *_: Any, group: Any = None, **__: Any) -> _Work:
            self._check(name, group, tensor)
            return _Work()

        call.__name__ = name
        return call

    def _all_gather_object(self, object_list: list[Any], obj: Any, group: Any = None) -> None:
        self._count_object("all_gather_object", group)
        object_list[:] = [obj] * len(object_list)

    def _gather_object(
        self, obj: Any, object_gather_list: list[Any] | None = None, *_: Any, **options: Any
    ) -> None:
        self._count_object("gather_object", options.get("group"))
        if object_gather_list is not None:
            object_gather_list[:] = [obj] * len(object_gather_list)

    def _broadcast_object_list(self, object_list: list[Any], *_: Any, **options: Any) -> None:
        self._count_object("broadcast_object_list", options.get("group"))

    def _count_object(self, call: str, group: Any) -> None:
        known = self._group(group)
        self._calls[call, known.name, known.ranks, "object"] += 1


class _P2POp:
    """Stands for torch.distributed.P2POp, which would look at the group's backend."""

    def __init__(
        self,
        op: Any,
        tensor: Tensor,
        peer: int | None = None,
        group: Any = None,
        tag: int = 0,
        group_peer: int | None = None,
    ) -> None:
        self.op = op
        self.tensor = tensor
        self.group = group
