"""Tensors as byte ranges of files, and new tensors made of their rows, in constant memory.

Every conversion is a rearrangement of rows: a weight of one format is some rows of the weights of
the other, one below the other, perhaps cut to some columns. So nothing here knows a model, needs
torch for bytes that stay as they are, or holds more than a block.

    StoredTensor    a matrix in files: rectangles, each contiguous in its file
    Piece           a tensor to make: spans of rows of stored tensors, cut to a range of columns
    Piece.blocks    the piece's bytes in order, at most `block_bytes` at a time, in its dtype

A vector is a matrix of one column.
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
class Extent:
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
    extents: tuple[Extent, ...]
    """Rectangles that tile it exactly."""

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return prod(self.shape[1:])

    def check_tiling(self) -> None:
        """Raises WeightsError where the extents overlap or leave something out."""
        rows = self.shape[0]
        columns = self.columns
        inside = all(
            extent.row >= 0
            and extent.column >= 0
            and extent.row + extent.rows <= rows
            and extent.column + extent.columns <= columns
            for extent in self.extents
        )

        # Every pair of extents: there are few, one for each shard of the tensor.
        overlap = False
        for i, a in enumerate(self.extents):
            for b in self.extents[:i]:
                shares_rows = max(a.row, b.row) < min(a.row + a.rows, b.row + b.rows)
                shares_columns = max(a.column, b.column) < min(
                    a.column + a.columns, b.column + b.columns
                )
                overlap |= shares_rows and shares_columns

        # Rectangles inside that do not overlap leave nothing out where their areas add up.
        area = sum(extent.rows * extent.columns for extent in self.extents)
        if not inside or overlap or area != rows * columns:
            raise WeightsError(
                f"{self.name}: its {len(self.extents)} shards do not tile its shape "
                f"{list(self.shape)}; the checkpoint is incomplete or corrupt"
            )


@dataclass(frozen=True)
class RowSpan:
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
    spans: tuple[RowSpan, ...]
    """Its rows, top to bottom."""
    first_column: int = 0
    """First column taken of the spans' tensors."""
    columns: int = 1
    """How many columns are taken."""

    @property
    def num_bytes(self) -> int:
        """Size in its own dtype."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    def cast(self, dtype: str) -> Piece:
        """Returns the same piece in another dtype."""
        return dataclasses.replace(self, dtype=dtype)

    def blocks(self, files: OpenFiles, block_bytes: int) -> Iterator[memoryview]:
        """Yields the bytes in order. A block is valid until the next one is asked for.

        Args:
            files: the files that the spans' tensors lie in.
            block_bytes: largest block before the cast, but at least one row.

        Raises:
            WeightsError: a file ends before its data, or a value does not fit the dtype.
        """
        buffer = bytearray(0)
        for span in self.spans:
            source_dtype = self.dtype
            if span.tensor is not None:
                source_dtype = span.tensor.dtype
            row_bytes = self.columns * DTYPE_BYTES[source_dtype]
            # Whole rows, at least one: a block is never cut within a row.
            step = max(1, block_bytes // max(row_bytes, 1))

            end = span.row + span.rows
            for row in range(span.row, end, step):
                rows = min(step, end - row)
                # One buffer for all blocks of about one size.
                if len(buffer) < rows * row_bytes:
                    buffer = bytearray(rows * row_bytes)
                block = memoryview(buffer)[: rows * row_bytes]

                if span.tensor is None:
                    # The buffer still holds the block before this one.
                    block[:] = bytes(len(block))
                else:
                    _read(span.tensor, files, block, row, rows, self.first_column, self.columns)
                if source_dtype != self.dtype:
                    block = _cast(block, source_dtype, self.dtype, self.name)
                yield block

    def read(self, files: OpenFiles, block_bytes: int = 2**24) -> bytearray:
        """Returns all of the bytes."""
        data = bytearray()
        # Each block is overwritten by the next: never collect them.
        for block in self.blocks(files, block_bytes):
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
        # preadv reads at most 2 GB at once, and less where a signal interrupts it.
        while done < len(block):
            try:
                count = os.preadv(self._descriptor(file), [block[done:]], offset + done)
            except OSError as error:
                raise WeightsError(f"{file}: cannot be read ({error.strerror})") from error
            if not count:
                raise WeightsError(
                    f"{file} ends at byte {offset + done}, before its data; copy or download it "
                    f"again"
                )

            done += count

    def _descriptor(self, file: Path) -> int:
        # Threads that first read one file at once would otherwise open it twice and lose one.
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file]

    def close(self) -> None:
        """Closes all descriptors."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def whole(tensor: StoredTensor, dtype: str | None = None) -> Piece:
    """Returns the tensor as a piece: as it is, or cast to `dtype`."""
    span = RowSpan(tensor, 0, tensor.shape[0])
    return Piece(tensor.name, dtype or tensor.dtype, tensor.shape, (span,), columns=tensor.columns)


