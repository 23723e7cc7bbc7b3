"""Where each HF tensor lies in a vLLM model: found from the layers themselves, apart from vLLM's own loaders.

vLLM joins q, k, v and gate, up into one parameter each, and cuts them over tensor-parallel ranks:

    QKVParallelLinear            rows of the rank's heads; KV heads are repeated where there are fewer than ranks
    MergedColumnParallelLinear   rows, each of the joined tensors cut alike
    RowParallelLinear            columns of the weight
    VocabParallelEmbedding       rows, padded to equal parts; the head is one too
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from megatron_real.rollout.engine import Part


def parts_of(model: Any) -> dict[str, Part]:
    """Every HF tensor of the model, by name; a head that shares the embedding's memory is one of its own."""
    return {
        f"{path}.{leaf}": held
        for joined, module in model.named_modules()
        for leaf, parameter in module.named_parameters(recurse=False)
        for path, held in zip(_paths(model, joined), _parts(module, leaf, parameter), strict=True)
    }


def _paths(model: Any, joined: str) -> list[str]:
    """The HF modules that the vLLM module `joined` is made of."""
    parent, _, own = joined.rpartition(".")
    return [
        f"{parent}.{part}" if parent else part
        for part in model.packed_modules_mapping.get(own, [own])
    ]


def _parts(module: nn.Module, leaf: str, parameter: nn.Parameter) -> Iterator[Part]:
    rest = (slice(None),) * (parameter.dim() - 1)
    offset = 0
    for total, start, size in _rows(module, parameter):
        shape, columns = tuple(parameter.shape[1:]), rest
        if isinstance(module, RowParallelLinear) and leaf == "weight":
            first = module.tp_rank * module.input_size_per_partition
            shape, columns = (
                (module.input_size,),
                (slice(first, first + module.input_size_per_partition),),
            )
        yield Part(
            (total, *shape),
            (slice(start, start + size), *columns),
            parameter.data[offset : offset + size],
        )
        offset += size


def _rows(module: Any, parameter: nn.Parameter) -> list[tuple[int, int, int]]:
    """(rows of the whole HF tensor, the first that this rank holds, how many) of each joined tensor."""
    if isinstance(module, QKVParallelLinear):
        q, kv = module.num_heads * module.head_size, module.num_kv_heads * module.head_size
        kv_start, kv_total = (
            module.tp_rank // module.num_kv_head_replicas * kv,
            module.total_num_kv_heads * module.head_size,
        )
        return [
            (module.total_num_heads * module.head_size, module.tp_rank * q, q),
            *[(kv_total, kv_start, kv)] * 2,
        ]
    if isinstance(module, MergedColumnParallelLinear):
        sizes = [total // module.tp_size for total in module.output_sizes]
        return [
            (total, module.tp_rank * size, size)
            for total, size in zip(module.output_sizes, sizes, strict=True)
        ]
    if isinstance(module, VocabParallelEmbedding):
        shard = module.shard_indices
        start = shard.org_vocab_start_index
        return [(module.org_vocab_size, start, shard.org_vocab_end_index - start)]
    return [(parameter.shape[0], 0, parameter.shape[0])]
