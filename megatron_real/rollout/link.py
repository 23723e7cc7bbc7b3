"""The road that weights take from the trainer to a server: a process group of one sender and the server's workers.

It lies outside both sides' worlds, so neither has to know the other's: gloo between CPUs and NCCL between GPUs, by the
same lines. The sender lays tensors end to end into a bucket, announces its contents (server.py) and broadcasts it.

    sender                                                worker i of n
    listener = listen(host)
    link = Link.host(listener, secret, size=n + 1)        link = Link.join(address, secret, rank=i + 1, size=n + 1)
    link.send(bucket.bytes())                             link.receive(num_bytes)

Both ends know a secret, which each proves twice before weights are sent: where they exchange addresses (meeting.py), and
over the process group itself, whose own connections (gloo's, NCCL's) ask nobody who he is.
"""

from __future__ import annotations

import hmac
import secrets
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from threading import Event
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_real.challenge import NotProven, proof
from megatron_real.rollout.meeting import Guest, Host

BUCKET_BYTES = 256 << 20
"""What a bucket holds at most, unless a single tensor is larger. Beside its model each side has one, and the sender
the tensor that comes next."""
_POLL_SECONDS = 0.0005
"""Between two looks at a broadcast, which takes some 10 ms."""
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

    def __init__(self, group: Any, device: torch.device, store: Host | Guest) -> None:
        self._group, self._device, self._store = group, device, store
        self._aborted = Event()

    @classmethod
    def host(
        cls,
        listener: socket.socket,
        secret: str,
        *,
        size: int,
        device: torch.device,
        seconds: float,
    ) -> Link:
        """The sender's end; waits for the workers. Takes the listener over.

        Raises:
            NotProven: what has joined the group does not know the secret.
            TimeoutError, RuntimeError: a worker does not come.
        """
        host = listener.getsockname()[0]
        store = Host(listener, secret, seconds=seconds)
        try:
            group = _group(store, 0, size, device, host=host, seconds=seconds)
            _prove(group, secret, rank=0, size=size, device=device)
        except BaseException:  # of whatever kind, it is raised on; the store must not stay open
            store.close()
            raise
        return cls(group, device, store)

    @classmethod
    def join(
        cls,
        address: tuple[str, int],
        secret: str,
        *,
        rank: int,
        size: int,
        device: torch.device,
        seconds: float,
    ) -> Link:
        """A worker's end; `address` is that of the sender's listener. Raises as `host`."""
        store = Guest(address, secret, seconds=seconds)
        group = _group(store, rank, size, device, host=own_address(*address), seconds=seconds)
        _prove(group, secret, rank=rank, size=size, device=device)
        return cls(group, device, store)

    def close(self) -> None:
        """The sender lets nobody in any more."""
        if isinstance(self._store, Host):
            self._store.close()

    def abort(self) -> None:
        """Ends what the group waits for, in whatever thread: a call in it raises. The link is of no use afterwards.

        NCCL's watchdog would end the whole process for a broadcast that a dead worker never joins.
        """
        self._aborted.set()
        self._group.abort()
        self.close()

    def send(self, flat: Tensor) -> None:
        """Sends the bytes of one bucket, and waits until they have left."""
        work = self._group.broadcast(flat, 0)
        # Asked for and not waited for: neither gloo's wait nor CUDA's ends with an abort.
        while not work.is_completed():
            if self._aborted.wait(_POLL_SECONDS):
                raise RuntimeError("the link was aborted, since its other side has failed")
        work.wait()  # raises what has ended it

    def receive(self, num_bytes: int) -> Tensor:
        """Waits for the bytes of one bucket."""
        flat = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._group.broadcast(flat, 0).wait()
        return flat


def link_secret(key: str, name: str) -> str:
    """The secret of one link, of the key that trainer and server share: the key itself is never sent for it."""
    return proof(key, b"link", name.encode()).hex()


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


def _group(
    store: Any, rank: int, size: int, device: torch.device, *, host: str, seconds: float
) -> Any:
    """A process group that no world knows; gloo listens on `host` alone."""
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        # The watchdog ends the process when this is over: whoever waits for the other side gives up after `seconds` for
        # its answer and as many for our end, and aborts before.
        nccl._timeout = timedelta(seconds=2 * seconds + 60)
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = timedelta(seconds=seconds)
    return dist.ProcessGroupGloo(store, rank, size, gloo)


def _prove(group: Any, secret: str, *, rank: int, size: int, device: torch.device) -> None:
    """Every worker proves itself to the sender over the group, and the sender to every worker.

    The sender's number comes first, then each worker's number with a proof of both, then the sender's proof of all.
    """

    def broadcast(source: int, data: bytes, num_bytes: int) -> bytes:
        text = data if rank == source else bytes(num_bytes)
        tensor = torch.tensor(list(text), dtype=torch.uint8, device=device)
        group.broadcast(tensor, source).wait()
        return bytes(tensor.tolist())

    mine = secrets.token_bytes(32)
    numbers = [broadcast(0, mine, 32)]
    for worker in range(1, size):
        name = str(worker).encode()
        answer = broadcast(worker, mine + proof(secret, b"worker", name, numbers[0], mine), 64)
        numbers.append(answer[:32])
        if not hmac.compare_digest(
            answer[32:], proof(secret, b"worker", name, numbers[0], numbers[worker])
        ):
            raise NotProven(f"worker {worker - 1} of the link does not know this run's secret")
    expected = proof(secret, b"sender", *numbers)
    if not hmac.compare_digest(broadcast(0, expected, 32), expected):
        raise NotProven("the sender of the link does not know this run's secret")
