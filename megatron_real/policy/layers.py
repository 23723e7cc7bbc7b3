"""Transformer layers that need no TransformerEngine: a core attention on torch SDPA and an RMS norm.

megatron-core's own DotProductAttention refuses packed sequences and context parallelism, and its WrappedTorchNorm
refuses sequence parallelism; these two modules lift both limits, on a CPU and on a GPU alike. Everything else in the
layer is megatron-core's.

Shapes: T packed tokens of this context-parallel rank, A query heads and K key-value heads of this tensor-parallel rank,
D head size, L tokens of one sequence.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 at least, as transformers' Qwen2RMSNorm and LlamaRMSNorm do."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        # Tells finalize_model_grads to sum this gradient over TP: each rank saw only its share of the tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class SdpaCoreAttention(nn.Module):
    """Causal self-attention over packed sequences on torch's scaled_dot_product_attention.

    Under context parallelism each rank holds chunks r and 2 * CP - 1 - r of every sequence (megatron-core's balanced
    order). Keys and values are all-gathered over CP, so each chunk of queries attends to the prefix that ends with it;
    the gather's backward reduce-scatters their gradients.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.cp_group: dist.ProcessGroup = pg_collection.cp

    def forward(
        self,
        query_TAD: Tensor,
        key_TKD: Tensor,
        value_TKD: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Returns [T, A * D]. `packed_seq_params` holds the sequences' bounds over all CP ranks together."""
        if packed_seq_params is None:
            raise ValueError(
                "the core attention takes packed sequences only; pass PackedSeqParams(qkv_format='thd')"
            )
        if attention_mask is not None or attention_bias is not None:
            raise ValueError(
                "the core attention is causal within each packed sequence and takes no mask or bias"
            )
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        cp = self.cp_group.size()
        if cp == 1:
            return self._attend_all(query_TAD, key_TKD, value_TKD, lengths).flatten(1)
        kv_gathered = gather_from_sequence_parallel_region(
            torch.cat([key_TKD, value_TKD], 1), group=self.cp_group
        )
        kv_of_rank = kv_gathered.chunk(cp)
        outputs, start = [], 0
        for length in lengths:
            half = length // (2 * cp)
            kv_LKD = _in_order([kv[start : start + 2 * half] for kv in kv_of_rank], half)
            key_LKD, value_LKD = kv_LKD.chunk(2, dim=1)
            for chunk, offset in (
                (self.cp_group.rank(), 0),
                (2 * cp - 1 - self.cp_group.rank(), half),
            ):
                end = (chunk + 1) * half
                query_LAD = query_TAD[start + offset : start + offset + half]
                outputs.append(
                    self._attend(query_LAD[None], key_LKD[None, :end], value_LKD[None, :end])[0]
                )
            start += 2 * half
        return torch.cat(outputs).flatten(1)

    def _attend_all(
        self, query_TAD: Tensor, key_TKD: Tensor, value_TKD: Tensor, lengths: list[int]
    ) -> Tensor:
        """Whole sequences, one call per run of equal lengths (a padded micro-batch is a single run)."""
        outputs, start, i = [], 0, 0
        while i < len(lengths):
            run = 1
            while i + run < len(lengths) and lengths[i + run] == lengths[i]:
                run += 1
            end = start + run * lengths[i]
            parts = (
                x[start:end].unflatten(0, (run, lengths[i]))
                for x in (query_TAD, key_TKD, value_TKD)
            )
            outputs.append(self._attend(*parts).flatten(0, 1))
            start, i = end, i + run
        return torch.cat(outputs)

    def _attend(self, query_BLAD: Tensor, key_BLKD: Tensor, value_BLKD: Tensor) -> Tensor:
        """Causal attention of a prefix's last L queries: query i sees the keys up to (prefix length) - L + i."""
        query, key, value = (x.transpose(1, 2) for x in (query_BLAD, key_BLKD, value_BLKD))
        square = query.shape[2] == key.shape[2]
        mask = None if square else causal_lower_right(query.shape[2], key.shape[2])
        gqa = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=square, scale=self.scale, enable_gqa=gqa
        )
        return out.transpose(1, 2)


def _in_order(parts: list[Tensor], half: int) -> Tensor:
    """One sequence's tokens in order, out of every rank's pair of chunks (r, 2 * CP - 1 - r)."""
    return torch.cat([part[:half] for part in parts] + [part[half:] for part in reversed(parts)])


def local_block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """megatron-core's local layer spec of this pipeline stage with the two modules above in place."""
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer = spec.submodules
    layer.input_layernorm = RMSNorm
    layer.pre_mlp_layernorm = RMSNorm
    attention = layer.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    layers: list[ModuleSpec] = [spec] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
