"""Directories of HF weights: where each tensor's bytes lie, and the files of a directory to write.

Read are safetensors, one or many, with or without an index, hub snapshots whose files are links,
and pytorch_model*.bin. Headers and indices are checked before they are believed: they may come from
anywhere. `open_model` is how every command opens a model: what one refuses, all refuse, in the same
words.
"""

from __future__ import annotations

import dataclasses
import json
import logging
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
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.containers import TorchFile, tensors_of
from megatron_real.weights.mapping import HF_EMBEDDING, HF_OUTPUT, Entry, Rectangle, hf_shapes
from megatron_real.weights.stored import (
    DTYPE_BYTES,
    TORCH_NAMES,
    Extent,
    OpenFiles,
    Piece,
    StoredTensor,
    check_stored,
    same_bytes,
    stored_dtype,
    torch_dtype,
    whole,
    widest,
)
from megatron_real.weights.transfer import MANIFEST

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
BIN_SINGLE = "pytorch_model.bin"
BIN_INDEX = "pytorch_model.bin.index.json"
# What makes a directory complete for transformers and vLLM besides the weights, and its licence.
_SIDE_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
# A larger file of these names is data that lies beside a model, not a part of it.
_SIDE_LIMIT = 2**28
# safetensors' own limit.
_LARGEST_HEADER = 100_000_000
# Dtypes of safetensors that weights do not have but other tensors of a file may.
_OTHER_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "I32": 4,
    "U32": 4,
    "I64": 8,
    "U64": 8,
    "C64": 8,
}

logger = logging.getLogger(__name__)


class HfWeights:
    """The tensors of an HF directory. Only headers are read until a tensor is asked for.

    Raises:
        WeightsError: a file is missing, truncated, corrupt or hostile; names it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        index = weight_index(self.directory)
        self.files = _weight_files(self.directory, index)
        """The files that hold the weights."""
        self.tensors: dict[str, StoredTensor] = {}
        """Name -> where it lies, in the files' order."""
        for file in self.files:
            if file.suffix == ".bin":
                archive = TorchFile(file)
                if not isinstance(archive.object, dict):
                    raise WeightsError(
                        f"{file} holds no table of tensors; it is not a file of HF weights"
                    )
                pickled = tensors_of(archive.object, file)
                tensors = {name: archive.stored(name, tensor) for name, tensor in pickled.items()}
            else:
                tensors = _safetensors(file)

            for name, tensor in tensors.items():
                if name in self.tensors:
                    raise WeightsError(
                        f"{name} is in two files of {self.directory}; remove the one that is not "
                        f"needed"
                    )
                self.tensors[name] = tensor

        # The other way round is fine: a file may hold more than the index lists.
        missing = sorted(name for name in index if name not in self.tensors)
        if missing:
            raise WeightsError(
                f"the index of {self.directory} names {missing[0]}, which none of its files has"
            )

        self._open = OpenFiles()

    @property
    def names(self) -> list[str]:
        """All tensor names."""
        return list(self.tensors)

    @property
    def dtype(self) -> str:
        """The embedding's dtype, which stands for all matrices."""
        return self.tensor(HF_EMBEDDING).dtype

    def tensor(self, name: str) -> StoredTensor:
        """Returns where `name` lies.

        Raises:
            WeightsError: it is not there.
        """
        if name not in self.tensors:
            raise WeightsError(
                f"{str(self.directory)!r} has no tensor {name}; the download may be incomplete"
            )
        return self.tensors[name]

    def megatron_piece(self, entry: Entry, rectangle: Rectangle) -> Piece:
        """Returns a rectangle of a Megatron parameter.

        Its dtype is the widest of the HF tensors that it is made of.

        Raises:
            WeightsError: one of them is missing, or of another shape than the model's.
        """
        parts = [self.tensor(name) for name in entry.parts]
        for part, shape in zip(parts, entry.shapes, strict=True):
            check_stored(part, shape)
        dtype = widest([part.dtype for part in parts])
        return entry.from_hf(parts, dtype, rectangle)

    def read(self, name: str) -> Any:
        """Returns the tensor `name` as a torch.Tensor, in the file's dtype, on the CPU."""
        import torch

        stored = self.tensor(name)
        tensor = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype))
        # torch.frombuffer refuses an empty buffer.
        if tensor.numel():
            data = whole(stored).read(self._open)
            tensor.copy_(torch.frombuffer(data, dtype=tensor.dtype).reshape(stored.shape))
        return tensor


