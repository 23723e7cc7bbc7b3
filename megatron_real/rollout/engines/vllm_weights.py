"""Where each HF tensor lies in a vLLM model.

It is derived from the layers themselves and not from vLLM's loaders, whose work it checks. vLLM
joins q, k, v into one parameter and gate, up into another, and cuts them over tensor-parallel
ranks:

    QKVParallelLinear            rows of the rank's heads; KV heads are repeated where there are
                                 fewer of them than ranks
    MergedColumnParallelLinear   rows, each of the joined tensors cut alike
    RowParallelLinear            columns of the weight
    VocabParallelEmbedding       rows, padded to equal parts; the head is one, too
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from megatron_real.rollout.engines.engine import TensorPart


class _Rows(NamedTuple):
    """The rows of one HF tensor that this rank holds."""

    total: int
    """Rows of the whole tensor."""
    start: int
    """The first row that this rank holds."""
    size: int
    """How many it holds."""


def parts_of(model: Any) -> dict[str, TensorPart]:
    """Returns this rank's part of every HF tensor of the model, by name.

    A head that shares the embedding's memory is listed as a tensor of its own.
    """
    parts = {}
    for path, module in model.named_modules():
        # The HF modules that this one is made of: q_proj, k_proj and v_proj of a qkv_proj.
        parent, dot, name = path.rpartition(".")
        hf_names = model.packed_modules_mapping.get(name, [name])
        for leaf, parameter in module.named_parameters(recurse=False):
            for hf_name, part in zip(hf_names, _parts(module, leaf, parameter), strict=True):
                parts[f"{parent}{dot}{hf_name}.{leaf}"] = part
    return parts


def _parts(module: nn.Module, leaf: str, parameter: nn.Parameter) -> Iterator[TensorPart]:
    """Yields the HF tensors that are joined in a parameter, in the order of its rows."""
    shape = tuple(parameter.shape[1:])
    columns = (slice(None),) * len(shape)

    if isinstance(module, RowParallelLinear) and leaf == "weight":
        first = module.tp_rank * module.input_size_per_partition
        # Its rows are whole on every rank; the columns are cut.
        shape = (module.input_size,)
        columns = (slice(first, first + module.input_size_per_partition),)

    offset = 0
    for rows in _rows(module, parameter):
        yield TensorPart(
            (rows.total, *shape),
            (slice(rows.start, rows.start + rows.size), *columns),
            parameter.data[offset : offset + rows.size],
        )
        offset += rows.size


def _rows(module: Any, parameter: nn.Parameter) -> list[_Rows]:
    """Returns this rank's rows of each HF tensor that is joined in the parameter."""
    if isinstance(module, QKVParallelLinear):
        q_size = module.num_heads * module.head_size
        q_total = module.total_num_heads * module.head_size
        q = _Rows(q_total, module.tp_rank * q_size, q_size)

        kv_size = module.num_kv_heads * module.head_size
        kv_total = module.total_num_kv_heads * module.head_size
        # With fewer KV heads than ranks, `num_kv_head_replicas` neighbouring ranks hold the same.
        kv_start = module.tp_rank // module.num_kv_head_replicas * kv_size
        kv = _Rows(kv_total, kv_start, kv_size)
        return [q, kv, kv]

    if isinstance(module, MergedColumnParallelLinear):
        # gate and up: each is cut into equal parts, which lie one after the other.
        rows = []
        for total in module.output_sizes:
            size = total // module.tp_size
            rows.append(_Rows(total, module.tp_rank * size, size))
        return rows

    if isinstance(module, VocabParallelEmbedding):
        # Without the rows of padding, which no HF tensor has.
        shard = module.shard_indices
        start = shard.org_vocab_start_index
        return [_Rows(module.org_vocab_size, start, shard.org_vocab_end_index - start)]

    # What is left has all its rows on every rank: norms, and RowParallelLinear.
    num_rows = parameter.shape[0]
    return [_Rows(num_rows, 0, num_rows)]
