"""Transformer layers without TransformerEngine: a core attention on torch SDPA and an RMS norm.

megatron-core's own DotProductAttention refuses packed sequences and context parallelism, and its
WrappedTorchNorm refuses sequence parallelism; these two modules lift both limits, on a CPU and on a
GPU alike. Everything else in the layer is megatron-core's.

Shapes: T packed tokens of this context-parallel rank, A query heads and K key-value heads of this
tensor-parallel rank, D head size, L tokens of one sequence, B sequences of equal length.
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

from megatron_real.parallel.cpu import device


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in fp32 at least.

    transformers' Qwen2RMSNorm and LlamaRMSNorm compute the same.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device())
        )
        # Tells finalize_model_grads to sum this gradient over TP: each rank saw only its share of
        # the tokens.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # Rounded before the product with the weight, as transformers does: the order shows in bf16.
        return self.weight * normed.to(x.dtype)


class SdpaCoreAttention(nn.Module):
    """Causal self-attention over packed sequences on torch's scaled_dot_product_attention.

    Under context parallelism each rank holds the pieces r and 2 * CP - 1 - r of every sequence
    (megatron-core's balanced order). Keys and values are all-gathered over CP, so each piece of the
    queries attends to the prefix that ends with it; the gather's backward reduce-scatters their
    gradients.
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
        # megatron-core passes None for the usual scale, and a number for models with one of their
        # own.
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
        """Returns [T, A * D].

        Args:
            query_TAD, key_TKD, value_TKD: this rank's tokens.
            attention_mask, attn_mask_type, attention_bias: megatron-core's, all unused.
            packed_seq_params: the sequences' bounds over all context-parallel ranks together.

        Raises:
            ValueError: the sequences are not packed, or there is a mask or a bias.
        """
        if packed_seq_params is None:
            raise ValueError(
                "the core attention takes packed sequences only; pass "
                "PackedSeqParams(qkv_format='thd')"
            )

        if attention_mask is not None or attention_bias is not None:
            raise ValueError(
                "the core attention is causal within each packed sequence and takes no mask or bias"
            )

        # The bounds are on the host for these layers (MicroBatch.packed): nothing waits for the
        # device.
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        if self.cp_group.size() == 1:
            outputs = self._attend_whole(query_TAD, key_TKD, value_TKD, lengths)
        else:
            outputs = self._attend_pieces(query_TAD, key_TKD, value_TKD, lengths)
        return torch.cat(outputs).flatten(1)

    def _attend_whole(
        self, query_TAD: Tensor, key_TKD: Tensor, value_TKD: Tensor, lengths: list[int]
    ) -> list[Tensor]:
        """Returns the attention of whole sequences, [tokens, A, D] each.

        There is one call for each run of equal lengths: a padded micro-batch is a single run.
        """
        outputs = []
        start = 0
        i = 0
        while i < len(lengths):
            run = 1
            while i + run < len(lengths) and lengths[i + run] == lengths[i]:
                run += 1

            end = start + run * lengths[i]
            query_BLAD, key_BLKD, value_BLKD = (
                x[start:end].unflatten(0, (run, lengths[i]))
                for x in (query_TAD, key_TKD, value_TKD)
            )

            outputs.append(self._attend(query_BLAD, key_BLKD, value_BLKD).flatten(0, 1))
            start = end
            i += run
        return outputs

    def _attend_pieces(
        self, query_TAD: Tensor, key_TKD: Tensor, value_TKD: Tensor, lengths: list[int]
    ) -> list[Tensor]:
        """Returns the attention of this context-parallel rank's two pieces of each sequence."""
        cp = self.cp_group.size()
        rank = self.cp_group.rank()
        # One gather for both: keys and values lie side by side along the heads.
        kv_gathered = gather_from_sequence_parallel_region(
            torch.cat([key_TKD, value_TKD], 1), group=self.cp_group
        )
        kv_of_rank = kv_gathered.chunk(cp)

        outputs = []
        start = 0
        for length in lengths:
            half = length // (2 * cp)
            # The whole sequence in order, out of every rank's pair of pieces (r, 2 * CP - 1 - r):
            # the first halves ascend with the rank, the second halves descend.
            pairs = [kv[start : start + 2 * half] for kv in kv_of_rank]
            firsts = [pair[:half] for pair in pairs]
            seconds = [pair[half:] for pair in reversed(pairs)]
            key_LKD, value_LKD = torch.cat(firsts + seconds).chunk(2, dim=1)

            # An early and a late piece: causal attention costs as much as the prefix is long, and
            # every rank gets the same sum.
            for piece, offset in ((rank, 0), (2 * cp - 1 - rank, half)):
                end = (piece + 1) * half
                query_LAD = query_TAD[start + offset : start + offset + half]
                # Keys end with the piece itself, so that its last query sees the last of them.
                output_BLAD = self._attend(
                    query_LAD[None], key_LKD[None, :end], value_LKD[None, :end]
                )
                outputs.append(output_BLAD[0])
            start += 2 * half
        return outputs

    def _attend(self, query_BLAD: Tensor, key_BLKD: Tensor, value_BLKD: Tensor) -> Tensor:
        """Returns [B, L, A, D], causal attention of a prefix's last L queries.

        Query i sees the keys up to (prefix length) - L + i.
        """
        query_BALD = query_BLAD.transpose(1, 2)
        key_BKLD = key_BLKD.transpose(1, 2)
        value_BKLD = value_BLKD.transpose(1, 2)

        num_queries = query_BALD.shape[2]
        num_keys = key_BKLD.shape[2]
        mask = None
        if num_queries != num_keys:
            # is_causal would align the diagonal with the first key, not with the last.
            mask = causal_lower_right(num_queries, num_keys)

        output_BALD = scaled_dot_product_attention(
            query_BALD,
            key_BKLD,
            value_BKLD,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query_BALD.shape[1] != key_BKLD.shape[1],
        )
        return output_BALD.transpose(1, 2)


def local_block_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Returns megatron-core's local layer spec of this pipeline stage with the two modules above.

    Args:
        config: the model's.
        vp_stage: which chunk of the pipeline stage; None without virtual pipelining.
    """
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer = spec.submodules
    layer.input_layernorm = RMSNorm
    layer.pre_mlp_layernorm = RMSNorm

    attention = layer.self_attention.submodules
    attention.core_attention = SdpaCoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm

    # One spec for all layers, as megatron-core's own block specs have it.
    layers: list[ModuleSpec] = [spec] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
