"""The road that weights take from the trainer to a server.

It is a process group of one sender and the server's workers.

The process group lies outside both sides' worlds, so neither side has to know the other's. It is
gloo between CPUs and NCCL between GPUs, by the same lines. The sender lays tensors end to end into
a bucket, announces its contents (engine.py) and broadcasts it.

    sender                                     worker i of n
    listener = listen(host)
    link = Link.host(listener, secret,         link = Link.join(address, secret,
                     size=n + 1)                                rank=i + 1, size=n + 1)
    link.send(bucket.flat)                     link.receive(num_bytes)

Both ends know a secret, and each proves so twice before weights are sent: where they exchange
addresses (meeting.py), and over the process group itself, because the connections of gloo and NCCL
authenticate nobody.
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

from megatron_real.buffers import SYNC_BUCKET_BYTES
from megatron_real.challenge import NotProven, own_address, proof
from megatron_real.rollout.vllm_server.meeting import Guest, Host

_POLL_SECONDS = 0.0005
"""Time between two looks at a broadcast, which takes some 10 ms."""
_ALIGNMENT = 16
"""Each tensor begins at a multiple of this many bytes, so that it can be viewed in its dtype."""


@dataclass(frozen=True)
class BucketSlot:
    """One tensor's place in a bucket, as it is announced."""

    name: str
    """HF name."""
    dtype: str
    """Name of the dtype in torch, such as "bfloat16"."""
    shape: tuple[int, ...]
    """Shape of the tensor."""
    start: int
    """Offset of its first byte in the bucket."""


@dataclass(frozen=True)
class Bucket:
    """Tensors laid end to end."""

    slots: Sequence[BucketSlot]
    """The tensors' places, in order."""
    flat: Tensor
    """[bytes] uint8, on the tensors' device."""


def buckets(weights: Iterable[tuple[str, Tensor]]) -> Iterator[Bucket]:
    """Cuts a stream of HF tensors into buckets of SYNC_BUCKET_BYTES, or of one larger tensor.

    All buckets lie in the same memory: a bucket is valid until the next one is asked for.
    """
    memory = torch.empty(0, dtype=torch.uint8)
    slots: list[BucketSlot] = []
    end = 0
    for name, tensor in weights:
        num_bytes = tensor.numel() * tensor.element_size()
        # Rounded up.
        aligned = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if slots and end + aligned > SYNC_BUCKET_BYTES:
            yield Bucket(slots, memory[:end])
            slots = []
            end = 0

        if end + aligned > len(memory):
            # At the first tensor, and where one alone is larger than the bucket.
            size = max(aligned, SYNC_BUCKET_BYTES)
            memory = torch.empty(size, dtype=torch.uint8, device=tensor.device)

        dtype = str(tensor.dtype).removeprefix("torch.")
        slot = BucketSlot(name, dtype, tuple(tensor.shape), end)
        _view(memory, slot).copy_(tensor)
        slots.append(slot)
        end += aligned

    if slots:
        yield Bucket(slots, memory[:end])


def unpacked(flat: Tensor, slots: Sequence[BucketSlot]) -> Iterator[tuple[str, Tensor]]:
    """Returns the (name, tensor) pairs of a bucket that has arrived; they are views of it."""
    return ((slot.name, _view(flat, slot)) for slot in slots)


def _view(flat: Tensor, slot: BucketSlot) -> Tensor:
    """Returns a slot of a bucket as a tensor that shares the bucket's memory."""
    dtype = getattr(torch, slot.dtype)
    num_bytes = torch.Size(slot.shape).numel() * dtype.itemsize
    return flat[slot.start : slot.start + num_bytes].view(dtype).view(slot.shape)


