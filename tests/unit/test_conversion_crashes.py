"""A conversion that is killed leaves nothing, or a partial directory that the next run
completes.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_real.conversion.convert import Converted, hf_to_megatron, megatron_to_hf
from megatron_real.weights import WeightsError, transfer
from megatron_real.weights.transfer import MANIFEST, Limits, check_manifest

SLOW = Limits(workers=2, max_memory=2**16)
"""4 KiB blocks: thousands of changes of the disk, for the kills to land between."""
MOMENTS = 20
"""Random moments at which a conversion is killed."""


@pytest.fixture(scope="module")
def source(tiny_model: Callable[..., Path]) -> Path:
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "vocab_size": 4000,
        "num_hidden_layers": 6,
    }
    return tiny_model("qwen2", dtype="bfloat16", **sizes)


def to_megatron(source: Path, out: Path) -> Converted:
    return hf_to_megatron(source, out, limits=SLOW)


def to_hf(source: Path, out: Path) -> Converted:
    return megatron_to_hf(source, out, limits=SLOW)


def changes(convert: Callable[[Path, Path], Converted], source: Path, out: Path) -> int:
    """Returns how often the conversion changes the disk: by a write, a sync or a rename."""
    with pytest.MonkeyPatch.context() as patch:
        count = _count_changes(patch, last=-1)
        convert(source, out)
    return next(count)


def kill(
    convert: Callable[[Path, Path], Converted], source: Path, out: Path, *, after: int
) -> None:
    """Runs the conversion in a process of its own, which kills itself after `after` changes of the
    disk.
    """
    child = os.fork()
    if not child:
        try:
            _count_changes(pytest.MonkeyPatch(), last=after)
            convert(source, out)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _count_changes(patch: pytest.MonkeyPatch, *, last: int) -> Iterator[int]:
    count = itertools.count()

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if next(count) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*args, **kwargs)

        return run

    for name in ("write", "pwrite", "fsync", "rename"):
        patch.setattr(os, name, counted(getattr(os, name)))
    return count


@pytest.mark.parametrize("convert", [to_megatron, to_hf])
def test_a_conversion_that_is_killed_at_any_moment_can_be_completed(
    convert: Callable[[Path, Path], Converted], source: Path, tmp_path: Path
) -> None:
    given = hf_to_megatron(source, tmp_path / "given").out if convert is to_hf else source
    out = tmp_path / "out"
    kept = set()
    total = changes(convert, given, out)
    expected = json.loads((out / MANIFEST).read_text())
    draw = random.Random(17)

    for after in (0, *(draw.randrange(total) for _ in range(MOMENTS)), total - 1):
        shutil.rmtree(out)
        kill(convert, given, out, after=after)
        if not out.exists():  # the last change of all comes after the new name
            kept.add(convert(given, out).resumed_bytes)
        assert check_manifest(out) == []
        assert json.loads((out / MANIFEST).read_text()) == expected
        assert {p.name for p in tmp_path.iterdir()} <= {"given", "out", ".out.journal"}

    assert len(kept) > MOMENTS // 2, "the work that was done before the kill must be kept"


def test_a_resumed_run_copies_only_what_is_missing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing the third part of the tensors fails; the second run writes exactly the bytes that the
    first one did not.
    """
    written = [0]
    write = transfer._write

    def counting(descriptor: int, block: memoryview, offset: int) -> None:
        if written[0] > 5_000_000:
            raise OSError(5, "Input/output error")
        written[0] += len(block)
        write(descriptor, block, offset)

    monkeypatch.setattr(transfer, "_write", counting)
    with pytest.raises(WeightsError, match="Input/output error"):
        to_megatron(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    written[0] = -(10**12)
    second = to_megatron(source, tmp_path / "out")
    crcs = 8 * second.tensors
    assert 2_000_000 < second.resumed_bytes <= 5_000_000
    assert written[0] + 10**12 <= second.num_bytes - second.resumed_bytes + crcs
    assert check_manifest(tmp_path / "out") == []


def test_tensors_that_fail_their_checksum_are_written_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal promises data that the disk lost, as after a power cut; the checksum finds it."""
    monkeypatch.setattr(transfer, "_finish", _full_disk)
    with pytest.raises(
        WeightsError, match="is full; free some space and run the same command again"
    ):
        to_megatron(source, tmp_path / "out")

    monkeypatch.undo()
    (file,) = (tmp_path / ".out.partial/release").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 10_000] = bytes(10_000)
    file.write_bytes(data)
    again = to_megatron(source, tmp_path / "out")

    assert 0 < again.num_bytes - again.resumed_bytes < again.num_bytes // 2
    assert check_manifest(again.out) == []


def test_a_line_of_the_journal_that_was_cut_short_spoils_no_other(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk was full in the middle of a line: the next run appends after it, and the run after
    that reads both.
    """
    monkeypatch.setattr(transfer, "_finish", _full_disk)
    for cut_short in (True, False):
        with pytest.raises(WeightsError, match="is full"):
            to_megatron(source, tmp_path / "out")
        if cut_short:
            journal = tmp_path / ".out.journal"
            *lines, _, _ = journal.read_bytes().split(b"\n")
            journal.write_bytes(b"\n".join([*lines, b"7"]))
    monkeypatch.undo()
    assert to_megatron(source, tmp_path / "out").resumed_bytes > 0
    assert check_manifest(tmp_path / "out") == []


def _full_disk(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_partial_of_another_source_is_not_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_finish", _full_disk)
    with pytest.raises(WeightsError, match="is full"):
        to_megatron(source, tmp_path / "out")
    monkeypatch.undo()
    copy = shutil.copytree(source, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (1, 1))
    assert to_megatron(copy, tmp_path / "out").resumed_bytes == 0


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(WeightsError, match=r"bytes are needed in .*, which has [\d,]+ too few"):
        to_megatron(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_to_one_place_are_refused(source: Path, tmp_path: Path) -> None:
    with (
        transfer._journal(tmp_path / "out"),
        pytest.raises(WeightsError, match="another process is writing"),
    ):
        to_megatron(source, tmp_path / "out")
