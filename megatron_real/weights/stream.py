"""Weights between files and the live Megatron model of this rank, one parameter at a time.

Process groups are arguments; every function that takes them is collective over them.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_real.disk import fsync
from megatron_real.parallel.collective import all_well, gathered
from megatron_real.parallel.cpu import device
from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.hf import hf_files, hf_side_files
from megatron_real.weights.mapping import (
    EMBEDDING,
    OUTPUT,
    Coordinates,
    Weights,
    entries,
    hf_shapes,
)
from megatron_real.weights.stored import OpenFiles, stored_dtype, torch_dtype

_BLOCK_BYTES = 2**24

logger = logging.getLogger(__name__)


def global_parameters(chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """Returns this rank's parameters by their global name.

    A layer is numbered in the whole model there, not in its pipeline stage.

    Args:
        chunks: the model chunks of this rank.
    """
    named: dict[str, nn.Parameter] = {}
    for chunk in chunks:
        # megatron-core counts layers of the whole model, from 1.
        decoder: Any = chunk.decoder
        numbers = {i: layer.layer_number - 1 for i, layer in enumerate(decoder.layers)}
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                name = f"decoder.layers.{numbers[int(local)]}.{rest}"
            named[name] = parameter
    return named


def load_weights(
    chunks: Sequence[nn.Module],
    weights: Weights,
    architecture: Architecture,
    *,
    tp_rank: int,
    tp: int,
    replicas: dist.ProcessGroup | None = None,
) -> None:
    """Fills this rank's parameters with its own slices of the weights.

    One rank of `replicas` reads them and sends them to the others.

    Args:
        chunks: the model chunks of this rank.
        weights: an HF directory or a Megatron checkpoint.
        architecture: the model.
        tp_rank, tp: which tensor-parallel part this rank holds, of how many.
        replicas: the ranks that hold the same parameters, over which this is collective; None where
            every rank reads.

    Raises:
        WeightsError: a tensor is missing, has another shape, or a parameter of the model was not
            filled.
    """
    parameters = global_parameters(chunks)

    def read() -> None:
        if replicas is None or dist.get_rank(replicas) == 0:
            _read_weights(parameters, weights, architecture, tp_rank=tp_rank, tp=tp)

    if replicas is None or dist.get_world_size(replicas) == 1:
        read()
        return

    # Every rank raises for a file that one cannot read. The others would wait in the first
    # broadcast.
    all_well(read, group=replicas, expected=WeightsError, raises=WeightsError)
    # broadcast() takes a rank of the whole job, whatever the group.
    source = dist.get_global_rank(replicas, 0)
    for parameter in parameters.values():
        dist.broadcast(parameter.data, src=source, group=replicas)


def _read_weights(
    parameters: dict[str, nn.Parameter],
    weights: Weights,
    architecture: Architecture,
    *,
    tp_rank: int,
    tp: int,
) -> None:
    """Fills the parameters, by global name, from the files."""
    unfilled = set(parameters)
    padded_rows = architecture.padded_vocab(tp)
    with OpenFiles() as files:
        for entry in entries(architecture):
            names = set(entry.names) & parameters.keys()
            if entry.key == EMBEDDING and architecture.tied and OUTPUT in parameters:
                names.add(OUTPUT)  # the last pipeline stage's copy of the tied embedding
            if not names:
                continue

            rectangle = entry.shard(Coordinates(tp_rank, tp), padded_rows=padded_rows)
            for name in names:
                target = parameters[name].data
                piece = weights.megatron_piece(entry, rectangle)
                if tuple(target.shape) != piece.shape:
                    raise WeightsError(
                        f"{', '.join(entry.parts)} give {name} the shape {piece.shape}, but the "
                        f"model has {tuple(target.shape)}; the weights and config.json do not "
                        f"belong together"
                    )

                # A view: what is copied into it is in the model.
                flat = target.view(-1)
                begin = 0
                for block in piece.blocks(files, _BLOCK_BYTES):
                    values = torch.frombuffer(block, dtype=torch_dtype(piece.dtype))
                    flat[begin : begin + values.numel()].copy_(values)
                    begin += values.numel()
                unfilled.discard(name)
    if unfilled:
        raise WeightsError(f"the weights have nothing for {', '.join(sorted(unfilled))}")


def stream_hf(
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    *,
    tp_group: dist.ProcessGroup,
    pp_group: dist.ProcessGroup,
) -> Iterator[tuple[str, Tensor]]:
    """Yields every HF (name, tensor) of the model on every rank, holding one parameter at a time.

    Collective over `tp_group` (all-gather of the shards) and `pp_group` (broadcast from the stage
    that owns it): all ranks must consume the whole stream together. Tensors keep the model's dtype
    and may be views of its parameters: copy what outlives an update. A tied lm_head is not in it.
    """
    parameters = global_parameters(chunks)
    tp = dist.get_world_size(tp_group)

    # Which stage sends each parameter, and its shape and dtype for the stages that receive it. One
    # that several stages hold, as a tied embedding, is the first one's.
    local = {name: (tuple(p.shape), p.dtype) for name, p in parameters.items()}
    owners: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
    for stage, named in enumerate(gathered(local, group=pp_group)):
        for name, (shape, dtype) in named.items():
            owners.setdefault(name, (stage, torch.Size(shape), dtype))

    for entry in entries(architecture):
        # TransformerEngine's spelling or the local one, as this model has it.
        name = next(name for name in entry.names if name in owners)
        shard = None
        if name in parameters:
            shard = parameters[name].data

        # From the owner to every pipeline stage.
        stage, stored_shape, dtype = owners[name]
        if dist.get_world_size(pp_group) > 1:
            # Another stage may hold the parameter too (a tied embedding): it receives into a
            # buffer, so that its own copy stays as it is.
            if dist.get_rank(pp_group) != stage or shard is None:
                shard = torch.empty(stored_shape, dtype=dtype, device=device())
            dist.broadcast(shard, src=dist.get_global_rank(pp_group, stage), group=pp_group)
        assert shard is not None, "a single pipeline stage owns every parameter"

        shards = [shard]
        if tp > 1 and entry.kind != "replicated":
            shards = [torch.empty_like(shard) for _ in range(tp)]
            dist.all_gather(shards, shard.contiguous(), group=tp_group)

        for name, shape, tensor in zip(entry.parts, entry.shapes, entry.join(shards), strict=True):
            yield name, tensor[: shape[0]]  # without the vocabulary's padding


def write_hf(
    directory: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    source: str | Path,
    dtype: str,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Writes a complete HF directory.

    The directory appears when it is complete and on disk; an older one is there until then.

    Args:
        directory: where to write.
        tensors: HF (name, tensor) of the whole model, in any order. One tensor is held at a time.
        source: HF directory that config and tokenizer are copied from.
        dtype: of the weights, in a configuration's spelling or as a key of DTYPE_BYTES.
        texts: other files by their names, such as a model card.

    Raises:
        WeightsError: the stream lacks a tensor of the model, or has another one, or a file of
            `source` cannot be copied.
    """
    target = Path(directory)
    shapes = hf_shapes(Architecture.read(source))
    files, index = hf_files({name: (stored_dtype(dtype), shape) for name, shape in shapes.items()})
    contents = hf_side_files(Path(source), dtype=dtype, index=index)
    contents |= {name: text.encode() for name, text in (texts or {}).items()}

    # The small files, and the files of weights with their headers and room for the tensors.
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, data in contents.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(data)
    for file in files:
        with open(partial / file.name, "wb") as stream:
            stream.write(file.header)
            # The full size at once: tensors come in any order.
            stream.truncate(file.size)

    # Every tensor goes to its place as it comes.
    places = {}
    for file in files:
        for name, offset in file.offsets.items():
            places[name] = (file.name, offset)
    for name, tensor in tensors:
        if name not in places:
            raise WeightsError(
                f"the weights to export have {name} twice, or the model has no such tensor"
            )

        # Popped, so that a tensor that comes twice has no place.
        path, offset = places.pop(name)
        values = tensor.to(torch_dtype(dtype)).detach().cpu().contiguous()
        with open(partial / path, "r+b") as stream:
            stream.seek(offset)
            # As bytes, because numpy has no bfloat16.
            stream.write(values.view(-1).view(torch.uint8).numpy().data)
    if places:
        raise WeightsError(f"the weights to export have nothing for {', '.join(sorted(places))}")

    # On disk before the directory has its name: after a power cut it is whole or not there.
    for path_in_partial in partial.rglob("*"):
        fsync(path_in_partial)
    fsync(partial)
    _replace(target, partial)


def _replace(target: Path, partial: Path) -> None:
    """Gives `partial` the name `target`. An old directory of that name is there until then.

    It is deleted afterwards, unless somebody has put other files there: then it is set aside.
    """
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        _set_aside(old)
        target.rename(old)
    partial.rename(target)
    fsync(target.parent)

    old_files = {path.relative_to(old) for path in old.rglob("*")}
    # What the new export has as well was an export's: the rest somebody else put there.
    strange = old_files - {path.relative_to(target) for path in target.rglob("*")}
    if strange:
        logger.warning("%s held %s; it is kept as %s", target, min(strange), _set_aside(old))
    else:
        shutil.rmtree(old, ignore_errors=True)


def _set_aside(old: Path) -> Path:
    """Renames a replaced export that must not be deleted; returns its new name."""
    number = 1
    while (kept := old.with_name(f"{old.name.strip('.')}-{number}")).exists():
        number += 1
    if old.exists():
        old.rename(kept)
    return kept