def open_model(directory: str | Path) -> tuple[Architecture, HfWeights]:
    """Opens an HF directory and judges config, weights and the files beside them together.

    Only headers are read, except of tensors that may be copies of others.

    Raises:
        WeightsError: a part is missing, corrupt or hostile, or the parts do not belong together.
    """
    directory = Path(directory)
    try:
        architecture = Architecture.read(directory)

        # transformers with peft would add the adapter to the weights, and we would not.
        adapter = directory / "adapter_config.json"
        if adapter.exists():
            raise WeightsError(
                f"{adapter} makes the directory an adapter, not a model; merge it into its base "
                f"model"
            )

        weights = HfWeights(directory)
        # Before the shapes: it may give a tied output layer its other name.
        check_names(weights, architecture)
        for name, shape in hf_shapes(architecture).items():
            check_stored(weights.tensor(name), shape)
        # For its refusals: an export would meet them only at the end of a run.
        side_files(directory)
    except OSError as error:
        raise WeightsError(
            f"{error.filename or directory} cannot be read ({error.strerror})"
        ) from error
    return architecture, weights


def has_weights(directory: Path) -> bool:
    """Whether an HF directory has files of weights, or an index that names some."""
    patterns = ("*.safetensors", INDEX, BIN_SINGLE, BIN_INDEX)
    return any(any(directory.glob(pattern)) for pattern in patterns)


def check_names(weights: HfWeights, architecture: Architecture) -> None:
    """Checks that the files have the model's tensors, and no other but copies of them.

    A tied model whose file kept only the output layer has its embedding there.

    Raises:
        WeightsError: a tensor is missing, has no place in the model, or differs from what it must
            be a copy of.
    """
    tensors = weights.tensors
    if architecture.tied and HF_EMBEDDING not in tensors and HF_OUTPUT in tensors:
        tensors[HF_EMBEDDING] = dataclasses.replace(tensors.pop(HF_OUTPUT), name=HF_EMBEDDING)

    shapes = hf_shapes(architecture)
    missing = [name for name in shapes if name not in tensors]
    if missing:
        raise WeightsError(
            f"{weights.directory} lacks {missing[0]} ({len(missing)} tensors in all); download it "
            f"again"
        )

    for name in tensors.keys() - shapes.keys():
        if name.endswith(".rotary_emb.inv_freq"):
            # A buffer that old Llama files carry. It must say what the rotary base says.
            stored = weights.tensor(name)
            expected = architecture.rope_frequencies
            check_stored(stored, (len(expected),))
            values = weights.read(name).tolist()
            # Rounded to bfloat16 they are off by 2^-9; another base is off by far more.
            if any(abs(a - b) > 2**-8 * b for a, b in zip(values, expected, strict=True)):
                raise WeightsError(
                    f"{weights.directory}: {name} is of another rotary embedding than "
                    f"config.json's (rope_theta {architecture.rope_theta:g}); they do not belong "
                    f"together"
                )
        elif name == HF_OUTPUT and architecture.tied:
            if not same_bytes(whole(tensors[name]), whole(tensors[HF_EMBEDDING])):
                raise WeightsError(
                    f"{weights.directory}: {name} differs from the embedding, but config.json "
                    f"ties them"
                )
        else:
            raise WeightsError(
                f"{weights.directory} has {name}, for which its config.json has no place"
            )


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
    """Returns the files of some tensors and their index.

    Names, headers and order are those that transformers and safetensors write.

    Args:
        tensors: name -> dtype and shape, in the order in which they fill the files.
        max_shard_bytes: largest sum of the tensors in one file.

    Returns:
        The files; and model.safetensors.index.json, None for a single file.
    """
    # Filled in order; a tensor larger than a shard has one of its own.
    shards: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    shard_bytes = 0
    for name, (dtype, shape) in tensors.items():
        num_bytes = prod(shape) * DTYPE_BYTES[dtype]
        if shards[-1] and shard_bytes + num_bytes > max_shard_bytes:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = (dtype, shape)
        shard_bytes += num_bytes

    if len(shards) == 1:
        return [_file(SINGLE, shards[0])], None

    files = []
    for i, shard in enumerate(shards, 1):
        files.append(_file(f"model-{i:05d}-of-{len(shards):05d}.safetensors", shard))
    return files, index_of(files)


