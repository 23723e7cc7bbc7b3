"""Reading and writing directories of HF weights (safetensors)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What makes a directory complete for transformers and vLLM besides the weights.
SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")


class HfWeights:
    """The tensors of an HF directory, read one at a time from memory-mapped files.

    Raises:
        ValueError: files are missing or truncated, or a tensor is not there; names the file or tensor.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        index = self.directory / INDEX
        if index.is_file():
            self._file_of = dict(json.loads(index.read_text())["weight_map"])
        elif (self.directory / SINGLE).is_file():
            self._file_of = dict.fromkeys(self._opened(SINGLE).keys(), SINGLE)
        else:
            raise ValueError(f"{str(directory)!r} has neither {SINGLE} nor {INDEX}; give a directory of HF weights")

    @property
    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._file_of)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in the file's dtype, on the CPU."""
        if name not in self._file_of:
            raise ValueError(f"{str(self.directory)!r} has no tensor {name}; the download may be incomplete")
        try:
            tensor: Tensor = self._opened(self._file_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{self.directory / self._file_of[name]}: cannot read {name} ({error})") from error
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of the tensor `name` in its file."""
        return self.read(name).dtype

    def _opened(self, file: str) -> Any:
        if file not in self._open:
            path = self.directory / file
            if path.resolve().parent != path.parent.resolve() and ".." in Path(file).parts:
                raise ValueError(
                    f"the index of {str(self.directory)!r} names {file!r}, which lies outside the directory"
                )
            if not path.is_file():
                raise ValueError(f"{path} is missing; the download may be incomplete")
            try:
                self._open[file] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ValueError(f"{path} is truncated or corrupt ({error}); download it again") from error
        return self._open[file]


def write_hf(
    directory: str | Path, tensors: Iterable[tuple[str, Tensor]], *, source: str | Path, shard_bytes: int = 5 * 10**9
) -> None:
    """Writes a complete HF directory: the weights in shards of at most `shard_bytes`, and `source`'s other files.

    The stream is consumed shard by shard, so at most one shard is in memory. The directory appears under its name only
    when it is complete.
    """
    target = Path(directory)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}

    def flush() -> None:
        save_file(pending, partial / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    total = held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and held + size > shard_bytes:
            flush()
            held = 0
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        held, total = held + size, total + size
    flush()
    _name_shards(partial, shards, total)
    _copy_side_files(Path(source), partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _name_shards(directory: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{i}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _copy_side_files(source: Path, target: Path) -> None:
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            if file.name != INDEX:
                shutil.copyfile(file, target / file.name)


def torch_dtype(name: str) -> torch.dtype:
    """`bf16`, `fp32` or `fp64` as torch's dtype."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[name]
