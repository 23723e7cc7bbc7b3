"""Megatron's torch_dist checkpoints: where each weight's bytes lie, and a checkpoint laid out from
HF weights.

The format is torch.distributed.checkpoint's: `.metadata` is a pickle that says, for each key, the
global shape and the chunks that tile it, and for each chunk its file and range there; a range holds
one torch.save archive. The keys do not depend on TP, PP or the layer spec: all layers are one
tensor with the layer as its first dimension, so a checkpoint written without a layout loads into
any. (megatron/core/dist_checkpointing/strategies/torch.py, read in 0.16.1 and 0.19.2.) The
optimizer's keys are never opened.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.arguments import megatron_args
from megatron_real.weights.containers import (
    LARGEST_PICKLE,
    Layout,
    PickledTensor,
    TorchFile,
    layout,
    load_pickle,
)
from megatron_real.weights.mapping import EMBEDDING, LOCAL_NAMES, OUTPUT, Entry, Weights, entries
from megatron_real.weights.stored import (
    DTYPE_BYTES,
    Chunk,
    Piece,
    StoredTensor,
    torch_dtype,
    widest,
)
from megatron_real.weights.transfer import Output, Target

METADATA, CONFIG, COMMON = ".metadata", "metadata.json", "common.pt"
_CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_CONFIG |= {"common_backend": "torch", "common_backend_version": 1}
# What megatron-core asks for beside the weights of a layer: TransformerEngine's state of a module,
# empty without fp8. TransformerEngine's layers have all five, the local ones the linears; a
# superset is ignored.
EXTRA_STATE = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
_FILE_BYTES = 4 * 2**30


class TorchDistWeights:
    """The weights of a torch_dist checkpoint. Only `.metadata` is read until a tensor is asked for.

    Raises:
        WeightsError: not such a checkpoint, or a corrupt or hostile one.
    """

    def __init__(self, directory: Path, architecture: Architecture) -> None:
        self.directory, self.architecture = directory, architecture
        metadata = read_metadata(directory)
        self.shapes, self._chunks = metadata.shapes, metadata.chunks
        self.arguments = common_state(directory, metadata).get("args")
        """Megatron-LM's arguments that the checkpoint was trained with; None where it has none."""

    @property
    def dtype(self) -> str:
        """The embedding's dtype, which stands for all matrices."""
        return self._key(EMBEDDING)[1]

    @property
    def unmapped(self) -> list[str]:
        """Keys of tensors that no HF tensor stands for; the optimizer's are not listed."""
        known = {key for entry in entries(self.architecture) for key in _spellings(entry)} | {
            OUTPUT
        }
        return sorted(
            k
            for k in self.shapes
            if k not in known and not k.startswith(("optimizer.", "chained_"))
        )

    def tensor(self, entry: Entry) -> StoredTensor:
        """Where a parameter lies, of one layer, without the vocabulary's padding.

        Raises:
            WeightsError: it is not there, incomplete, or has another shape than the model's.
        """
        keys = [key for key in dict.fromkeys(_spellings(entry)) if key in self.shapes]
        if not keys:
            raise WeightsError(
                f"{self.directory} has no tensor {entry.key}; it is not a checkpoint of this model"
            )
        if len(keys) > 1:
            raise WeightsError(
                f"{self.directory} has one parameter twice, as {keys[0]} and {keys[1]}; it is "
                f"unclear which is meant"
            )
        key = keys[0]
        shape, dtype = self._key(key)
        stacked = "layers." in key and f".{entry.layer}." not in key
        expected = ((self.architecture.num_layers,) if stacked else ()) + entry.shape
        same = (
            shape[1:] == expected[1:] and shape[0] >= expected[0]
            if entry.kind == "vocab"
            else shape == expected
        )
        if not same:
            raise WeightsError(
                f"{self.directory}: {key} is {list(shape)} {dtype} where the model's config.json asks for "
                f"{list(expected)}; they do not belong together"
            )
        wanted = self._chunks.get(key, [])
        if stacked and entry.layer is not None:
            wanted = [c for c in wanted if c.offsets[0] <= entry.layer < c.offsets[0] + c.sizes[0]]
        chunks = tuple(self._chunk(key, dtype, c, entry.layer if stacked else None) for c in wanted)
        whole = StoredTensor(
            f"{key}[{entry.layer}]", dtype, shape[1:] if stacked else shape, chunks
        )
        whole.check_tiling()
        return whole

    def copies(self) -> Iterator[tuple[str, Piece, Piece]]:
        """(name, tensor, the one it should be a copy of) of what is not read from the checkpoint."""
        if self.architecture.tied and OUTPUT in self.shapes:
            embedding = next(entries(self.architecture))
            output = dataclasses.replace(embedding, key=OUTPUT)
            pieces = [e.to_hf(t, 0, t.dtype) for e in (output, embedding) for t in [self.tensor(e)]]
            yield OUTPUT, pieces[0], pieces[1]

    def megatron_piece(
        self, entry: Entry, ranges: Sequence[tuple[int, int]], columns: tuple[int, int]
    ) -> Piece:
        """The rectangle `ranges` x `columns` of a parameter, in the checkpoint's dtype."""
        tensor = self.tensor(entry)
        return entry.from_megatron(tensor, tensor.dtype, ranges, columns)

    def _key(self, key: str) -> tuple[tuple[int, ...], str]:
        if key not in self.shapes:
            raise WeightsError(
                f"{self.directory} has no tensor {key}; it is not a checkpoint of a GPT model"
            )
        shape, dtype = self.shapes[key]
        if dtype not in DTYPE_BYTES:
            raise WeightsError(
                f"{self.directory}: {key} has dtype {dtype}; supported are {', '.join(DTYPE_BYTES)}"
            )
        return shape, dtype

    def _chunk(self, key: str, dtype: str, chunk: DistChunk, layer: int | None) -> Chunk:
        """The part of a chunk that belongs to `layer`, as a rectangle of that layer's matrix."""
        file, offsets, sizes = self.directory / chunk.file, chunk.offsets, chunk.sizes
        archive = TorchFile(file, chunk.begin, chunk.length)
        if not isinstance(archive.object, PickledTensor) or archive.object.dtype != dtype:
            raise WeightsError(f"{file}: the chunk of {key} at {offsets} is not a {dtype} tensor")
        stored = archive.stored(key, archive.object)
        if prod(stored.shape) != prod(sizes):
            raise WeightsError(
                f"{file}: the chunk of {key} at {offsets} has the shape {stored.shape}, not {sizes}"
            )
        begin = stored.chunks[0].offset
        if layer is not None:
            begin += (layer - offsets[0]) * prod(sizes[1:]) * DTYPE_BYTES[dtype]
            offsets, sizes = offsets[1:], sizes[1:]
        column, columns = (offsets[1], sizes[1]) if len(sizes) > 1 else (0, 1)
        return Chunk(file, begin, offsets[0], column, sizes[0], columns)


