"""Buckets of tensors, and the process group that carries them, between two threads without a
default process group.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch._C._distributed_c10d import HashStore, TCPStore

from megatron_real.challenge import NotProven
from megatron_real.rollout.vllm_server import link
from megatron_real.rollout.vllm_server.link import Link, buckets, listen, unpacked

CPU = torch.device("cpu")
SECONDS = 120.0
"""Far more than two ends need to meet, on a busy machine too."""
TENSORS = [
    ("odd", torch.arange(3, dtype=torch.bfloat16)),
    ("strided", torch.arange(12.0).reshape(3, 4).t()),
    ("double", torch.full((5,), 1e-300, dtype=torch.float64)),
    ("scalar", torch.tensor(7.0)),
    ("large", torch.arange(100.0)),
    ("last", torch.tensor([True, False])),
]


def same(one: list[tuple[str, torch.Tensor]], other: list[tuple[str, torch.Tensor]]) -> bool:
    return [name for name, _ in one] == [name for name, _ in other] and all(
        a.dtype == b.dtype and torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True)
    )


@pytest.mark.parametrize(("limit", "number"), [(1 << 20, 1), (128, 3), (1, 6)])
def test_tensors_come_out_as_they_went_in(
    monkeypatch: pytest.MonkeyPatch, limit: int, number: int
) -> None:
    monkeypatch.setattr(link, "SYNC_BUCKET_BYTES", limit)

    unpacked_tensors = []
    addresses = []
    for bucket in buckets(TENSORS):
        assert len(bucket.flat) <= limit or len(bucket.slots) == 1
        # Cloned, because the next bucket may lie in the same memory.
        for name, tensor in unpacked(bucket.flat, bucket.slots):
            unpacked_tensors.append((name, tensor.clone()))
        addresses.append(bucket.flat.data_ptr())

    assert len(addresses) == number and same(unpacked_tensors, TENSORS)
    assert limit < 128 or len(set(addresses)) == 1 + (limit == 128), (
        "one memory for all, another for one that is larger"
    )


def test_two_workers_get_what_the_sender_sends() -> None:
    listener = listen("127.0.0.1")
    address = listener.getsockname()
    (bucket,) = buckets(TENSORS)

    def worker(rank: int) -> list[tuple[str, torch.Tensor]]:
        joined = Link.join(address, "secret", rank=rank, size=3, device=CPU, seconds=SECONDS)
        return list(unpacked(joined.receive(len(bucket.flat)), bucket.slots))

    with ThreadPoolExecutor(2) as pool:
        received = [pool.submit(worker, rank) for rank in (1, 2)]
        Link.host(listener, "secret", size=3, device=CPU, seconds=SECONDS).send(bucket.flat)
        assert all(same(answer.result(SECONDS), TENSORS) for answer in received)


def joins(address: tuple[str, int], secret: str) -> str:
    """Returns what happens to a worker that joins with a secret."""
    try:
        Link.join(address, secret, rank=1, size=2, device=CPU, seconds=SECONDS)
    except (OSError, RuntimeError) as error:
        return type(error).__name__
    return "joined"


def test_nobody_takes_a_workers_place() -> None:
    """Strangers come before the worker: one that speaks the store's protocol, a scanner, and one
    that stays silent.
    """
    listener = listen("127.0.0.1")
    address: tuple[str, int] = listener.getsockname()
    with ThreadPoolExecutor(2) as pool:
        host = pool.submit(Link.host, listener, "secret", size=2, device=CPU, seconds=SECONDS)
        scanner = socket.create_connection(address)
        scanner.sendall(b"GET / HTTP/1.1\r\n\r\n")
        silent = socket.create_connection(address)
        assert joins(address, "guessed") == "NotProven"
        with pytest.raises((OSError, RuntimeError)):
            TCPStore(*address, 2, is_master=False, timeout=timedelta(seconds=2))

        def worker() -> torch.Tensor:
            joined = Link.join(address, "secret", rank=1, size=2, device=CPU, seconds=SECONDS)
            return joined.receive(4)

        received = pool.submit(worker)
        host.result(SECONDS).send(torch.ones(4, dtype=torch.uint8))
        assert received.result(SECONDS).tolist() == [1, 1, 1, 1]
        for stray in (scanner, silent):
            stray.close()


@pytest.mark.parametrize("impostor", ["worker", "sender"])
def test_a_stranger_in_the_process_group_gets_no_weights(impostor: str) -> None:
    """The process group's own connections ask for no secret, so whoever was quicker there still has
    to prove that it knows it.
    """
    store = HashStore()
    known = {"worker": ("secret", "guessed"), "sender": ("guessed", "secret")}[impostor]

    def end(rank: int) -> str:
        group = link._group(store, rank, 2, CPU, host="127.0.0.1", seconds=SECONDS)
        try:
            link._prove(group, known[rank], rank=rank, size=2, device=CPU)
        except NotProven as error:
            return str(error)
        except RuntimeError:
            return "the other end has left"
        return ""

    with ThreadPoolExecutor(2) as pool:
        sender, worker = (pool.submit(end, rank) for rank in (0, 1))
        assert sender.result(SECONDS) and worker.result(SECONDS), "neither goes on"
    honest = sender if impostor == "worker" else worker
    assert "does not know this run's secret" in honest.result() or impostor == "sender"


def test_a_sender_whose_worker_never_comes_can_be_aborted() -> None:
    """Its broadcast ends with an error at once, instead of after the process group's timeout."""
    listener = listen("127.0.0.1")
    address = listener.getsockname()
    flat = torch.zeros(64 << 20, dtype=torch.uint8)  # more than the connection's buffers hold
    with ThreadPoolExecutor(2) as pool:
        worker = pool.submit(Link.join, address, "secret", rank=1, size=2, device=CPU, seconds=300)
        sender = Link.host(listener, "secret", size=2, device=CPU, seconds=300)
        idle = worker.result(SECONDS)
        del worker  # a future keeps its result, in a cycle with the error below until a collection
        sent = pool.submit(sender.send, flat)
        with pytest.raises(TimeoutError):
            sent.result(0.5)

        sender.abort()
        with pytest.raises(RuntimeError, match="was aborted"):
            sent.result(SECONDS)
        del idle  # its connection closes, or gloo would wait for it when the sender's group goes
