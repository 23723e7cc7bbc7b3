"""Pinned host memory for a GPU's copies, and the thread that writes them, with the driver's answers
recorded.
"""

from __future__ import annotations

import gc
from pathlib import Path
from threading import current_thread
from typing import Any

import pytest
import torch

from megatron_real.checkpoint import writer
from megatron_real.pinned import host_copies
from megatron_real.rollout import checksum

PAGE = 4096
TENSORS = [
    torch.arange(5, dtype=torch.bfloat16),
    torch.zeros(3, 1000),
    torch.zeros(()),
    torch.zeros(0, 4),
    torch.ones(7, dtype=torch.float64),
]


class Driver:
    """Records the calls of cudaHostRegister and cudaHostUnregister."""

    def __init__(self, result: int = 0) -> None:
        self.result = result
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, _flags: int) -> int:
        if not self.result:
            self.pinned[address] = size
        return self.result

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)


def test_copies_are_views_of_one_buffer() -> None:
    copies = host_copies(TENSORS)
    for tensor, copy in zip(TENSORS, copies, strict=True):
        assert (copy.shape, copy.dtype) == (tensor.shape, tensor.dtype)
        copy.copy_(tensor)
    for tensor, copy in zip(TENSORS, copies, strict=True):
        assert torch.equal(tensor, copy), "two of them overlap"
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1


def test_the_buffer_is_pinned_at_its_size_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    on_a_gpu(monkeypatch, driver)
    copies = host_copies([torch.empty(5 * PAGE + 1, dtype=torch.uint8)])  # powers of two would be 8
    ((address, size),) = driver.pinned.items()
    assert address % PAGE == 0 and size == 6 * PAGE
    assert copies[0].data_ptr() == address

    del copies
    gc.collect()
    assert not driver.pinned


def test_the_driver_refuses_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, Driver(result=2))
    with pytest.raises(MemoryError, match=r"does not pin 0\.0 GiB .*ulimit -l"):
        host_copies(TENSORS)


def test_the_writing_thread_is_on_the_ranks_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device_of: dict[str, torch.device] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: device_of.update({current_thread().name: device})
    )
    with writer.writing_thread() as pool:
        name = pool.submit(lambda: current_thread().name).result()
    assert device_of == {name: torch.device("cuda", 3)}


def test_checkpoints_are_not_copied_by_way_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torch's overlapping loader waits for the device after a given number of bytes; 0 selects the
    other loader.
    """
    ahead = []

    def save(_state: Any, *, storage_writer: Any, **_: Any) -> None:
        ahead.append(storage_writer.per_thread_copy_ahead)

    monkeypatch.setattr(writer, "save", save)
    monkeypatch.setattr(writer, "mcore_to_pyt_state_dict", lambda state: state)
    writer.write(tmp_path, {}, None)
    assert ahead == [0]


@pytest.mark.parametrize("num_bytes", [8 << 18, (8 << 18) + 24, 8 * (1 << 15) * 7, 40])
def test_a_checksum_is_the_same_however_many_blocks_are_summed_at_once(
    monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    """On a GPU 256 MiB are summed by a few launches, on a CPU block by block."""
    data = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8)
    sums = []
    launches = []
    for together in (1, 3, 1024):
        monkeypatch.setitem(checksum._TOGETHER, "cpu", together)
        with torch.profiler.profile() as profile:
            sums.append(checksum.checksum(data))
        launches.append(sum(event.count for event in profile.key_averages()))
    assert sums[0] == sums[1] == sums[2]
    assert launches[2] <= 120
    assert num_bytes < 8 << 18 or launches[0] > 1.5 * launches[2]
