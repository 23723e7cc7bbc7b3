"""Directories of HF weights: where each tensor's bytes lie, and the files of a directory to write.

Read are safetensors, one or many, with or without an index, hub snapshots whose files are links, and
pytorch_model*.bin. Headers and indices are checked before they are believed: they may come from anywhere.
"""

from __future__ import annotations

import json
import os
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from megatron_real.weights import WeightsError
from megatron_real.weights.containers import PickledTensor, TorchFile
from megatron_real.weights.mapping import HF_EMBEDDING, Entry
from megatron_real.weights.stored import (
    DTYPE_BYTES,
    TORCH_NAMES,
    Chunk,
    OpenFiles,
    Piece,
    StoredTensor,
    check_stored,
    stored_dtype,
    torch_dtype,
    whole,
    widest,
)
from megatron_real.weights.transfer import MANIFEST

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN_SINGLE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# What makes a directory complete for transformers and vLLM besides the weights.
_SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
_SIDE_LIMIT = 2**28
# safetensors' own limit.
_LARGEST_HEADER = 100_000_000
# Dtypes of safetensors that weights do not have but other tensors of a file may.
_OTHER_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2}
_OTHER_BYTES |= {"I32": 4, "U32": 4, "I64": 8, "U64": 8, "C64": 8}


class HfWeights:
    """The tensors of an HF directory. Only headers are read until a tensor is asked for.

    Raises:
        WeightsError: a file is missing, truncated, corrupt or hostile; names it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.tensors: dict[str, StoredTensor] = {}
        """Name -> where it lies, in the files' order."""
        for file in self.files:
            found = _bin_tensors(file) if file.suffix == ".bin" else _safetensors(file)
            for name, tensor in found.items():
                if name in self.tensors:
                    raise WeightsError(f"{name} is in two files of {self.directory}; remove the one that is not needed")
                self.tensors[name] = tensor
        missing = sorted(name for name in self._index if name not in self.tensors)
        if missing:
            raise WeightsError(f"the index of {self.directory} names {missing[0]}, which none of its files has")
        self._open = OpenFiles()

    @property
    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.tensors)

    @property
    def _index(self) -> dict[str, str]:
        """Name -> file, as the index says; empty without an index."""
        for name in (INDEX, BIN_INDEX):
            file = self.directory / name
            if file.is_file() and not (name == BIN_INDEX and (self.directory / SINGLE).is_file()):
                return _read_index(file)
        return {}

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        index = self._index
        names = sorted(set(index.values()))
        if not index:
            single = [name for name in (SINGLE, BIN_SINGLE) if (self.directory / name).exists()]
            names = single[:1] or sorted(file.name for file in self.directory.glob("*.safetensors"))
        if not names:
            raise WeightsError(
                f"{str(self.directory)!r} has no {SINGLE}, {INDEX} or {BIN_SINGLE}; give a directory of HF weights"
            )
        for name in names:
            _check_regular(self.directory / name)
        return [self.directory / name for name in names]

    @property
    def dtype(self) -> str:
        """The embedding's dtype, which stands for all matrices."""
        return self.tensor(HF_EMBEDDING).dtype

    def tensor(self, name: str) -> StoredTensor:
        """Where `name` lies.

        Raises:
            WeightsError: it is not there.
        """
        if name not in self.tensors:
            raise WeightsError(f"{str(self.directory)!r} has no tensor {name}; the download may be incomplete")
        return self.tensors[name]

    def megatron_piece(self, entry: Entry, ranges: Sequence[tuple[int, int]], columns: tuple[int, int]) -> Piece:
        """The rectangle `ranges` x `columns` of a Megatron parameter, in the widest dtype of its HF tensors."""
        parts = [self.tensor(name) for name in entry.parts]
        for part, shape in zip(parts, entry.shapes, strict=True):
            check_stored(part, shape)
        return entry.from_hf(parts, widest([part.dtype for part in parts]), ranges, columns)

    def read(self, name: str) -> Any:
        """The tensor `name` as a torch.Tensor, in the file's dtype, on the CPU."""
        import torch

        stored = self.tensor(name)
        tensor = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
        if tensor.numel():
            data = whole(stored).read(self._open)
            tensor.copy_(torch.frombuffer(data, dtype=tensor.dtype).reshape(stored.shape))
        return tensor


