"""Buckets of tensors, and the group that carries them, between two threads that know no world."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from megatron_real.rollout import link
from megatron_real.rollout.link import Link, buckets, listen, unpacked

CPU = torch.device("cpu")
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
def test_tensors_come_out_as_they_went_in(monkeypatch: pytest.MonkeyPatch, limit: int, number: int) -> None:
    monkeypatch.setattr(link, "BUCKET_BYTES", limit)
    found, places = [], []
    for bucket in buckets(TENSORS):
        assert len(bucket.flat) <= limit or len(bucket.slots) == 1
        found.append([(name, tensor.clone()) for name, tensor in unpacked(bucket.flat, bucket.slots)])
        places.append(bucket.flat.data_ptr())
    assert len(found) == number and same([pair for pairs in found for pair in pairs], TENSORS)
    assert limit < 128 or len(set(places)) == 1 + (limit == 128), "one memory for all, another for one that is larger"


def test_two_workers_get_what_the_sender_sends() -> None:
    listener = listen("127.0.0.1")
    address, (bucket,) = listener.getsockname(), buckets(TENSORS)

    def worker(rank: int) -> list[tuple[str, torch.Tensor]]:
        joined = Link.join(address, rank=rank, size=3, device=CPU, seconds=30)
        return list(unpacked(joined.receive(len(bucket.flat)), bucket.slots))

    with ThreadPoolExecutor(2) as pool:
        received = [pool.submit(worker, rank) for rank in (1, 2)]
        Link.host(listener, size=3, device=CPU, seconds=30).send(bucket.flat)
        assert all(same(answer.result(30), TENSORS) for answer in received)
