"""Tensors as byte ranges of files, and new tensors made of their rows, block by block in constant
memory.

Every conversion is a rearrangement of rows: a weight of one format is some rows of the weights of
the other, one below the other, perhaps cut to some columns. So nothing here knows a model, needs
torch for bytes that stay as they are, or holds more than a block.

    StoredTensor   a matrix in files: rectangles, each contiguous in its file       (a vector is a matrix of 1 column)
    Piece          a tensor to make: runs of rows of stored tensors, cut to a range of columns
    blocks()       the piece's bytes in order, at most `block_bytes` at a time, in the piece's dtype
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_real.weights import WeightsError

DTYPE_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
"""Dtypes that weights may have, by safetensors' name, with their size in bytes."""
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""What torch and config.json call them."""


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a matrix, its rows one after another in a file."""

    file: Path
    """Where it is."""
    offset: int
    """Byte of its first element."""
    row: int
    """First row of the whole matrix that it holds."""
    column: int
    """First column."""
    rows: int
    """How many rows."""
    columns: int
    """How many columns."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in files."""

    name: str
    """Its name there, for messages."""
    dtype: str
    """Key of DTYPE_BYTES."""
    shape: tuple[int, ...]
    """[rows, columns], or [rows] for a vector."""
    chunks: tuple[Chunk, ...]
    """Rectangles that tile it exactly."""

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return prod(self.shape[1:])

    def check_tiling(self) -> None:
        """Raises WeightsError where the chunks overlap or leave something out."""
        rows, columns = self.shape[0], self.columns
        inside = all(
            c.row >= 0
            and c.column >= 0
            and c.row + c.rows <= rows
            and c.column + c.columns <= columns
            for c in self.chunks
        )
        overlap = any(_overlap(a, b) for i, a in enumerate(self.chunks) for b in self.chunks[:i])
        if not inside or overlap or sum(c.rows * c.columns for c in self.chunks) != rows * columns:
            raise WeightsError(
                f"{self.name}: its {len(self.chunks)} shards do not tile its shape {list(self.shape)}; "
                f"the checkpoint is incomplete or corrupt"
            )


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a stored tensor, or of zeros."""

    tensor: StoredTensor | None
    """None: zeros, the padding of a vocabulary."""
    row: int
    """First row."""
    rows: int
    """How many."""


@dataclass(frozen=True)
class Piece:
    """A tensor to make."""

    name: str
    """Its name, for messages."""
    dtype: str
    """Key of DTYPE_BYTES; rows of other dtypes are cast."""
    shape: tuple[int, ...]
    """Its shape; the product is rows times columns."""
    runs: tuple[Run, ...]
    """Its rows, top to bottom."""
    first_column: int = 0
    """First column taken of the runs' tensors."""
    columns: int = 1
    """How many columns are taken."""

    @property
    def num_bytes(self) -> int:
        """Size in its own dtype."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def cast(self, dtype: str) -> Piece:
        """The same in another dtype."""
        return dataclasses.replace(self, dtype=dtype)

    def blocks(self, files: OpenFiles, block_bytes: int) -> Iterator[memoryview]:
        """Its bytes in order. A block is valid until the next one is asked for.

        Raises:
            WeightsError: a file ends before its data, or a value does not fit the dtype.
        """
        buffer = bytearray(0)
        for run in self.runs:
            source = run.tensor.dtype if run.tensor else self.dtype
            row_bytes = self.columns * DTYPE_BYTES[source]
            step = max(1, block_bytes // max(row_bytes, 1))
            for row in range(run.row, run.row + run.rows, step):
                rows = min(step, run.row + run.rows - row)
                if len(buffer) < rows * row_bytes:
                    buffer = bytearray(rows * row_bytes)
                block = memoryview(buffer)[: rows * row_bytes]
                if run.tensor is None:
                    block[:] = bytes(len(block))
                else:
                    _read(run.tensor, files, block, row, rows, self.first_column, self.columns)
                yield block if source == self.dtype else _cast(block, source, self.dtype, self.name)

    def read(self, files: OpenFiles, block_bytes: int = 2**24) -> bytearray:
        """All of its bytes."""
        data = bytearray()
        for block in self.blocks(
            files, block_bytes
        ):  # each is overwritten by the next: never collect them
            data += block
        return data


class OpenFiles:
    """Read-only descriptors of many files, opened when first read; may be shared by threads."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_into(self, file: Path, offset: int, block: memoryview) -> None:
        """Fills `block` from byte `offset`.

        Raises:
            WeightsError: the file ends early or cannot be read.
        """
        done = 0
        while done < len(block):
            try:
                count = os.preadv(self._descriptor(file), [block[done:]], offset + done)
            except OSError as error:
                raise WeightsError(f"{file}: cannot be read ({error.strerror})") from error
            if not count:
                raise WeightsError(
                    f"{file} ends at byte {offset + done}, before its data; copy or download it again"
                )
            done += count

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file]

    def close(self) -> None:
        """Closes all of them."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def whole(tensor: StoredTensor, dtype: str | None = None) -> Piece:
    """The tensor as it is, or cast to `dtype`."""
    run = Run(tensor, 0, tensor.shape[0])
    return Piece(tensor.name, dtype or tensor.dtype, tensor.shape, (run,), columns=tensor.columns)


def check_stored(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    """Raises WeightsError where a tensor has another shape than its model's, or a dtype that
    weights do not have.
    """
    if tensor.shape != shape:
        raise WeightsError(
            f"{tensor.name} has the shape {list(tensor.shape)} where config.json asks for {list(shape)}; "
            f"the weights and config.json do not belong together"
        )
    if tensor.dtype not in DTYPE_BYTES:
        raise WeightsError(
            f"{tensor.name} has the dtype {tensor.dtype}; supported are {', '.join(DTYPE_BYTES)}, not quantised weights"
        )


def same_bytes(a: Piece, b: Piece) -> bool:
    """Whether two pieces of one dtype are equal bit by bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    with OpenFiles() as files:
        blocks = zip(a.blocks(files, 2**20), b.blocks(files, 2**20), strict=True)
        return all(x == y for x, y in blocks)