@dataclass(frozen=True)
class HfFile:
    """A safetensors file to write."""

    name: str
    """File name."""
    header: bytes
    """Length and JSON, as they stand at its beginning."""
    offsets: Mapping[str, int]
    """Tensor -> its first byte in the file."""
    size: int
    """Bytes of the whole file."""


def hf_files(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], *, max_shard_bytes: int = 5 * 10**9
) -> tuple[list[HfFile], bytes | None]:
    """The files for `tensors` (name -> dtype, shape; in this order) and the index, None for a single file.

    Names, headers and order are those that transformers and safetensors write.
    """
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    held = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * DTYPE_BYTES[dtype]
        if shards[-1] and held + size > max_shard_bytes:
            shards.append({})
            held = 0
        shards[-1][name] = (dtype, shape)
        held += size
    if len(shards) == 1:
        return [_file(SINGLE, shards[0])], None
    files = [_file(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard) for i, shard in enumerate(shards, 1)]
    total = sum(prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in tensors.values())
    weight_map = {name: file.name for file in files for name in file.offsets}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return files, json.dumps(index, indent=2).encode() + b"\n"


def _file(name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> HfFile:
    ordered = sorted(tensors, key=lambda t: (-DTYPE_BYTES[tensors[t][0]], t))  # safetensors': alignment, then name
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in ordered:
        dtype, shape = tensors[tensor]
        size = prod(shape) * DTYPE_BYTES[dtype]
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return file_of_header(name, struct.pack("<Q", len(text)) + text)


def file_of_header(name: str, header: bytes) -> HfFile:
    """The file that begins with `header`."""
    entries = parse_header(header, Path(name))
    begin = len(header)
    offsets = {tensor: begin + entry["data_offsets"][0] for tensor, entry in entries.items()}
    size = begin + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    return HfFile(name, header, offsets, size)


def read_header(file: Path) -> bytes:
    """A safetensors file's header with its length, checked to be of a sane size.

    Raises:
        WeightsError: it is not, or the file is too short for it.
    """
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise WeightsError(
                f"{file} is truncated or corrupt: {size} bytes with a header of {length}; download it again"
            )
        return start + stream.read(length)


def parse_header(header: bytes, file: Path) -> dict[str, dict[str, Any]]:
    """Name -> {dtype, shape, data_offsets} of a header, checked: sizes agree and offsets tile the data from 0.

    Raises:
        WeightsError: they do not.
    """
    try:
        entries = json.loads(header[8:], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} has a header that is not JSON ({error}); download it again") from error
    if not isinstance(entries, dict) or header[8:9] != b"{":
        raise WeightsError(f"{file} has a header that is not a table of tensors; download it again")
    words = entries.pop("__metadata__", {})
    if not isinstance(words, dict) or not all(isinstance(word, str) for word in words.values()):
        raise WeightsError(f"{file} has a header whose metadata are not words; download it again")
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: _span(item[1], item[0], file)):
        begin, end = _span(entry, name, file)
        if begin != at:
            kind = "overlaps another" if begin < at else "leaves a hole before it"
            raise WeightsError(f"{file}: {name} at bytes {begin} to {end} {kind}; the header is corrupt")
        at = end
    return entries