class DistChunk(NamedTuple):
    """A chunk as `.metadata` has it."""

    offsets: tuple[int, ...]
    """Its first element in the global tensor."""
    sizes: tuple[int, ...]
    """Its shape."""
    file: str
    """Name of its file."""
    begin: int
    """First byte of its archive there."""
    length: int
    """Bytes of the archive."""


@dataclass(frozen=True)
class DistMetadata:
    """What `.metadata` says."""

    shapes: dict[str, tuple[tuple[int, ...], str]]
    """Key of a tensor -> its global shape and dtype."""
    chunks: dict[str, list[DistChunk]]
    """Key of a tensor -> its chunks. One without data is left to the tiling's check."""
    objects: dict[str, tuple[str, int, int]]
    """Key of an object -> its file, and first byte and length of its archive there."""


def read_metadata(directory: Path) -> DistMetadata:
    """Reads `.metadata`.

    Raises:
        WeightsError: missing, corrupt or hostile.
    """
    file = directory / METADATA
    try:
        if file.stat().st_size > LARGEST_PICKLE:
            raise WeightsError(
                f"{file} has {file.stat().st_size:,} bytes; no checkpoint needs that many"
            )
        metadata = load_pickle(file.read_bytes(), file)
    except OSError as error:
        raise WeightsError(
            f"{file} cannot be read ({error.strerror}); it is not a torch_dist checkpoint"
        ) from error
    try:
        ranges: dict[Any, tuple[str, int, int]] = {}
        objects: dict[str, tuple[str, int, int]] = {}
        for index, info in metadata.storage_data.items():
            place = (_file_name(info.relative_path), int(info.offset), int(info.length))
            if getattr(index, "offset", None) is None:
                objects[str(index.fqn)] = place
            else:
                ranges[index.fqn, _numbers(index.offset)] = place
        tensors = {
            str(key): t for key, t in metadata.state_dict_metadata.items() if hasattr(t, "chunks")
        }
        shapes = {key: (_numbers(t.size), str(t.properties.state[0])) for key, t in tensors.items()}
        chunks = {
            key: [
                DistChunk(_numbers(c.offsets), _numbers(c.sizes), *ranges[key, _numbers(c.offsets)])
                for c in tensor.chunks
                if (key, _numbers(c.offsets)) in ranges
            ]
            for key, tensor in tensors.items()
        }
        if any(
            not len(c.offsets) == len(c.sizes) == len(shapes[key][0])
            for key in chunks
            for c in chunks[key]
        ):
            raise ValueError("a chunk has other dimensions than its tensor")
        return DistMetadata(shapes, chunks, objects)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(
            f"{file} is not the metadata of a torch_dist checkpoint ({error!r})"
        ) from error