def widest(dtypes: Sequence[str]) -> str:
    """The smallest dtype that holds values of all of `dtypes` exactly."""
    kinds = set(dtypes)
    return "F32" if kinds == {"BF16", "F16"} else max(kinds, key=DTYPE_BYTES.__getitem__)


def _overlap(a: Chunk, b: Chunk) -> bool:
    rows = max(a.row, b.row) < min(a.row + a.rows, b.row + b.rows)
    return rows and max(a.column, b.column) < min(a.column + a.columns, b.column + b.columns)


def _read(
    tensor: StoredTensor,
    files: OpenFiles,
    block: memoryview,
    row: int,
    rows: int,
    column: int,
    columns: int,
) -> None:
    """Fills `block` with the rectangle [row, row + rows) x [column, column + columns) of `tensor`."""
    size = DTYPE_BYTES[tensor.dtype]
    width = columns * size
    for chunk in tensor.chunks:
        top, bottom = max(row, chunk.row), min(row + rows, chunk.row + chunk.rows)
        left, right = max(column, chunk.column), min(column + columns, chunk.column + chunk.columns)
        if top >= bottom or left >= right:
            continue
        stride = chunk.columns * size
        start = chunk.offset + (top - chunk.row) * stride + (left - chunk.column) * size
        part = block[(top - row) * width : (bottom - row) * width]
        if right - left == chunk.columns == columns:
            files.read_into(chunk.file, start, part)
        elif right - left == chunk.columns:
            _read_wider(files, chunk.file, start, part, width, (left - column) * size, stride)
        else:  # a range of its columns: one read a row, so that nothing else is read
            inset, length = (left - column) * size, (right - left) * size
            for i in range(bottom - top):
                at = i * width + inset
                files.read_into(chunk.file, start + i * stride, part[at : at + length])


def _read_wider(
    files: OpenFiles, file: Path, start: int, part: memoryview, width: int, inset: int, stride: int
) -> None:
    """Whole rows of a narrow chunk into their columns of `part`, whose rows are `width` bytes."""
    import numpy as np

    rows = len(part) // width
    narrow = bytearray(rows * stride)
    files.read_into(file, start, memoryview(narrow))
    target = np.frombuffer(part, np.uint8).reshape(rows, width)
    target[:, inset : inset + stride] = np.frombuffer(narrow, np.uint8).reshape(rows, stride)


def _cast(block: memoryview, source: str, target: str, name: str) -> memoryview:
    """The block's values in another dtype.

    Raises:
        WeightsError: a finite value becomes infinite.
    """
    import torch

    wide = torch.frombuffer(block, dtype=torch_dtype(source))
    cast = wide.to(torch_dtype(target))
    ends = torch.stack(torch.aminmax(cast))  # cheap, and not finite where any value is not
    if not bool(ends.isfinite().all()) and bool((cast.isinf() & ~wide.isinf()).any()):
        raise WeightsError(
            f"{name} has values up to {float(wide.abs().max()):.3g}, which {target} cannot hold; take another --dtype"
        )
    return memoryview(cast.view(torch.uint8).numpy().data)


def torch_dtype(name: str) -> Any:
    """torch's dtype of a key of DTYPE_BYTES, or of its spelling in configurations (bf16, fp16,
    fp32, fp64).
    """
    import torch

    return getattr(torch, TORCH_NAMES[stored_dtype(name)])


def stored_dtype(name: str) -> str:
    """The key of DTYPE_BYTES for its spelling in configurations: `bf16` is BF16, `fp32` is F32."""
    return name.upper().replace("FP", "F")


def row_ranges(runs: Sequence[Run], ranges: Sequence[tuple[int, int]]) -> tuple[Run, ...]:
    """The rows [first, last) of each range, out of the rows that `runs` make.

    What lies below the last run is zeros.
    """
    taken = []
    for first, last in ranges:
        top = 0
        for run in runs:
            low, high = max(first, top), min(last, top + run.rows)
            if low < high:
                taken.append(Run(run.tensor, run.row + low - top, high - low))
            top += run.rows
        if last > max(first, top):
            taken.append(Run(None, 0, last - max(first, top)))
    return tuple(taken)