def hf_side_files(directory: Path, *, dtype: str, index: bytes | None = None) -> dict[str, bytes]:
    """What makes an HF directory of weights in `dtype` complete: name -> bytes of config, tokenizer and `index`."""
    found = {} if index is None else {INDEX: index}
    for pattern in _SIDE_FILES:
        for file in sorted(directory.glob(pattern)):
            if file.name not in (INDEX, BIN_INDEX, MANIFEST) and _check_regular(file) <= _SIDE_LIMIT:
                found[file.name] = file.read_bytes()
    if "config.json" in found:
        found["config.json"] = _config_with_dtype(found["config.json"], stored_dtype(dtype))
    return found


def _config_with_dtype(config: bytes, dtype: str) -> bytes:
    """config.json naming `dtype`, in whichever spelling it has; verbatim where it already does."""
    values = json.loads(config)
    name = TORCH_NAMES[dtype]
    keys = [key for key in ("dtype", "torch_dtype") if key in values]
    if all(values[key] == name for key in keys):
        return config
    return json.dumps(values | dict.fromkeys(keys, name), indent=2).encode() + b"\n"


def _span(entry: Any, name: str, file: Path) -> tuple[int, int]:
    """data_offsets of a header's entry, after checking it by itself."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise WeightsError(f"{file}: {name} lacks dtype, shape or data_offsets; the header is corrupt")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bytes_each = {**DTYPE_BYTES, **_OTHER_BYTES}.get(dtype) if isinstance(dtype, str) else None
    if bytes_each is None:
        raise WeightsError(f"{file}: {name} has the dtype {dtype!r}, which does not exist")
    whole = (
        isinstance(shape, list)
        and isinstance(offsets, list)
        and len(shape) <= 8
        and len(offsets) == 2
        and all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *offsets))
    )
    if not whole:
        raise WeightsError(f"{file}: {name} has the shape {shape!r} and offsets {offsets!r}; the header is corrupt")
    begin, end = offsets
    if end - begin != prod(shape) * bytes_each:
        raise WeightsError(f"{file}: {name} of shape {shape} and dtype {dtype} does not fill bytes {begin} to {end}")
    return begin, end


def _safetensors(file: Path) -> dict[str, StoredTensor]:
    try:
        header = read_header(file)
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror})") from error
    entries = parse_header(header, file)
    begin, size = len(header), file.stat().st_size
    end = begin + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != size:
        raise WeightsError(f"{file} has {size} bytes where its header says {end}; it is truncated: download it again")
    found = {}
    for name, entry in entries.items():
        shape = tuple(entry["shape"])
        rows = shape[0] if shape else 1
        chunk = Chunk(file, begin + entry["data_offsets"][0], 0, 0, rows, prod(shape[1:]))
        found[name] = StoredTensor(name, entry["dtype"], shape, (chunk,))
    return found


def _bin_tensors(file: Path) -> dict[str, StoredTensor]:
    archive = TorchFile(file)
    if not isinstance(archive.object, dict):
        raise WeightsError(f"{file} holds no table of tensors; it is not a file of HF weights")
    return {
        str(name): archive.stored(str(name), tensor)
        for name, tensor in archive.object.items()
        if isinstance(tensor, PickledTensor)
    }


def _read_index(file: Path) -> dict[str, str]:
    _check_regular(file)
    try:
        weight_map = json.loads(file.read_bytes(), object_pairs_hook=_unique)["weight_map"]
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{file} is not an index of weights ({error!r}); download it again") from error
    for name, target in items:
        if not isinstance(target, str) or not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", target, re.ASCII):
            raise WeightsError(f"{file}: {name} lies in {target!r}, which is not a file name of weights")
    return dict(items)


def _check_regular(file: Path) -> int:
    """The file's size, after following links.

    Raises:
        WeightsError: missing, a loop of links, or no regular file.
    """
    try:
        status = file.stat()
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "a loop of links"
        raise WeightsError(f"{file} cannot be read ({reason}); the download may be incomplete") from error
    if not stat.S_ISREG(status.st_mode):
        raise WeightsError(f"{file} is not a regular file")
    return status.st_size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice in one table")
    return table