class Link:
    """One end of the road that weights take."""

    def __init__(self, group: Any, device: torch.device, store: Host | Guest) -> None:
        self._group = group
        self._device = device
        self._store = store
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
        """Makes the sender's end, and waits for the workers. The listener belongs to it now.

        Args:
            listener: where the workers come, see `listen`.
            secret: both ends know it, see `link_secret`.
            size: number of the workers and the sender.
            device: where the tensors are.
            seconds: how long a worker is waited for at most.

        Raises:
            NotProven: a member of the group does not know the secret.
            TimeoutError, RuntimeError: a worker does not come.
        """
        host = listener.getsockname()[0]
        store = Host(listener, secret, seconds=seconds)
        try:
            group = _group(store, 0, size, device, host=host, seconds=seconds)
            _prove(group, secret, rank=0, size=size, device=device)
        except BaseException:  # whatever it is: the store must not stay open
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
        """Makes a worker's end; `address` is that of the sender's listener.

        Raises:
            NotProven, TimeoutError, RuntimeError: as `host` raises them.
            OSError: nobody listens at the address.
        """
        store = Guest(address, secret, seconds=seconds)
        host = own_address(*address)
        group = _group(store, rank, size, device, host=host, seconds=seconds)
        _prove(group, secret, rank=rank, size=size, device=device)
        return cls(group, device, store)

    def close(self) -> None:
        """Closes the sender's listener; nobody can join any more."""
        if isinstance(self._store, Host):
            self._store.close()

    def abort(self) -> None:
        """Ends what the group waits for in any thread: that call raises.

        The link is of no use afterwards. Without this, NCCL's watchdog would end the whole process
        for a broadcast that a dead worker never joins.
        """
        self._aborted.set()
        self._group.abort()
        self.close()

    def send(self, flat: Tensor) -> None:
        """Sends the bytes of one bucket, and waits until they have left."""
        work = self._group.broadcast(flat, 0)
        # Polled instead of waited for: neither gloo's wait nor CUDA's ends with an abort.
        while not work.is_completed():
            if self._aborted.wait(_POLL_SECONDS):
                raise RuntimeError("the link was aborted, since its other side has failed")
        work.wait()  # raises the error that has ended it, if any

    def receive(self, num_bytes: int) -> Tensor:
        """Waits for one bucket and returns its bytes, [num_bytes] uint8."""
        flat = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._group.broadcast(flat, 0).wait()
        return flat


def link_secret(key: str, name: str) -> str:
    """Derives the secret of one link from the key that trainer and server share.

    The key itself is never sent.
    """
    return proof(key, b"link", name.encode()).hex()


def listen(host: str) -> socket.socket:
    """Returns a listener on a free port of one address of this machine."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # Port 0: the system chooses one that is free.
    listener.bind((host, 0))
    listener.listen(64)  # waiting connections at most: more workers than a server has
    return listener


def _group(
    store: Any, rank: int, size: int, device: torch.device, *, host: str, seconds: float
) -> Any:
    """Returns a process group outside torch's default one; gloo listens on `host` alone."""
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        # The watchdog ends the process when this time is over. Whoever waits gives up before:
        # after `seconds` for the other side's answer, and as many for this side's end.
        nccl._timeout = timedelta(seconds=2 * seconds + 60)
        return dist.ProcessGroupNCCL(store, rank, size, nccl)

    gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = timedelta(seconds=seconds)
    return dist.ProcessGroupGloo(store, rank, size, gloo)


def _prove(group: Any, secret: str, *, rank: int, size: int, device: torch.device) -> None:
    """Every worker proves to the sender over the group that it knows the secret, and vice versa.

    First comes the sender's random number, then each worker's number with a proof of both numbers,
    then the sender's proof of all numbers.

    Raises:
        NotProven: another member does not know the secret.
    """

    def broadcast(source: int, data: bytes, num_bytes: int) -> bytes:
        if rank != source:
            data = bytes(num_bytes)
        tensor = torch.tensor(list(data), dtype=torch.uint8, device=device)
        group.broadcast(tensor, source).wait()
        return bytes(tensor.tolist())

    own_number = secrets.token_bytes(32)
    # Fresh numbers of both sides: an old proof, heard earlier, is worth nothing.
    numbers = [broadcast(0, own_number, 32)]
    for worker in range(1, size):
        name = str(worker).encode()
        own_answer = own_number + proof(secret, b"worker", name, numbers[0], own_number)
        answer = broadcast(worker, own_answer, 64)
        numbers.append(answer[:32])
        expected = proof(secret, b"worker", name, numbers[0], numbers[worker])
        if not hmac.compare_digest(answer[32:], expected):
            raise NotProven(f"worker {worker - 1} of the link does not know this run's secret")

    # Every worker computes the sender's proof for itself; the sender compares it with its own.
    expected = proof(secret, b"sender", *numbers)
    if not hmac.compare_digest(broadcast(0, expected, 32), expected):
        raise NotProven("the sender of the link does not know this run's secret")
