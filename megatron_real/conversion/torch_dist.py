"""Megatron's torch_dist checkpoints: reading where each weight's bytes lie, and laying one out.

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
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from megatron_real.conversion.arguments import megatron_args
from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.containers import (
    LARGEST_PICKLE,
    BlankArchive,
    PickledTensor,
    TorchFile,
    blank_archive,
    load_pickle,
)
from megatron_real.weights.mapping import (
    EMBEDDING,
    LOCAL_NAMES,
    OUTPUT,
    Entry,
    Rectangle,
    Weights,
    entries,
)
from megatron_real.weights.stored import (
    DTYPE_BYTES,
    Extent,
    Piece,
    StoredTensor,
    torch_dtype,
    widest,
)
from megatron_real.weights.transfer import Output, Target

METADATA = ".metadata"
CONFIG = "metadata.json"
COMMON = "common.pt"
_CONFIG = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# Keys of a checkpoint with an optimizer that are none of the model's.
OPTIMIZER_PREFIXES = ("optimizer.", "chained_")
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
# An archive that would make a file larger begins the next one.
_FILE_BYTES = 4 * 2**30


class TorchDistWeights:
    """The weights of a torch_dist checkpoint. Only `.metadata` is read until a tensor is asked for.

    Raises:
        WeightsError: not such a checkpoint, or a corrupt or hostile one.
    """

    def __init__(self, directory: Path, architecture: Architecture) -> None:
        self.directory = directory
        self.architecture = architecture
        metadata = read_metadata(directory)
        self.shapes = metadata.shapes
        """Key of a tensor -> its global shape and dtype."""
        self._chunks = metadata.chunks
        self.arguments = common_state(directory, metadata).get("args")
        """Megatron-LM's arguments that the checkpoint was trained with; None where it has none."""

    @property
    def dtype(self) -> str:
        """The embedding's dtype, which stands for all matrices."""
        _, dtype = self._shape_and_dtype(EMBEDDING)
        return dtype

    @property
    def unmapped(self) -> list[str]:
        """Keys of tensors that no HF tensor stands for; the optimizer's are not listed."""
        # A tied model's checkpoint may have the output layer, which `copies` compares.
        known = {OUTPUT}
        for entry in entries(self.architecture):
            known.update(_spellings(entry))
        return sorted(
            key
            for key in self.shapes
            if key not in known and not key.startswith(OPTIMIZER_PREFIXES)
        )

    def tensor(self, entry: Entry) -> StoredTensor:
        """Returns where a parameter lies, of one layer, without the vocabulary's padding.

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
        shape, dtype = self._shape_and_dtype(key)

        # The layer whose part of a stacked tensor is meant; None where each is by itself.
        layer = None
        if "layers." in key and f".{entry.layer}." not in key:
            layer = entry.layer
        expected = entry.shape
        if layer is not None:
            expected = (self.architecture.num_layers, *entry.shape)
        fits = shape == expected
        if entry.kind == "vocab":  # padded to a multiple that the checkpoint's layout asked for
            fits = shape[1:] == expected[1:] and shape[0] >= expected[0]
        if not fits:
            raise WeightsError(
                f"{self.directory}: {key} is {list(shape)} {dtype} where the model's config.json "
                f"asks for {list(expected)}; they do not belong together"
            )

        # Of a stacked tensor only the chunks that hold the layer.
        extents = []
        for chunk in self._chunks.get(key, []):
            first = chunk.offsets[0]
            if layer is None or first <= layer < first + chunk.sizes[0]:
                extents.append(self._extent(key, dtype, chunk, layer))
        if layer is not None:
            shape = shape[1:]
        tensor = StoredTensor(f"{key}[{entry.layer}]", dtype, shape, tuple(extents))
        # Each element once, or an export would have holes.
        tensor.check_tiling()
        return tensor

    def copies(self) -> Iterator[tuple[str, Piece, Piece]]:
        """Yields (name, tensor, the one it must be a copy of) of what is not read as a weight."""
        if not self.architecture.tied or OUTPUT not in self.shapes:
            return

        embedding = next(entries(self.architecture))
        # The output layer has no entry in a tied model: it is the embedding's under another key.
        output = dataclasses.replace(embedding, key=OUTPUT)
        stored_output = self.tensor(output)
        stored_embedding = self.tensor(embedding)
        yield (
            OUTPUT,
            output.to_hf(stored_output, 0, stored_output.dtype),
            embedding.to_hf(stored_embedding, 0, stored_embedding.dtype),
        )

    def megatron_piece(self, entry: Entry, rectangle: Rectangle) -> Piece:
        """Returns a rectangle of a parameter, in the checkpoint's dtype."""
        tensor = self.tensor(entry)
        return entry.from_megatron(tensor, tensor.dtype, rectangle)

    def _shape_and_dtype(self, key: str) -> tuple[tuple[int, ...], str]:
        """Returns a tensor's global shape and its dtype, which must be one that weights have."""
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

    def _extent(self, key: str, dtype: str, chunk: DistChunk, layer: int | None) -> Extent:
        """Returns a chunk, or its part that belongs to `layer`, as a rectangle of a matrix."""
        file = self.directory / chunk.file
        offsets = chunk.offsets
        sizes = chunk.sizes
        archive = TorchFile(file, chunk.begin, chunk.length)
        if not isinstance(archive.object, PickledTensor) or archive.object.dtype != dtype:
            raise WeightsError(f"{file}: the chunk of {key} at {offsets} is not a {dtype} tensor")

        stored = archive.stored(key, archive.object)
        if prod(stored.shape) != prod(sizes):
            raise WeightsError(
                f"{file}: the chunk of {key} at {offsets} has the shape {stored.shape}, not {sizes}"
            )

        begin = stored.extents[0].offset
        if layer is not None:
            # A chunk may hold several layers, one after the other.
            begin += (layer - offsets[0]) * prod(sizes[1:]) * DTYPE_BYTES[dtype]
            offsets = offsets[1:]
            sizes = sizes[1:]
        if len(sizes) == 1:
            return Extent(file, begin, row=offsets[0], column=0, rows=sizes[0], columns=1)

        return Extent(file, begin, offsets[0], offsets[1], sizes[0], sizes[1])


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
    """Returns what a checkpoint's `.metadata` says.

    Raises:
        WeightsError: missing, corrupt or hostile.
    """
    file = directory / METADATA
    try:
        # Before it is read into memory.
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
        return _interpreted(metadata)
    except WeightsError:
        raise
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise WeightsError(
            f"{file} is not the metadata of a torch_dist checkpoint ({error!r})"
        ) from error