def common_state(checkpoint: Path, metadata: DistMetadata) -> dict[str, Any]:
    """What all ranks share: arguments, iteration. megatron-core 0.19 may have it in the shards.

    Raises:
        WeightsError: it is corrupt or hostile.
    """
    file = checkpoint / COMMON
    place = metadata.objects.get("common_state/shard_0_1")
    if file.is_file():
        state = TorchFile(file).object
    elif place is not None:
        state = TorchFile(checkpoint / place[0], *place[1:]).object
    else:
        return {}
    if isinstance(state, list) and len(state) == 1:
        (state,) = state
    return state if isinstance(state, dict) else {}


def _file_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
        raise WeightsError(
            f"the metadata name the file {name!r}, which is not one of the checkpoint"
        )
    return name


def plan_torch_dist(
    weights: Weights, architecture: Architecture, *, dtype: str | None, tp_chunks: int, prefix: str
) -> Output:
    """The files of a torch_dist checkpoint with these weights.

    Args:
        weights: where they come from.
        architecture: the model.
        dtype: key of DTYPE_BYTES; None keeps the source's.
        tp_chunks: chunks a tensor that tensor parallelism splits is cut into. megatron-core reads
            whole chunks, so a rank of TP n reads n times its part of a tensor in one chunk.
        prefix: directory of the checkpoint within the output, with its slash.

    Raises:
        WeightsError: a tensor is missing or wrong, or tp_chunks does not divide the model.
    """
    _check_chunks(architecture, tp_chunks)
    writer = _Writer(prefix)
    by_key: dict[str, list[Entry]] = {}
    for entry in entries(architecture):
        by_key.setdefault(entry.key, []).append(entry)
    for layers in by_key.values():
        parts = [
            (entry, ranges, columns)
            for entry in layers
            for ranges, columns in _cuts(entry, tp_chunks)
        ]
        pieces = [
            weights.megatron_piece(entry, ranges, columns) for entry, ranges, columns in parts
        ]
        chosen = dtype or widest([piece.dtype for piece in pieces])
        for (entry, ranges, columns), piece in zip(parts, pieces, strict=True):
            writer.add(entry, len(layers), ranges[0][0], columns[0], piece.cast(chosen))
    for i in range(architecture.num_layers):
        for module in EXTRA_STATE:
            name = f"decoder.layers.{module}._extra_state"
            writer.add_object(f"{name}/shard_{i}_{architecture.num_layers}", [None])
    writer.finish(_common_state(architecture))
    return writer.output