def check_stored(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    """Checks a tensor against the shape that its model asks for.

    Raises:
        WeightsError: it has another one, or a dtype that weights do not have.
    """
    if tensor.shape != shape:
        raise WeightsError(
            f"{tensor.name} has the shape {list(tensor.shape)} where config.json asks for "
            f"{list(shape)}; the weights and config.json do not belong together"
        )
    if tensor.dtype not in DTYPE_BYTES:
        raise WeightsError(
            f"{tensor.name} has the dtype {tensor.dtype}; supported are "
            f"{', '.join(DTYPE_BYTES)}, not quantised weights"
        )


def same_bytes(a: Piece, b: Piece) -> bool:
    """Whether two pieces of one dtype are equal bit by bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    with OpenFiles() as files:
        # Two pieces of one shape come in equal blocks.
        blocks = zip(a.blocks(files, 2**20), b.blocks(files, 2**20), strict=True)
        return all(x == y for x, y in blocks)


def widest(dtypes: Sequence[str]) -> str:
    """Returns the smallest dtype that holds values of all of `dtypes` exactly."""
    kinds = set(dtypes)
    # Of equal size, but each has values that the other rounds.
    if kinds == {"BF16", "F16"}:
        return "F32"
    return max(kinds, key=DTYPE_BYTES.__getitem__)


def _read(
    tensor: StoredTensor,
    files: OpenFiles,
    block: memoryview,
    row: int,
    rows: int,
    column: int,
    columns: int,
) -> None:
    """Fills `block` with rows [row, row + rows) and columns [column, column + columns)."""
    size = DTYPE_BYTES[tensor.dtype]
    row_bytes = columns * size
    for extent in tensor.extents:
        top = max(row, extent.row)
        bottom = min(row + rows, extent.row + extent.rows)
        left = max(column, extent.column)
        right = min(column + columns, extent.column + extent.columns)
        if top >= bottom or left >= right:
            continue

        # Rows of the extent follow one another in the file, whatever the block takes of them.
        extent_row_bytes = extent.columns * size
        start = (
            extent.offset + (top - extent.row) * extent_row_bytes + (left - extent.column) * size
        )
        part = block[(top - row) * row_bytes : (bottom - row) * row_bytes]
        inset = (left - column) * size
        whole_rows_of_extent = right - left == extent.columns

        # Both are contiguous: one read, straight to its place.
        if whole_rows_of_extent and extent.columns == columns:
            files.read_into(extent.file, start, part)
        elif whole_rows_of_extent:
            import numpy as np

            # Narrower than the block: one read of all of it, then its rows to their places.
            narrow = bytearray((bottom - top) * extent_row_bytes)
            files.read_into(extent.file, start, memoryview(narrow))
            target = np.frombuffer(part, np.uint8).reshape(bottom - top, row_bytes)
            target[:, inset : inset + extent_row_bytes] = np.frombuffer(narrow, np.uint8).reshape(
                bottom - top, extent_row_bytes
            )
        else:
            # A range of its columns: one read a row, so that nothing else is read.
            length = (right - left) * size
            for i in range(bottom - top):
                at = i * row_bytes + inset
                files.read_into(extent.file, start + i * extent_row_bytes, part[at : at + length])


def _cast(block: memoryview, source: str, target: str, name: str) -> memoryview:
    """Returns the block's values in another dtype.

    Raises:
        WeightsError: a finite value becomes infinite.
    """
    import torch

    values = torch.frombuffer(block, dtype=torch_dtype(source))
    cast = values.to(torch_dtype(target))
    # Cheap, and not finite where any value is not. Only then is every value looked at.
    ends = torch.stack(torch.aminmax(cast))
    if not bool(ends.isfinite().all()) and bool((cast.isinf() & ~values.isinf()).any()):
        raise WeightsError(
            f"{name} has values up to {float(values.abs().max()):.3g}, which {target} cannot hold; "
            f"take another --dtype"
        )

    # As bytes: numpy has no bfloat16.
    return memoryview(cast.view(torch.uint8).numpy().data)


def torch_dtype(name: str) -> Any:
    """Returns torch's dtype of a key of DTYPE_BYTES, or of a configuration's bf16, fp16 or fp32."""
    import torch

    return getattr(torch, TORCH_NAMES[stored_dtype(name)])


def stored_dtype(name: str) -> str:
    """Returns the key of DTYPE_BYTES of a configuration's spelling: BF16 of bf16, F32 of fp32."""
    return name.upper().replace("FP", "F")


def cut_rows(spans: Sequence[RowSpan], ranges: Sequence[tuple[int, int]]) -> tuple[RowSpan, ...]:
    """Returns the rows [first, last) of each range, out of the rows that `spans` make.

    What lies below the last span is zeros.
    """
    # `top` runs through the rows that the spans make, one below the other.
    taken = []
    for first, last in ranges:
        top = 0
        for span in spans:
            low = max(first, top)
            high = min(last, top + span.rows)
            if low < high:
                taken.append(RowSpan(span.tensor, span.row + low - top, high - low))
            top += span.rows

        if last > max(first, top):
            taken.append(RowSpan(None, 0, last - max(first, top)))
    return tuple(taken)