def _interpreted(metadata: Any) -> DistMetadata:
    """Returns what inert records of torch's classes say; raises whatever comes of damaged ones."""
    ranges: dict[Any, tuple[str, int, int]] = {}
    objects: dict[str, tuple[str, int, int]] = {}
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        # A name within the directory, of no other file than the checkpoint's.
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise WeightsError(
                f"the metadata name the file {name!r}, which is not one of the checkpoint"
            )

        place = (name, int(info.offset), int(info.length))
        # Tensors have an offset for each of their chunks, objects have none.
        if getattr(index, "offset", None) is None:
            objects[str(index.fqn)] = place
        else:
            ranges[index.fqn, _numbers(index.offset)] = place

    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    chunks: dict[str, list[DistChunk]] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        if not hasattr(tensor, "chunks"):
            continue  # an object

        key = str(name)
        shape = _numbers(tensor.size)
        # torch pickles TensorProperties as a tuple that begins with the dtype.
        shapes[key] = (shape, str(tensor.properties.state[0]))
        chunks[key] = []
        for chunk in tensor.chunks:
            offsets = _numbers(chunk.offsets)
            # A chunk without data: check_tiling finds the hole.
            if (key, offsets) not in ranges:
                continue
            sizes = _numbers(chunk.sizes)
            if not len(offsets) == len(sizes) == len(shape):
                raise ValueError("a chunk has other dimensions than its tensor")
            chunks[key].append(DistChunk(offsets, sizes, *ranges[key, offsets]))

    return DistMetadata(shapes, chunks, objects)


def common_state(checkpoint: Path, metadata: DistMetadata) -> dict[str, Any]:
    """Returns what all ranks share, such as the arguments and the iteration; {} without any.

    megatron-core 0.16 has it in a file of its own, 0.19 may have it in the shards.

    Raises:
        WeightsError: it is corrupt or hostile.
    """
    file = checkpoint / COMMON
    # The keys of sharded objects end in shard_INDEX_COUNT.
    place = metadata.objects.get("common_state/shard_0_1")
    if file.is_file():
        state = TorchFile(file).object
    elif place is not None:
        file_name, begin, length = place
        state = TorchFile(checkpoint / file_name, begin, length).object
    else:
        return {}

    # In the shards it stands in a list of one.
    if isinstance(state, list) and len(state) == 1:
        (state,) = state
    if not isinstance(state, dict):
        return {}

    return state