def index_of(files: Sequence[HfFile]) -> bytes:
    """Returns model.safetensors.index.json of these files, as transformers writes it."""
    # Without the headers, as transformers counts.
    total = sum(file.size - len(file.header) for file in files)
    weight_map = {name: file.name for file in files for name in file.offsets}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"


def _file(name: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> HfFile:
    """Returns the file of that name with these tensors, name -> dtype and shape."""
    # safetensors' order: by alignment, then by name.
    ordered = sorted(tensors, key=lambda tensor: (-DTYPE_BYTES[tensors[tensor][0]], tensor))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in ordered:
        dtype, shape = tensors[tensor]
        end = begin + prod(shape) * DTYPE_BYTES[dtype]
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end

    text = json.dumps(header, separators=(",", ":")).encode()
    # The data begins at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return file_of_header(name, struct.pack("<Q", len(text)) + text)


def file_of_header(name: str, header: bytes) -> HfFile:
    """Returns the file of that name that begins with `header`."""
    entries = parse_header(header, Path(name))
    data_begin = len(header)
    offsets = {}
    size = data_begin
    for tensor, entry in entries.items():
        begin, end = entry["data_offsets"]
        offsets[tensor] = data_begin + begin
        size = max(size, data_begin + end)
    return HfFile(name, header, offsets, size)


def read_header(file: Path) -> bytes:
    """Returns a safetensors file's header with its length, checked to be of a sane size.

    Raises:
        WeightsError: it is not, or the file is too short for it.
    """
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        start = stream.read(8)
        # Fewer than 8 bytes are no length: then 0, which is refused.
        length = 0
        if len(start) == 8:
            (length,) = struct.unpack("<Q", start)
        if not 2 <= length <= min(_LARGEST_HEADER, size - 8):
            raise WeightsError(
                f"{file} is truncated or corrupt: {size} bytes with a header of {length}; download "
                f"it again"
            )

        return start + stream.read(length)


def parse_header(header: bytes, file: Path) -> dict[str, dict[str, Any]]:
    """Returns name -> {dtype, shape, data_offsets} of a checked header.

    Sizes agree with shapes and dtypes, and the offsets tile the data from 0.

    Args:
        header: as `read_header` returns it.
        file: where it is from, for messages.

    Raises:
        WeightsError: the header is corrupt.
    """
    try:
        # The first 8 bytes are the length of the JSON.
        entries = json.loads(header[8:], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            f"{file} has a header that is not JSON ({error}); download it again"
        ) from error
    # safetensors reads no header that begins with a space.
    if not isinstance(entries, dict) or header[8:9] != b"{":
        raise WeightsError(f"{file} has a header that is not a table of tensors; download it again")

    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{file} has a header whose metadata are not words; download it again")

    # Holes and overlaps could hide bytes that a scanner sees and a loader does not.
    spans = {name: _span(entry, name, file) for name, entry in entries.items()}
    previous_end = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != previous_end:
            kind = "leaves a hole before it"
            if begin < previous_end:
                kind = "overlaps another"
            raise WeightsError(
                f"{file}: {name} at bytes {begin} to {end} {kind}; the header is corrupt"
            )

        previous_end = end
    return entries


def hf_side_files(directory: Path, *, dtype: str, index: bytes | None = None) -> dict[str, bytes]:
    """Returns what makes an HF directory of weights complete, besides the weights.

    Args:
        directory: where the files are taken from.
        dtype: of the weights, which config.json names.
        index: the weights' index, where they have one.

    Returns:
        Relative path -> bytes.

    Raises:
        WeightsError: one of them is missing, no regular file, or a link out of the directory.
    """
    contents: dict[str, bytes] = {}
    if index is not None:
        contents[INDEX] = index
    for file in side_files(directory):
        contents[str(file.relative_to(directory))] = file.read_bytes()

    if "config.json" in contents:
        values = json.loads(contents["config.json"])
        torch_name = TORCH_NAMES[stored_dtype(dtype)]
        # transformers 5 spells the key dtype, 4 torch_dtype. A config that says it already keeps
        # its bytes.
        keys = [key for key in ("dtype", "torch_dtype") if key in values]
        if any(values[key] != torch_name for key in keys):
            values |= dict.fromkeys(keys, torch_name)
            contents["config.json"] = json.dumps(values, indent=2).encode() + b"\n"
    return contents


def side_files(directory: Path) -> list[Path]:
    """Returns the files that an export copies as they are: config, tokenizer, templates, code.

    Raises:
        WeightsError: one of them is no regular file, or a link out of the directory.
    """
    files = {file for pattern in _SIDE_FILES for file in directory.glob(pattern)}
    if any(_names_code(file) for file in files if file.parent == directory):
        files |= set(directory.glob("*.py"))

    kept = []
    for file in sorted(files):
        # Both describe the weights' files, which the export cuts anew.
        if file.name.endswith(".index.json") or file.name == MANIFEST:
            continue

        _refuse_link_outside(file, directory)
        if _check_regular(file) <= _SIDE_LIMIT:
            kept.append(file)
        else:
            logger.warning("%s is too large for a model's side file; exports leave it out", file)
    return kept


def _names_code(file: Path) -> bool:
    """Whether a JSON file has an `auto_map`: classes in Python files beside it."""
    if file.suffix != ".json" or _check_regular(file) > _SIDE_LIMIT:
        return False
    data = file.read_bytes()
    if b'"auto_map"' not in data:
        return False
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return False  # it is copied as it is; who needs it will say what is wrong
    return isinstance(values, dict) and bool(values.get("auto_map"))


def _refuse_link_outside(file: Path, directory: Path) -> None:
    """Refuses what would put a file from elsewhere on this machine into an export.

    A snapshot of the hub's cache is made of links, all to the blobs of its own repository.
    """
    # Links are followed on both sides: the directory itself may be one.
    root = directory.resolve()
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"{file} is a link that leads nowhere; remove it") from error
    homes = [root]
    # The hub's cache: models--OWNER--NAME/snapshots/REVISION, and blobs/ beside snapshots/.
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    if not any(target.is_relative_to(home) for home in homes):
        raise WeightsError(
            f"{file} is a link to {target}, outside the model's directory; an export would publish "
            f"that file: put a copy in its place, or remove the link"
        )


