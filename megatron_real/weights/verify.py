"""Checks a directory of weights, HF or Megatron, or compares two, tensor by tensor in constant
memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.conversion import (
    HF,
    checkpoint_of,
    hf_pieces,
    open_megatron,
    recorded_hf,
)
from megatron_real.weights.hf import open_model
from megatron_real.weights.mapping import Weights, hf_shapes
from megatron_real.weights.stored import (
    DTYPE_BYTES,
    OpenFiles,
    Piece,
    torch_dtype,
    whole,
    widest,
)
from megatron_real.weights.transfer import MANIFEST, check_manifest

_BLOCK_BYTES = 2**22


@dataclass
class Report:
    """What was found; `problems` is empty where all is well."""

    problems: list[str] = field(default_factory=list)
    """One sentence each."""
    descriptions: list[str] = field(default_factory=list)
    """Those of the problems that are about the two config.json."""
    tensors: int = 0
    """HF tensors looked at."""
    num_bytes: int = 0
    """Bytes of the first directory read."""
    identical: int = 0
    """Tensors equal bit by bit, after widening where the dtypes differ."""
    max_abs_difference: float = 0.0
    """Over all values."""
    worst: str = ""
    """Tensor of max_abs_difference."""
    nans: int = 0
    """NaN values in the first directory."""


@dataclass(frozen=True)
class Opened:
    """A directory of weights as HF tensors."""

    directory: Path
    """It."""
    kind: str
    """`HF` or `Megatron`."""
    config: Path
    """Directory of its config.json."""
    architecture: Architecture
    """What that one says."""
    weights: Weights
    """The same tensors, as our model loads them."""
    pieces: dict[str, Piece]
    """HF name -> tensor, in forward order."""
    unmapped: list[str]
    """Tensors that the model has no place for."""


def is_hf(directory: Path) -> bool:
    """Whether it is an HF directory, not a Megatron checkpoint."""
    return (directory / "config.json").is_file()


def open_as_hf(directory: Path, hf_config: Path | None = None) -> Opened:
    """Raises WeightsError where a tensor is missing, cut short or of another shape, or where two
    share bytes.
    """
    if is_hf(directory):
        architecture, weights = open_model(directory)
        pieces = {name: whole(weights.tensor(name)) for name in hf_shapes(architecture)}
        opened = Opened(directory, "HF", directory, architecture, weights, pieces, [])
    else:
        config = hf_config or recorded_hf(directory)
        architecture = Architecture.read(config)
        megatron = open_megatron(directory, architecture)
        opened = Opened(
            directory,
            "Megatron",
            config,
            architecture,
            megatron,
            hf_pieces(megatron),
            megatron.unmapped,
        )
    _check_disjoint(opened)
    return opened


def verify(
    a: Opened,
    b: Opened | None,
    *,
    atol: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Checks `a` by itself and, where given, against `b`.

    Args:
        a, b: the directories.
        atol: largest absolute difference that is no problem; 0 asks for equal bits.
        progress: called with (bytes of a tensor that is done, bytes in all).
    """
    report = Report()
    for opened in (a, b) if b else (a,):
        report.problems += [
            f"{opened.directory} has {name}, which the model has no place for"
            for name in opened.unmapped
        ]
        report.problems += _checksums(opened)
    if b is not None:
        report.descriptions = _descriptions(a, b)
        report.problems += report.descriptions
    if b and a.pieces.keys() != b.pieces.keys():
        for name in sorted(a.pieces.keys() ^ b.pieces.keys()):
            report.problems.append(f"{name} is only in {(a if name in a.pieces else b).directory}")
    total = sum(piece.num_bytes for piece in a.pieces.values())
    with OpenFiles() as files:
        for name, piece in a.pieces.items():
            _compare(report, name, piece, b.pieces.get(name) if b else None, files, atol)
            if progress is not None:
                progress(piece.num_bytes, total)
    return report