def plan_torch_dist(
    weights: Weights, architecture: Architecture, *, dtype: str | None, tp_chunks: int, prefix: str
) -> Output:
    """Returns the plan of a torch_dist checkpoint.

    Args:
        weights: where its weights come from.
        architecture: the model.
        dtype: key of DTYPE_BYTES; None keeps the source's.
        tp_chunks: chunks a tensor that tensor parallelism splits is cut into. megatron-core reads
            whole chunks, so a rank of TP n reads n times its part of a tensor in one chunk.
        prefix: directory of the checkpoint within the output, with its slash.

    Raises:
        WeightsError: a tensor is missing or wrong, or tp_chunks does not divide the model.
    """
    sizes = {
        "num_key_value_heads": architecture.num_kv_heads,
        "intermediate_size": architecture.ffn_size,
    }
    for name, size in sizes.items():
        if tp_chunks < 1 or size % tp_chunks:
            raise WeightsError(f"--tp-chunks {tp_chunks} does not divide the model's {name} {size}")

    writer = _Writer(prefix)
    # All layers' entries of one key are one tensor of the checkpoint, in one dtype.
    entries_of_key: dict[str, list[Entry]] = {}
    for entry in entries(architecture):
        entries_of_key.setdefault(entry.key, []).append(entry)
    for layers in entries_of_key.values():
        chunks = []
        for entry in layers:
            for rectangle in _cuts(entry, tp_chunks):
                piece = weights.megatron_piece(entry, rectangle)
                chunks.append((entry, rectangle, piece))

        # A source may keep norms in fp32 and matrices in bf16, but a tensor of the format has one
        # dtype.
        tensor_dtype = dtype or widest([piece.dtype for _, _, piece in chunks])
        for entry, rectangle, piece in chunks:
            writer.add(entry, len(layers), rectangle, piece.cast(tensor_dtype))

    for i in range(architecture.num_layers):
        for module in EXTRA_STATE:
            # megatron-core keeps an object in a list of one; None is the state of a
            # module without fp8.
            name = f"decoder.layers.{module}._extra_state"
            writer.add_object(f"{name}/shard_{i}_{architecture.num_layers}", [None])

    # What Megatron-LM's loader and its --use-checkpoint-args read.
    common = {
        "args": megatron_args(architecture),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {},
    }
    writer.finish(common)
    return writer.output


class _TensorRecord(NamedTuple):
    """A tensor as the writer collects it for `.metadata`."""

    dtype: str
    """Key of DTYPE_BYTES."""
    shape: tuple[int, ...]
    """Global shape."""
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]]
    """(offsets, sizes) of each chunk."""


class _RangeRecord(NamedTuple):
    """Where an archive lies, as the writer collects it for `.metadata`."""

    key: str
    """Of the tensor or object."""
    offsets: tuple[int, ...] | None
    """Of the chunk; None of an object."""
    number: int | None
    """Number of the chunk; None of an object."""
    file: str
    """Relative path."""
    begin: int
    """First byte there."""
    length: int
    """Bytes of the archive."""