def _span(entry: Any, name: str, file: Path) -> tuple[int, int]:
    """Returns data_offsets of a header's entry, after checking the entry by itself."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise WeightsError(
            f"{file}: {name} lacks dtype, shape or data_offsets; the header is corrupt"
        )

    dtype = entry["dtype"]
    shape = entry["shape"]
    offsets = entry["data_offsets"]

    num_bytes = None
    if isinstance(dtype, str):
        num_bytes = {**DTYPE_BYTES, **_OTHER_BYTES}.get(dtype)
    if num_bytes is None:
        raise WeightsError(f"{file}: {name} has the dtype {dtype!r}, which does not exist")

    # Few dimensions and numbers below 2^63, so that the product of a shape is quickly computed.
    is_sane = (
        isinstance(shape, list)
        and isinstance(offsets, list)
        and len(shape) <= 8
        and len(offsets) == 2
        and all(type(number) is int and 0 <= number < 2**63 for number in (*shape, *offsets))
    )
    if not is_sane:
        raise WeightsError(
            f"{file}: {name} has the shape {shape!r} and offsets {offsets!r}; the header is corrupt"
        )

    begin, end = offsets
    if end - begin != prod(shape) * num_bytes:
        raise WeightsError(
            f"{file}: {name} of shape {shape} and dtype {dtype} does not fill bytes {begin} to "
            f"{end}"
        )

    return begin, end


def _safetensors(file: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of a safetensors file, which must be as long as its header says."""
    try:
        header = read_header(file)
    except OSError as error:
        raise WeightsError(f"{file}: cannot be read ({error.strerror})") from error
    entries = parse_header(header, file)
    begin = len(header)
    size = file.stat().st_size
    end = begin + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if end != size:
        raise WeightsError(
            f"{file} has {size} bytes where its header says {end}; it is truncated: download it "
            f"again"
        )

    tensors = {}
    for name, entry in entries.items():
        shape = tuple(entry["shape"])
        rows = 1
        if shape:
            rows = shape[0]
        # The header's offsets count from the end of the header.
        offset = begin + entry["data_offsets"][0]
        extent = Extent(file, offset, row=0, column=0, rows=rows, columns=prod(shape[1:]))
        tensors[name] = StoredTensor(name, entry["dtype"], shape, (extent,))
    return tensors


