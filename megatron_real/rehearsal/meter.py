"""Counts what a GPU would do: bytes, FLOPs, kernels and device synchronisations.

Bytes and synchronisations come with the lines that cause them.

The meter is a dispatch mode under FakeTensorMode, whose tensors have shapes and no memory. Small
tensors (labels, targets, bounds of sequences) carry their values on the CPU beside the fake,
through every operation whose inputs all have them.

So what depends on values (nonzero, unique, item) has a true answer where the run itself would know
it without a network or a matrix product, and a constant where only a GPU would (a loss, a norm).
Each such guess is listed.
"""

# mypy: disable-error-code="attr-defined,method-assign,assignment"
# Fake tensors carry an attribute of ours, `_known`.

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as outside_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.flop_counter import flop_registry

from megatron_real.rehearsal import device as cuda_device

aten = torch.ops.aten

_LARGEST_KNOWN = 1 << 20
"""Elements up to which a tensor's values are kept."""
_LARGEST_GUESS = 1 << 16
"""Elements up to which an unknown floating-point tensor is taken as 0.

What depends on it then has a shape.
"""
_GRANULE = 512
"""Bytes to which torch's CUDA allocator rounds each block."""

_BY_VALUE = frozenset(
    {
        aten.nonzero.default, aten._unique2.default, aten.masked_select.default,
        aten.bincount.default, aten.repeat_interleave.Tensor, aten.unique_consecutive.default,
        aten.unique_dim.default,
    }
)  # fmt: skip
"""Operations whose output's shape depends on values: on a GPU each waits for the device."""

# Beginnings of operations that only allocate, or give memory another name.
_NO_KERNEL = ("aten.empty", "aten.detach", "aten.new_empty", "aten.alias", "aten.lift")

# Files of the rehearsal: their lines are not the program's.
_OWN = {
    str(Path(__file__).with_name(name)) for name in ("meter.py", "world.py", "te_kernels.py")
} | {str(Path(__file__).with_name("transformer_engine.py"))}
_FLASH = aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward


def call_site(depth: int = 1) -> str:
    """Returns the lines of the running program that led here, innermost first.

    Lines of torch and of the rehearsal itself are left out.

    Args:
        depth: how many lines, at most.
    """
    frame: Any = sys._getframe(1)
    lines: list[str] = []
    while frame is not None and len(lines) < depth:
        name = frame.f_code.co_filename
        foreign = (
            "/torch/" in name or name in _OWN or "contextlib" in name or name.endswith("device.py")
        )
        if not foreign:
            lines.append(f"{_short(name)}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "?"


def _short(file: str) -> str:
    """Returns a file's path from its package on."""
    _, installed, rest = file.rpartition("site-packages/")
    if installed:
        return rest
    for package in ("transformer_engine", "megatron_real"):
        _, folder, rest = file.rpartition(f"/{package}/")
        if folder:
            return f"{package}/{rest}"
    return file


@dataclass
class _Known:
    """The values of a fake tensor."""

    real: Tensor
    """The values, on the CPU."""
    valid: list[bool]
    """[1] whether they still hold: False once the storage was written to without its values being
    followed. All views of a storage share the list."""


class Meter(TorchDispatchMode):
    """Runs the operations within it on fake tensors, and counts; enter it inside FakeTensorMode."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes that are allocated on the device now."""
        self.peak = 0
        """The most bytes at any time since the last `restart`."""
        self.holders: dict[str, int] = {}
        """Line that allocated -> bytes that it held at the peak."""
        self.pinned_host = 0
        """Bytes of pinned host memory allocated since the last `restart`."""
        self.flops: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        self.syncs_in_layers = 0
        self.guesses: Counter[str] = Counter()

        self._pinned: set[int] = set()
        self._sizes: dict[int, int] = {}
        self._owners: dict[int, str] = {}
        self._by_owner: Counter[str] = Counter()
        self._noted_peak = 0

    def __enter__(self) -> Meter:
        cuda_device.on_synchronize.append(self._sync)
        cuda_device.on_launch.append(self._launched)

        # megatron-core frees a buffer of gradients by giving its storage the size 0.
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: Any, size: int) -> Any:
            resized = resize(storage, size)
            if storage._cdata in self._sizes:
                self._hold(storage)
            return resized

        def pin(tensor: Tensor, *_: Any) -> Tensor:
            """Returns a copy that counts as pinned, which only a driver can make.

            Its values stay known.
            """
            pinned = tensor.clone()
            self._note_pinned(pinned)
            return pinned

        # Nothing puts the originals back: the process ends with the rehearsal.
        torch.UntypedStorage.resize_ = resize_and_count
        Tensor.pin_memory = pin
        Tensor.is_pinned = lambda tensor, *_: self._is_pinned(tensor)
        FakeTensor.tolist = lambda tensor: self._tolist(tensor)
        super().__enter__()
        return self

    def restart(self) -> None:
        """Sets all counts to 0 and the peak to what is allocated now."""
        for counter in (self.flops, self.kernels, self.syncs, self.guesses):
            counter.clear()
        self.syncs_in_layers = 0
        self.pinned_host = 0
        self.peak = self.live
        self._noted_peak = self.live
        self.holders = dict(self._by_owner)

    # Values ------------------------------------------------------------------------------------

    @staticmethod
    def values(tensor: Tensor) -> Tensor | None:
        """Returns the values of a tensor; None where they are not known."""
        known: _Known | None = getattr(tensor, "_known", None)
        if known is None or not known.valid[0]:
            return None
        return known.real

    def known(self, real: Tensor, device: torch.device) -> Tensor:
        """Returns a fake tensor on a device with these values."""
        with outside_modes():
            real = real.clone()
        fake = torch.empty(tuple(real.shape), dtype=real.dtype, device=device)
        fake._known = _Known(real, [True])
        return fake

    def _tolist(self, tensor: Tensor) -> Any:
        if tensor.device.type == "cuda":
            self._sync("tolist")
        real = self.values(tensor)
        if real is None:
            self.guesses[f"tolist of {tuple(tensor.shape)} @ {call_site()}"] += 1
            with outside_modes():
                return torch.full(tensor.shape, self._guess(tensor)).tolist()
        with outside_modes():
            return real.tolist()

    def _item(self, tensor: Tensor) -> Any:
        if tensor.device.type == "cuda":
            self._sync("item")
        real = self.values(tensor)
        if real is None:
            self.guesses[f"item @ {call_site()}"] += 1
            return self._guess(tensor)
        with outside_modes():
            return real.item()

    @staticmethod
    def _guess(tensor: Tensor) -> float | int | bool:
        """Returns the constant that stands for an element whose value only a GPU would know."""
        # Finite in a quotient and in a logarithm.
        if tensor.is_floating_point():
            return 0.5
        # Most of these are checks, such as whether all of it is finite: a run passes them.
        if tensor.dtype == torch.bool:
            return True
        return 1

    def _equal(self, tensors: Sequence[Tensor]) -> bool:
        if any(tensor.device.type == "cuda" for tensor in tensors):
            self._sync("equal")
        reals = [self.values(tensor) for tensor in tensors]
        # A comparison of which the values are not known is a check, which a run passes.
        if any(real is None for real in reals):
            return True
        with outside_modes():
            return torch.equal(*reals)  # type: ignore[arg-type]

    def _index_by_mask(self, args: Sequence[Any]) -> Tensor:
        """Indexes by the positions at which a mask is true, whose number must be known."""
        source = args[0]
        indices: list[Any] = []
        for index in args[1]:
            if not isinstance(index, Tensor) or index.dtype != torch.bool:
                indices.append(index)
                continue
            if index.device.type == "cuda":
                self._sync("index by mask")
            real = self.values(index)
            if real is None:
                raise RuntimeError(
                    f"a mask whose values a rehearsal does not know, at {call_site(3)}"
                )
            with outside_modes():
                # x[mask] is x[i, j, ...], with an index for each dimension of the mask.
                positions = real.nonzero().unbind(1)
            indices += [self.known(position, index.device) for position in positions]
        return aten.index.Tensor(source, indices)

    def _real_arguments(self, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Returns the same arguments on the CPU; None where a tensor's values are not known."""
        flat, spec = tree_flatten((args, kwargs))
        reals = []
        # A fake gives its values, a small tensor of the host stays, and a device becomes the CPU.
        for value in flat:
            if isinstance(value, FakeTensor):
                value = self.values(value)
                if value is None:
                    return None
            elif isinstance(value, Tensor):
                if value.numel() > _LARGEST_KNOWN or value.device.type != "cpu":
                    return None
            elif isinstance(value, torch.device):
                value = torch.device("cpu")
            reals.append(value)

        # A generator of the device and pinned memory have no counterpart on the CPU.
        real_args, real_kwargs = tree_unflatten(reals, spec)
        real_kwargs.pop("generator", None)
        if "pin_memory" in real_kwargs:
            real_kwargs["pin_memory"] = False
        return real_args, real_kwargs

    def _follow(self, func: Any, args: Any, tensors: Sequence[Tensor], out: Any, real: Any) -> None:
        """Gives the outputs their values, or marks them and what was written to as unknown."""
        outputs = [o for o in tree_leaves(out) if isinstance(o, FakeTensor)]
        # Small outputs of known inputs: the CPU computes their values as well.
        if real is not None and outputs and all(o.numel() <= _LARGEST_KNOWN for o in outputs):
            try:
                with outside_modes():
                    computed = func(*real[0], **real[1])
            except (RuntimeError, NotImplementedError, TypeError) as error:
                self.guesses[f"{func} on a CPU: {str(error).splitlines()[0][:80]}"] += 1
            else:
                results = [r for r in tree_leaves(computed) if isinstance(r, Tensor)]
                for output, result in zip(outputs, results, strict=False):
                    if output.shape == result.shape and getattr(output, "_known", None) is None:
                        output._known = _Known(result, self._shared_validity(output, tensors))
                return

        # From here on the values are not known: those that were written to are no longer true.
        written = [
            arg
            for arg, declared in zip(args, func._schema.arguments, strict=False)
            if declared.alias_info is not None and declared.alias_info.is_write
        ]
        for tensor in tree_leaves(written):
            if getattr(tensor, "_known", None) is not None:
                tensor._known.valid[0] = False

        # A view of an unknown tensor stays unknown: values of its own would part from it at the
        # next write.
        for output in outputs:
            small = output.is_floating_point() and output.numel() <= _LARGEST_GUESS
            if small and not func.is_view and self.values(output) is None:
                with outside_modes():
                    zeros = torch.zeros(tuple(output.shape), dtype=output.dtype)
                output._known = _Known(zeros, [True])

    @staticmethod
    def _shared_validity(output: Tensor, inputs: Sequence[Tensor]) -> list[bool]:
        """Returns the `valid` of the input whose storage the output shares, or a new one."""
        storage = output.untyped_storage()._cdata
        for tensor in inputs:
            known = getattr(tensor, "_known", None)
            if known is not None and tensor.untyped_storage()._cdata == storage:
                return known.valid
        return [True]

    # Counts ------------------------------------------------------------------------------------

    def _sync(self, kind: str) -> None:
        """Counts a wait for the device, by itself where it is in a transformer layer's forward."""
        self.syncs[f"{kind} @ {call_site(2)}"] += 1
        frame: Any = sys._getframe(1)
        while frame is not None:
            if frame.f_code.co_filename.endswith("transformer/transformer_layer.py"):
                self.syncs_in_layers += 1
                break
            frame = frame.f_back

    def _launched(self, kernel: str, flops: int) -> None:
        """Counts a kernel of ours, which no operation of torch stands for."""
        self.kernels[kernel] += 1
        self.flops[kernel] += flops

    def _hold(self, storage: Any) -> None:
        """Counts the storage of a tensor on the device at its present size.

        The caller knows the device from the tensor: the storage of a fake one says "meta" of
        itself.
        """
        # The address of the C++ object, which all views of the memory share.
        key = storage._cdata
        size = -(-storage.nbytes() // _GRANULE) * _GRANULE
        if key not in self._sizes:
            # A fake tensor is never freed by an allocator: the end of its storage stands for it.
            weakref.finalize(storage, self._release, key)
            self._owners[key] = call_site()

        grown = size - self._sizes.get(key, 0)
        if not grown:
            self._sizes[key] = size
            return
        self._sizes[key] = size
        self.live += grown
        self._by_owner[self._owners[key]] += grown

        if self.live > self.peak:
            self.peak = self.live
            # Noting every new peak would copy the table at each allocation.
            if self.peak > 1.01 * self._noted_peak or not self.holders:
                self._noted_peak = self.peak
                self.holders = dict(self._by_owner)

    def _release(self, key: int) -> None:
        size = self._sizes.pop(key, 0)
        self.live -= size
        self._by_owner[self._owners.pop(key, "?")] -= size

    def _count_transfer(self, func: Any, args: Any, kwargs: Any) -> None:
        """Counts a copy between host and device that makes the host wait.

        It does not wait where it was asked not to and the host's memory is pinned.
        """
        if func is aten._to_copy.default:
            target = kwargs.get("device")
            if target is None:
                return
            source = args[0]
            target_type = torch.device(target).type
            asked_not_to = kwargs.get("non_blocking", False)
            # What .to("cpu") makes is never pinned, so that the way back waits.
            pinned = target_type == "cuda" and self._is_pinned(source)
        elif func is aten.copy_.default:
            target_tensor = args[0]
            source = args[1]
            target_type = target_tensor.device.type
            asked_not_to = kwargs.get("non_blocking", False)
            if len(args) > 2:
                asked_not_to = args[2]
            on_host = target_tensor
            if target_type == "cuda":
                on_host = source
            pinned = self._is_pinned(on_host)
        else:
            return
        if not source.numel():
            return

        if {source.device.type, target_type} == {"cpu", "cuda"} and not (asked_not_to and pinned):
            memory = "pageable "
            if pinned:
                memory = ""
            self._sync(f"{memory}copy {source.device.type} to {target_type}")

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def pinned(self, memory: Tensor, size: int) -> Tensor:
        """Counts exactly these bytes as pinned.

        It stands for the driver's registration of host memory (pinned.py).

        Args:
            memory: on the host, of at least `size` elements.
            size: bytes to count.
        """
        storage = memory.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        self.pinned_host += size
        return memory[:size]

    def _note_pinned(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._pinned.add(storage._cdata)
        weakref.finalize(storage, self._pinned.discard, storage._cdata)
        # torch's CachingHostAllocator hands out powers of two.
        self.pinned_host += 1 << max(storage.nbytes() - 1, 0).bit_length()

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Counts the memory of an operation's outputs, its FLOPs and its kernel."""
        on_device = [
            o for o in tree_leaves(out) if isinstance(o, Tensor) and o.device.type == "cuda"
        ]
        for tensor in on_device:
            self._hold(tensor.untyped_storage())
        if not on_device:
            return

        packet = func._overloadpacket
        # Of attention causal FLOPs, which torch's own table counts as a full square: half of it,
        # by two products of the forward pass and five of the backward one.
        if packet is _FLASH:
            query_BALD, key_BKLD, *_ = args
            flops = 4 * query_BALD.numel() * key_BKLD.shape[2] // 2
        elif packet is _FLASH_BACKWARD:
            _, query_BALD, key_BKLD, *_ = args
            flops = 10 * query_BALD.numel() * key_BKLD.shape[2] // 2
        elif packet in flop_registry:
            flops = int(flop_registry[packet](*args, **kwargs, out_val=out))
        else:
            flops = 0
        self.flops[str(packet)] += flops
        if not func.is_view and not str(func).startswith(_NO_KERNEL):
            self.kernels[str(packet)] += 1

    # Dispatch ----------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs one operation on fakes, and counts it; torch calls this for each."""
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]

        # Operations whose result is a value, or has a shape that a mask decides.
        if func is aten._local_scalar_dense.default:
            return self._item(tensors[0])
        if func is aten.equal.default:
            return self._equal(tensors)
        if func is aten.index.Tensor and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        ):
            return self._index_by_mask(args)

        real = self._real_arguments(args, kwargs)
        # Operations whose output has a shape that values decide: the CPU runs them.
        if func in _BY_VALUE:
            if any(tensor.device.type == "cuda" for tensor in tensors):
                self._sync(str(func._overloadpacket))
            if real is None:
                raise RuntimeError(
                    f"{func} needs values that a rehearsal does not know, at {call_site(3)}"
                )
            with outside_modes():
                result = func(*real[0], **real[1])
            device = tensors[0].device
            out = tree_map(
                lambda leaf: self.known(leaf, device) if isinstance(leaf, Tensor) else leaf, result
            )
            self._count(func, args, kwargs, out)
            return out

        # All others: the fakes give shapes, the CPU gives the values that are known.
        self._count_transfer(func, args, kwargs)
        out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        if kwargs.get("pin_memory") and isinstance(out, Tensor) and out.device.type == "cpu":
            self._note_pinned(out)
        self._follow(func, args, tensors, out, real)
        return out