class _Writer:
    """Places archives one after another in files of a few GB, and keeps their metadata."""

    def __init__(self, prefix: str) -> None:
        self.output, self.prefix = Output(), prefix
        self._layouts: dict[tuple[str, tuple[int, ...]], Layout] = {}
        self._tensors: dict[
            str, tuple[str, tuple[int, ...], list[tuple[tuple[int, ...], tuple[int, ...]]]]
        ] = {}
        self._objects: list[str] = []
        self._ranges: list[tuple[str, tuple[int, ...] | None, int, str, int, int]] = []
        self._file, self._at = -1, _FILE_BYTES

    def add(self, entry: Entry, layers: int, row: int, column: int, piece: Piece) -> None:
        """A chunk of a parameter whose first element is (row, column)."""
        stacked = entry.layer is not None
        sizes = (1, *piece.shape) if stacked else piece.shape
        key = (piece.dtype, sizes)
        if key not in self._layouts:
            self._layouts[key] = _tensor_layout(*key)
        archive = self._layouts[key]
        file, begin = self._place(archive)
        (slot,) = archive.slots
        crc_offsets = tuple(begin + offset for offset in slot.crc_offsets)
        self.output.targets.append(Target(file, begin + slot.offset, piece, crc_offsets))
        inner = (row, column)[: len(piece.shape)]
        offsets = (entry.layer, *inner) if entry.layer is not None else inner
        shape = (layers, *entry.shape) if stacked else entry.shape
        _, _, chunks = self._tensors.setdefault(entry.key, (piece.dtype, shape, []))
        self._ranges.append((entry.key, offsets, len(chunks), file, begin, archive.size))
        chunks.append((offsets, sizes))

    def add_object(self, key: str, value: Any) -> None:
        """A sharded object: a torch.save archive as it is."""
        import torch

        stream = io.BytesIO()
        torch.save(value, stream)
        data = stream.getvalue()
        file, begin = self._place(Layout(len(data), ((0, data),), ()))
        self._objects.append(key)
        self._ranges.append((key, None, 0, file, begin, len(data)))

    def finish(self, common: dict[str, Any]) -> None:
        """Adds the metadata. The common state stands twice: 0.16 reads the file, 0.19 either."""
        import torch

        self.add_object("common_state/shard_0_1", [common])
        stream = io.BytesIO()
        torch.save(common, stream)
        self.output.add_file(self.prefix + COMMON, stream.getvalue())
        self.output.add_file(self.prefix + CONFIG, json.dumps(_CONFIG).encode())
        self.output.add_file(self.prefix + METADATA, self._metadata())

    def _place(self, archive: Layout) -> tuple[str, int]:
        if self._at + archive.size > _FILE_BYTES:
            self._file, self._at = self._file + 1, 0
        file, begin = f"{self.prefix}__0_{self._file}.distcp", self._at
        self.output.literals += [(file, begin + offset, data) for offset, data in archive.literals]
        self._at += archive.size
        self.output.sizes[file] = self._at
        return file, begin

    def _metadata(self) -> bytes:
        import torch
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import (
            BytesStorageMetadata,
            ChunkStorageMetadata,
            Metadata,
            MetadataIndex,
            TensorProperties,
            TensorStorageMetadata,
        )

        tensors: dict[str, Any] = {
            key: TensorStorageMetadata(
                TensorProperties(dtype=torch_dtype(dtype)),
                torch.Size(shape),
                [
                    ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                    for offsets, sizes in chunks
                ],
            )
            for key, (dtype, shape, chunks) in self._tensors.items()
        }
        objects = {key: BytesStorageMetadata() for key in self._objects}
        storage = {
            MetadataIndex(key, offsets, index if offsets is not None else None): _StorageInfo(
                file.removeprefix(self.prefix), begin, length
            )
            for key, offsets, index, file, begin, length in self._ranges
        }
        return pickle.dumps(Metadata(tensors | objects, planner_data={}, storage_data=storage))


def _tensor_layout(dtype: str, shape: tuple[int, ...]) -> Layout:
    import torch

    return layout(torch.empty(shape, dtype=torch_dtype(dtype)))


def _cuts(entry: Entry, parts: int) -> Iterator[tuple[list[tuple[int, int]], tuple[int, int]]]:
    """The chunks of a parameter: (row range, column range).

    A vocabulary keeps its uneven rows in the last one.
    """
    rows, columns = entry.shape[0], (0, entry.columns)
    if entry.kind == "replicated" or parts == 1:
        yield [(0, rows)], columns
    elif entry.kind == "columns":
        width = entry.columns // parts
        yield from (([(0, rows)], (i * width, (i + 1) * width)) for i in range(parts))
    else:
        cuts = 2 * parts if entry.kind == "gate_up" else parts
        height = -(-rows // cuts)
        yield from (([(i, min(i + height, rows))], columns) for i in range(0, rows, height))


def _check_chunks(architecture: Architecture, parts: int) -> None:
    sizes = {
        "num_key_value_heads": architecture.num_kv_heads,
        "intermediate_size": architecture.ffn_size,
    }
    for name, size in sizes.items():
        if parts < 1 or size % parts:
            raise WeightsError(f"--tp-chunks {parts} does not divide the model's {name} {size}")


def _spellings(entry: Entry) -> Iterator[str]:
    """Keys under which a parameter may be saved: all layers in one, or each by itself.

    The norms' two names.
    """
    yield entry.key
    if entry.layer is not None:
        rest = entry.key.removeprefix("decoder.layers.")
        yield f"decoder.layers.{LOCAL_NAMES.get(rest, rest)}"
        yield from entry.names


def _common_state(architecture: Architecture) -> dict[str, Any]:
    """What Megatron-LM's loader and its --use-checkpoint-args read."""
    return {
        "args": megatron_args(architecture),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {},
    }


def _numbers(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{numbers} are not sizes")
    return numbers
