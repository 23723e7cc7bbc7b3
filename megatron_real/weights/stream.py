"""Weights between HF tensors and the Megatron model of this rank, one parameter at a time.

Process groups are arguments; every function that takes them is collective over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_real.weights.architecture import Architecture
from megatron_real.weights.hf import HfWeights
from megatron_real.weights.mapping import entries


def global_parameters(chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """This rank's parameters by their global name: a layer's number in the whole model, not in its stage."""
    named: dict[str, nn.Parameter] = {}
    for chunk in chunks:
        decoder: Any = chunk.decoder
        numbers = {i: layer.layer_number - 1 for i, layer in enumerate(decoder.layers)}
        for name, parameter in chunk.named_parameters():
            if name.startswith("decoder.layers."):
                _, _, local, rest = name.split(".", 3)
                name = f"decoder.layers.{numbers[int(local)]}.{rest}"
            named[name] = parameter
    return named


def load_hf(
    chunks: Sequence[nn.Module], weights: HfWeights, architecture: Architecture, *, tp_rank: int, tp: int
) -> None:
    """Fills this rank's parameters from HF weights; nothing is communicated.

    Raises:
        ValueError: a tensor is missing, has another shape, or a parameter of the model was not filled.
    """
    parameters = global_parameters(chunks)
    unfilled = set(parameters)
    for entry in entries(architecture):
        names = {entry.megatron, entry.te_name} & parameters.keys()
        if entry.kind == "vocab" and architecture.tied and "output_layer.weight" in parameters:
            names.add("output_layer.weight")  # the last pipeline stage's copy of the tied embedding
        if not names:
            continue
        shard = entry.shard([weights.read(name) for name in entry.hf], architecture, tp_rank, tp)
        for name in names:
            parameter = parameters[name]
            if parameter.shape != shard.shape:
                raise ValueError(
                    f"{', '.join(entry.hf)} give {name} the shape {tuple(shard.shape)}, but the model has "
                    f"{tuple(parameter.shape)}; the weights and config.json do not belong together"
                )
            parameter.data.copy_(shard)
            unfilled.discard(name)
    if unfilled:
        raise ValueError(f"the HF weights have nothing for {', '.join(sorted(unfilled))}")


def stream_hf(
    chunks: Sequence[nn.Module],
    architecture: Architecture,
    *,
    tp_group: dist.ProcessGroup,
    pp_group: dist.ProcessGroup,
) -> Iterator[tuple[str, Tensor]]:
    """Yields every HF (name, tensor) of the model on every rank, holding one parameter at a time.

    Collective over `tp_group` (all-gather of the shards) and `pp_group` (broadcast from the stage that owns it): all
    ranks must consume the whole stream together. Tensors keep the model's dtype. A tied lm_head is not in it.
    """
    parameters = global_parameters(chunks)
    owners = _owners(parameters, pp_group)
    for entry in entries(architecture):
        name = entry.megatron if entry.megatron in owners else entry.te_name
        shard = parameters[name].data if name in parameters else None
        shard = _broadcast(shard, owners[name], pp_group)
        shards = _gather(shard, tp_group) if entry.kind != "replicated" else [shard]
        yield from zip(entry.hf, entry.join(shards, architecture), strict=True)


def _owners(
    parameters: dict[str, nn.Parameter], pp_group: dist.ProcessGroup
) -> dict[str, tuple[int, torch.Size, torch.dtype]]:
    """Parameter name -> (pipeline stage, shape, dtype) over all stages; the first stage that has it."""
    mine = {name: (tuple(p.shape), p.dtype) for name, p in parameters.items()}
    stages: list[dict[str, tuple[tuple[int, ...], torch.dtype]]] = [{} for _ in range(dist.get_world_size(pp_group))]
    dist.all_gather_object(stages, mine, group=pp_group)
    owners: dict[str, tuple[int, torch.Size, torch.dtype]] = {}
    for stage, named in enumerate(stages):
        for name, (shape, dtype) in named.items():
            owners.setdefault(name, (stage, torch.Size(shape), dtype))
    return owners


def _broadcast(shard: Tensor | None, owner: tuple[int, torch.Size, torch.dtype], pp_group: dist.ProcessGroup) -> Tensor:
    stage, shape, dtype = owner
    if dist.get_world_size(pp_group) == 1:
        assert shard is not None, "a single pipeline stage owns every parameter"
        return shard
    if dist.get_rank(pp_group) != stage or shard is None:
        shard = torch.empty(shape, dtype=dtype, device=torch.cuda.current_device())
    dist.broadcast(shard, src=dist.get_global_rank(pp_group, stage), group=pp_group)
    return shard


def _gather(shard: Tensor, tp_group: dist.ProcessGroup) -> list[Tensor]:
    world = dist.get_world_size(tp_group)
    if world == 1:
        return [shard]
    shards = [torch.empty_like(shard) for _ in range(world)]
    dist.all_gather(shards, shard.contiguous(), group=tp_group)
    return shards
