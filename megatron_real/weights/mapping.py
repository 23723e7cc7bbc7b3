"""The one mapping between HF and Megatron weights: names, shapes and tensor-parallel shards.

Loading, weight sync and export all walk `entries(architecture)`. An entry ties one Megatron parameter, named by its
global layer number, to the one to three HF tensors it is made of:

    linear_qkv   per KV group: its q rows, its k rows, its v rows       <- q_proj, k_proj, v_proj   split over rows
    linear_fc1   gate rows, then up rows, each split over TP ranks      <- gate_proj, up_proj       split over rows
    embedding    padded to a multiple of 128 * TP rows                  <- embed_tokens, lm_head    split over rows
    linear_proj, linear_fc2                                             <- o_proj, down_proj        split over columns
    norms                                                               <- one to one               replicated
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_real.weights.architecture import Architecture

Kind = Literal["qkv", "gate_up", "vocab", "columns", "replicated"]


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the HF tensors it is made of."""

    megatron: str
    """Name in megatron-core's local layer spec, with the global layer number."""
    hf: tuple[str, ...]
    """HF names, in the order they are joined."""
    kind: Kind
    """How they are joined and sharded."""

    @property
    def te_name(self) -> str:
        """The parameter's name in TransformerEngine's layer spec, where a norm is fused into the linear after it."""
        name = self.megatron.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        return name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")

    def shard(self, tensors: Sequence[Tensor], architecture: Architecture, tp_rank: int, tp: int) -> Tensor:
        """The part that tensor-parallel rank `tp_rank` of `tp` holds, made of whole HF tensors."""
        if self.kind == "qkv":
            return _interleave(tensors, architecture).chunk(tp)[tp_rank]
        if self.kind == "gate_up":
            return torch.cat([x.chunk(tp)[tp_rank] for x in tensors])
        if self.kind == "vocab":
            (rows,) = tensors
            padding = rows.new_zeros(architecture.padded_vocab(tp) - rows.shape[0], rows.shape[1])
            return torch.cat([rows, padding]).chunk(tp)[tp_rank]
        (whole,) = tensors
        return whole.chunk(tp, dim=1)[tp_rank] if self.kind == "columns" else whole

    def join(self, shards: Sequence[Tensor], architecture: Architecture) -> list[Tensor]:
        """The whole HF tensors, out of every tensor-parallel rank's part in rank order."""
        if self.kind == "qkv":
            return _deinterleave(torch.cat(list(shards)), architecture)
        if self.kind == "gate_up":
            pairs = [shard.chunk(2) for shard in shards]
            return [torch.cat([pair[i] for pair in pairs]) for i in range(2)]
        if self.kind == "vocab":
            return [torch.cat(list(shards))[: architecture.vocab_size]]
        return [torch.cat(list(shards), dim=1) if self.kind == "columns" else shards[0]]


def entries(architecture: Architecture) -> Iterator[Entry]:
    """Every parameter of the model once, in forward order. A tied output weight has no entry: it is the embedding."""
    yield Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab")
    for i in range(architecture.num_layers):
        yield from _layer_entries(f"decoder.layers.{i}", f"model.layers.{i}", architecture.qkv_bias)
    yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",), "replicated")
    if not architecture.tied:
        yield Entry("output_layer.weight", ("lm_head.weight",), "vocab")


def _layer_entries(megatron: str, hf: str, qkv_bias: bool) -> Iterator[Entry]:
    attention, mlp = f"{hf}.self_attn", f"{hf}.mlp"
    yield Entry(f"{megatron}.input_layernorm.weight", (f"{hf}.input_layernorm.weight",), "replicated")
    for part in ("weight", "bias") if qkv_bias else ("weight",):
        qkv = tuple(f"{attention}.{x}_proj.{part}" for x in "qkv")
        yield Entry(f"{megatron}.self_attention.linear_qkv.{part}", qkv, "qkv")
    yield Entry(f"{megatron}.self_attention.linear_proj.weight", (f"{attention}.o_proj.weight",), "columns")
    yield Entry(f"{megatron}.pre_mlp_layernorm.weight", (f"{hf}.post_attention_layernorm.weight",), "replicated")
    gate_up = (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight")
    yield Entry(f"{megatron}.mlp.linear_fc1.weight", gate_up, "gate_up")
    yield Entry(f"{megatron}.mlp.linear_fc2.weight", (f"{mlp}.down_proj.weight",), "columns")


def _interleave(qkv: Sequence[Tensor], architecture: Architecture) -> Tensor:
    """q, k, v rows -> per KV group the rows of its query heads, its key head, its value head."""
    groups = [x.unflatten(0, (architecture.num_kv_heads, -1)) for x in qkv]
    return torch.cat(groups, dim=1).flatten(0, 1)


def _deinterleave(rows: Tensor, architecture: Architecture) -> list[Tensor]:
    per_group = architecture.num_heads // architecture.num_kv_heads * architecture.head_dim
    groups = rows.unflatten(0, (architecture.num_kv_heads, -1))
    parts = groups.split([per_group, architecture.head_dim, architecture.head_dim], dim=1)
    return [part.flatten(0, 1) for part in parts]