class _Writer:
    """Places archives one after another in files of a few GB, and keeps their metadata."""

    def __init__(self, prefix: str) -> None:
        self.output = Output()
        self.prefix = prefix
        # Equal shapes have equal archives but for the data: most layers share theirs.
        self._blanks: dict[tuple[str, tuple[int, ...]], BlankArchive] = {}
        self._tensors: dict[str, _TensorRecord] = {}
        self._objects: list[str] = []
        self._ranges: list[_RangeRecord] = []
        # A full file before the first one, so that the first archive begins it.
        self._file_number = -1
        self._file_bytes = _FILE_BYTES

    def add(self, entry: Entry, layers: int, rectangle: Rectangle, piece: Piece) -> None:
        """Adds a chunk of a parameter.

        Args:
            entry: the parameter, of one layer.
            layers: how many layers the checkpoint's tensor has.
            rectangle: the chunk's place in the layer's parameter; its rows are consecutive.
            piece: the chunk.
        """
        import torch

        sizes = piece.shape
        first_row, _ = rectangle.rows[0]
        first_column, _ = rectangle.columns
        # A vector has no columns.
        offsets = (first_row, first_column)[: len(piece.shape)]
        shape = entry.shape
        if entry.layer is not None:
            # The tensor of the checkpoint has the layers as its first dimension.
            sizes = (1, *sizes)
            offsets = (entry.layer, *offsets)
            shape = (layers, *shape)

        key = (piece.dtype, sizes)
        if key not in self._blanks:
            # torch.empty takes no memory that is not written to.
            self._blanks[key] = blank_archive(torch.empty(sizes, dtype=torch_dtype(piece.dtype)))
        archive = self._blanks[key]
        file, begin = self._place(archive)
        # An archive of one tensor has one storage.
        (slot,) = archive.slots
        crc_offsets = tuple(begin + offset for offset in slot.crc_offsets)
        self.output.targets.append(Target(file, begin + slot.offset, piece, crc_offsets))

        record = self._tensors.setdefault(entry.key, _TensorRecord(piece.dtype, shape, []))
        number = len(record.chunks)
        record.chunks.append((offsets, sizes))
        self._ranges.append(_RangeRecord(entry.key, offsets, number, file, begin, archive.size))

    def add_object(self, key: str, value: Any) -> None:
        """Adds a sharded object: a torch.save archive as it is."""
        import torch

        stream = io.BytesIO()
        torch.save(value, stream)
        data = stream.getvalue()
        file, begin = self._place(BlankArchive(len(data), ((0, data),), ()))
        self._objects.append(key)
        self._ranges.append(_RangeRecord(key, None, None, file, begin, len(data)))

    def finish(self, common: dict[str, Any]) -> None:
        """Adds the metadata. The common state stands twice: 0.16 reads the file, 0.19 either."""
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

        self.add_object("common_state/shard_0_1", [common])
        stream = io.BytesIO()
        torch.save(common, stream)
        self.output.add_file(self.prefix + COMMON, stream.getvalue())
        self.output.add_file(self.prefix + CONFIG, json.dumps(_CONFIG).encode())

        # The pickle that torch's FileSystemReader expects.
        state: dict[str, Any] = {}
        for key, tensor in self._tensors.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                for offsets, sizes in tensor.chunks
            ]
            properties = TensorProperties(dtype=torch_dtype(tensor.dtype))
            state[key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for key in self._objects:
            state[key] = BytesStorageMetadata()

        storage = {}
        for archive in self._ranges:
            index = MetadataIndex(archive.key, archive.offsets, archive.number)
            file = archive.file.removeprefix(self.prefix)
            storage[index] = _StorageInfo(file, archive.begin, archive.length)

        metadata = pickle.dumps(Metadata(state, planner_data={}, storage_data=storage))
        self.output.add_file(self.prefix + METADATA, metadata)

    def _place(self, archive: BlankArchive) -> tuple[str, int]:
        """Returns the file and the first byte of an archive, after adding its literals there."""
        if self._file_bytes + archive.size > _FILE_BYTES:
            self._file_number += 1
            self._file_bytes = 0
        # torch's names, __RANK_NUMBER.distcp: here a single process has written all of them.
        file = f"{self.prefix}__0_{self._file_number}.distcp"
        begin = self._file_bytes
        for offset, data in archive.literals:
            self.output.literals.append((file, begin + offset, data))
        self._file_bytes += archive.size
        self.output.sizes[file] = self._file_bytes
        return file, begin


def _cuts(entry: Entry, parts: int) -> Iterator[Rectangle]:
    """Yields the chunks of a parameter.

    A vocabulary keeps its uneven rows in the last one.
    """
    rows = entry.shape[0]
    all_columns = (0, entry.columns)
    if entry.over is None or parts == 1:
        yield Rectangle(((0, rows),), all_columns)
    elif entry.kind == "columns":
        width = entry.columns // parts
        for i in range(parts):
            yield Rectangle(((0, rows),), (i * width, (i + 1) * width))
    else:
        num_cuts = parts
        if entry.kind == "gate_up":
            num_cuts = 2 * parts
        # Gate and up each in `parts` pieces, so that no chunk has rows of both.
        height = -(-rows // num_cuts)
        for first in range(0, rows, height):
            yield Rectangle(((first, min(first + height, rows)),), all_columns)


def _spellings(entry: Entry) -> Iterator[str]:
    """Yields the keys under which a parameter may be saved.

    All layers may be in one tensor or each by itself, and the norms have two names.
    """
    yield entry.key
    if entry.layer is not None:
        name = entry.key.removeprefix("decoder.layers.")
        yield f"decoder.layers.{LOCAL_NAMES.get(name, name)}"
        yield from entry.names


def _numbers(values: Any) -> tuple[int, ...]:
    """Returns sizes or offsets of a pickle, checked to be whole numbers from 0."""
    numbers = tuple(values)
    if any(type(n) is not int or n < 0 for n in numbers):
        raise ValueError(f"{numbers} are not sizes")
    return numbers