def _checksums(opened: Opened) -> list[str]:
    """What the manifest says of the directory, or of the checkpoint in it that was opened.

    Megatron-LM may have gone on saving there: then the tracker names a later checkpoint, which no
    manifest covers, and the converted one need not be there any more.
    """
    roots = [opened.directory, opened.directory.parent]
    covered = [root for root in roots if (root / MANIFEST).is_file()]
    if not covered:
        return []
    if opened.kind == "HF":
        return check_manifest(covered[0])
    parts = (f"{checkpoint_of(opened.directory).resolve().name}/", f"{HF}/")
    return check_manifest(covered[0], skip=lambda path: not path.startswith(parts))


def _descriptions(a: Opened, b: Opened) -> list[str]:
    """A sentence for each number of config.json that differs and that tensors do not show."""
    left, right = dataclasses.asdict(a.architecture), dataclasses.asdict(b.architecture)
    problems = []
    for name in ("num_heads", "num_kv_heads", "head_dim", "norm_eps", "rope_theta", "rope_factor"):
        if left[name] != right[name]:
            problems.append(
                f"the models differ: {name} is {left[name]} in {a.config}/config.json and "
                f"{right[name]} in {b.config}/config.json"
            )
    return problems


def _compare(
    report: Report, name: str, a: Piece, b: Piece | None, files: OpenFiles, atol: float
) -> None:
    """Adds one tensor to the report."""
    report.tensors += 1
    report.num_bytes += a.num_bytes
    if b is not None and a.shape != b.shape:
        report.problems.append(f"{name} has the shapes {list(a.shape)} and {list(b.shape)}")
        return
    dtype = widest([a.dtype, b.dtype]) if b else a.dtype
    other = (b or a).cast(dtype)
    nans, worst, same = 0, 0.0, True
    for left, right in _aligned(
        a.cast(dtype).blocks(files, _BLOCK_BYTES), other.blocks(files, _BLOCK_BYTES), b is None
    ):
        values = _values(left, dtype)
        nans += int(values.isnan().sum())
        if left != right:
            same = False
            difference = (values.double() - _values(right, dtype).double()).abs()
            worst = max(worst, float(difference.nan_to_num(nan=float("inf")).max()))
    report.nans += nans
    report.identical += same
    if nans:
        report.problems.append(f"{name} has {nans} NaN values")
    if worst > report.max_abs_difference:
        report.max_abs_difference, report.worst = worst, name
    if not same and not worst <= atol:
        report.problems.append(f"{name} differs by up to {worst:.3g}")
    elif not same and atol == 0.0:
        report.problems.append(f"{name} differs in the sign of zeros or the bits of NaNs")


def _aligned(
    a: Iterator[memoryview], b: Iterator[memoryview], alone: bool
) -> Iterator[tuple[memoryview, memoryview]]:
    """Equal stretches of two streams of blocks; with `alone`, of the first and itself."""
    if alone:
        yield from ((block, block) for block in a)
        return
    left = right = memoryview(b"")
    while True:
        left, right = left or next(a, left), right or next(b, right)
        length = min(len(left), len(right))
        if not length:
            return
        yield left[:length], right[:length]
        left, right = left[length:], right[length:]


def _values(block: memoryview, dtype: str) -> Any:
    import torch

    return torch.frombuffer(block, dtype=torch_dtype(dtype))


def _check_disjoint(opened: Opened) -> None:
    """Raises WeightsError where two chunks share bytes of a file."""
    # Several pieces are made of one tensor (q, k and v), so that its chunks come more than once.
    tensors = [run.tensor for piece in opened.pieces.values() for run in piece.runs if run.tensor]
    chunks = {(chunk, tensor.dtype, tensor.name) for tensor in tensors for chunk in tensor.chunks}
    end, last = 0, None
    for chunk, dtype, _ in sorted(chunks, key=lambda found: (found[0].file, found[0].offset)):
        if chunk.file == last and chunk.offset < end:
            raise WeightsError(
                f"{chunk.file}: two tensors share the bytes from {chunk.offset} on; it is corrupt"
            )
        last, end = chunk.file, chunk.offset + chunk.rows * chunk.columns * DTYPE_BYTES[dtype]