def weight_index(directory: Path) -> dict[str, str]:
    """Returns tensor name -> file name, as the index says that transformers would read; {} without.

    Raises:
        WeightsError: it is no index, or weights beside it make it unclear which ones are meant.
    """
    # safetensors before .bin, the order in which transformers looks for them.
    for single, name in ((SINGLE, INDEX), (BIN_SINGLE, BIN_INDEX)):
        has_single = (directory / single).exists()
        has_index = (directory / name).exists()
        index = {}
        if has_index:
            index = _read_index(directory / name)

        others = sorted(set(index.values()) - {single})
        # transformers reads the single file, vLLM the index, and the two may be different models.
        if has_single and others:
            raise WeightsError(
                f"{directory} has both {single} and {name}, which names {others[0]}; remove the "
                f"weights that are not meant"
            )
        if has_single or has_index:
            return index
    return {}


def _weight_files(directory: Path, index: Mapping[str, str]) -> list[Path]:
    """Returns the files that hold the weights: the index's, the single one, or all shards.

    Raises:
        WeightsError: there are none, one cannot be read, or it is unclear which are meant.
    """
    # An index names each of its files many times.
    names = sorted(set(index.values()))
    shards = sorted(file.name for file in directory.glob("*.safetensors"))
    if not names and (directory / SINGLE).exists():
        names = [SINGLE]
    elif not names and (directory / BIN_SINGLE).exists():
        names = [BIN_SINGLE]

    if shards and names and names[0].endswith(".bin"):
        raise WeightsError(
            f"{directory} has both {names[0]} and {shards[0]} without an index, which transformers "
            f"does not read; remove the weights that are not meant"
        )

    # Without an index and a single file: all shards that are there.
    names = names or shards
    if not names:
        raise WeightsError(
            f"{str(directory)!r} has no {SINGLE}, {INDEX} or {BIN_SINGLE}; give a directory of HF "
            f"weights"
        )

    for name in names:
        _check_regular(directory / name)
    return [directory / name for name in names]


def _read_index(file: Path) -> dict[str, str]:
    """Returns tensor name -> file name of an index, each a name within the directory."""
    _check_regular(file)
    try:
        weight_map = json.loads(file.read_bytes(), object_pairs_hook=_unique)["weight_map"]
        # Read within the `try`: a weight_map that is a list has no items.
        items = list(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{file} is not an index of weights ({error!r}); download it again"
        ) from error

    # No slash and no "..": an index must not lead to files elsewhere.
    file_name = re.compile(r"[\w.-]+\.(safetensors|bin)", re.ASCII)
    for name, target in items:
        if not isinstance(target, str) or not file_name.fullmatch(target):
            raise WeightsError(
                f"{file}: {name} lies in {target!r}, which is not a file name of weights"
            )
    return dict(items)


def _check_regular(file: Path) -> int:
    """Returns a file's size, after following links.

    Raises:
        WeightsError: the file is missing, a loop of links, or no regular file.
    """
    try:
        status = file.stat()
    except OSError as error:
        raise WeightsError(
            f"{file} cannot be read ({error.strerror}); the download may be incomplete"
        ) from error
    except RuntimeError as error:
        raise WeightsError(
            f"{file} cannot be read (a loop of links); the download may be incomplete"
        ) from error
    # A pipe or a device would block or never end.
    if not stat.S_ISREG(status.st_mode):
        raise WeightsError(f"{file} is not a regular file")

    return status.st_size


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns the table of a JSON object, for `object_pairs_hook`; refuses a name given twice.

    Readers differ in which of the two they take.
    """
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name stands twice in one table")
    return table
