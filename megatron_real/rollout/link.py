"""The road that weights take from the trainer to a server: a process group of one sender and the server's workers.

It lies outside both sides' worlds, so neither has to know the other's: gloo between CPUs and NCCL between GPUs, by the
same lines. The sender lays tensors end to end into a bucket, announces its contents (server.py) and broadcasts it.

    sender                                                worker i of n
    listener = listen(host)
    link = Link.host(listener, size=n + 1)                link = Link.join(address, rank=i + 1, size=n + 1)
    link.send(bucket.bytes())                             link.receive(num_bytes)
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

BUCKET_BYTES = 256 << 20
"""What a bucket holds at most, unless a single tensor is larger. Beside its model each side has one, and the sender
the tensor that comes next."""
_ALIGNMENT = 16
"""Each tensor begins at a multiple of so many bytes, so that it can be viewed in its dtype."""


@dataclass(frozen=True)
class Slot:
    """One tensor's place in a bucket, as it is announced."""

    name: str
    """HF name."""
    dtype: str
    """Such as "bfloat16"."""
    shape: tuple[int, ...]
    """Of the tensor."""
    start: int
    """Its first byte."""


@dataclass(frozen=True)
class Bucket:
    """Tensors laid end to end."""

    slots: Sequence[Slot]
    """In order."""
    flat: Tensor
    """[bytes] uint8, on the tensors' device."""


def buckets(weights: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
    """The stream, cut into buckets of at most BUCKET_BYTES or of one tensor.

    All of them lie in the same memory: a bucket is good until the next one is asked for.
    """
    memory, slots, end = torch.empty(0, dtype=torch.uint8), list[Slot](), 0
    for name, tensor in weights:
        size = -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
        if slots and end + size > BUCKET_BYTES:
            yield Bucket(slots, memory[:end])
            slots, end = [], 0
        if end + size > len(memory):
            memory = torch.empty(max(size, BUCKET_BYTES), dtype=torch.uint8, device=tensor.device)
        slots.append(Slot(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), end))
        _view(memory, slots[-1]).copy_(tensor)
        end += size
    if slots:
        yield Bucket(slots, memory[:end])


def unpacked(flat: Tensor, slots: Sequence[Slot]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket that has arrived: views of it."""
    return ((slot.name, _view(flat, slot)) for slot in slots)


def _view(flat: Tensor, slot: Slot) -> Tensor:
    dtype = getattr(torch, slot.dtype)
    num_bytes = torch.Size(slot.shape).numel() * dtype.itemsize
    return flat[slot.start : slot.start + num_bytes].view(dtype).view(slot.shape)


class Link:
    """One end of the road."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group, self._device = group, device

    @classmethod
    def host(cls, listener: socket.socket, *, size: int, device: torch.device, seconds: float) -> Link:
        """The sender's end; waits for the workers. Takes the listener over."""
        host, port = listener.getsockname()[:2]
        store = TCPStore(
            host, port, size, is_master=True, timeout=timedelta(seconds=seconds), master_listen_fd=listener.detach()
        )
        return cls(_group(store, 0, size, device, host=host, seconds=seconds), device)

    @classmethod
    def join(cls, address: tuple[str, int], *, rank: int, size: int, device: torch.device, seconds: float) -> Link:
        """A worker's end; `address` is that of the sender's listener."""
        store = TCPStore(*address, size, is_master=False, timeout=timedelta(seconds=seconds))
        return cls(_group(store, rank, size, device, host=own_address(*address), seconds=seconds), device)

    def send(self, flat: Tensor) -> None:
        """Sends the bytes of one bucket, and waits until they have left."""
        self._group.broadcast(flat, 0).wait()
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)

    def receive(self, num_bytes: int) -> Tensor:
        """Waits for the bytes of one bucket."""
        flat = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._group.broadcast(flat, 0).wait()
        return flat


def listen(host: str) -> socket.socket:
    """A listener on a free port of this one address."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(64)
    return listener


def own_address(host: str, port: int) -> str:
    """The address of this machine that the other side sees: that of the interface which leads there."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))  # a datagram socket sends nothing for it
        return str(probe.getsockname()[0])


def _group(store: Any, rank: int, size: int, device: torch.device, *, host: str, seconds: float) -> Any:
    """A process group that no world knows; gloo listens on `host` alone."""
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timedelta(seconds=seconds)
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = timedelta(seconds=seconds)
    return dist.ProcessGroupGloo(store, rank, size, gloo)
