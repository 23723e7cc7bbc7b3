"""The one mapping between HF and Megatron weights: names, shapes, and which row goes where.

Conversion, loading, weight sync and export all walk `entries(architecture)`. An entry ties one
Megatron parameter to the one to three HF tensors it is made of, always as whole rows (`runs`):

    linear_qkv   per KV group: its q rows, its k rows, its v rows       <- q_proj, k_proj, v_proj   split over rows
    linear_fc1   gate rows, then up rows, each split over TP ranks      <- gate_proj, up_proj       split over rows
    embedding    padded to a multiple of 128 * TP rows                  <- embed_tokens, lm_head    split over rows
    linear_proj, linear_fc2                                             <- o_proj, down_proj        split over columns
    norms, and the biases of linear_proj and linear_fc2                 <- one to one               replicated

A new architecture is a line in architecture.SUPPORTED, its traits, and rows of LAYER that hold for
a trait.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from megatron_real.weights.architecture import Architecture
from megatron_real.weights.stored import Piece, Run, StoredTensor, row_ranges

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["qkv", "gate_up", "vocab", "columns", "replicated"]
"""How HF tensors are joined to a Megatron parameter, and how tensor parallelism splits it."""

Rows = tuple[str, Kind, tuple[tuple[str, ...], ...], str]

# Megatron name, kind, (HF name, its dimensions) of each part, the trait of the architecture that it
# needs. A name is the one in the checkpoint, where a norm belongs to the linear after it, as
# TransformerEngine fuses them.
LAYER: tuple[Rows, ...] = (
    (
        "self_attention.linear_qkv.layer_norm_weight",
        "replicated",
        (("input_layernorm.weight", "hidden"),),
        "",
    ),
    (
        "self_attention.linear_qkv.weight",
        "qkv",
        (
            ("self_attn.q_proj.weight", "q", "hidden"),
            ("self_attn.k_proj.weight", "kv", "hidden"),
            ("self_attn.v_proj.weight", "kv", "hidden"),
        ),
        "",
    ),
    (
        "self_attention.linear_qkv.bias",
        "qkv",
        (
            ("self_attn.q_proj.bias", "q"),
            ("self_attn.k_proj.bias", "kv"),
            ("self_attn.v_proj.bias", "kv"),
        ),
        "qkv_bias",
    ),
    (
        "self_attention.q_layernorm.weight",
        "replicated",
        (("self_attn.q_norm.weight", "head"),),
        "qk_norm",
    ),
    (
        "self_attention.k_layernorm.weight",
        "replicated",
        (("self_attn.k_norm.weight", "head"),),
        "qk_norm",
    ),
    (
        "self_attention.linear_proj.weight",
        "columns",
        (("self_attn.o_proj.weight", "hidden", "q"),),
        "",
    ),
    (
        "self_attention.linear_proj.bias",
        "replicated",
        (("self_attn.o_proj.bias", "hidden"),),
        "linear_bias",
    ),
    (
        "mlp.linear_fc1.layer_norm_weight",
        "replicated",
        (("post_attention_layernorm.weight", "hidden"),),
        "",
    ),
    (
        "mlp.linear_fc1.weight",
        "gate_up",
        (("mlp.gate_proj.weight", "ffn", "hidden"), ("mlp.up_proj.weight", "ffn", "hidden")),
        "",
    ),
    (
        "mlp.linear_fc1.bias",
        "gate_up",
        (("mlp.gate_proj.bias", "ffn"), ("mlp.up_proj.bias", "ffn")),
        "linear_bias",
    ),
    ("mlp.linear_fc2.weight", "columns", (("mlp.down_proj.weight", "hidden", "ffn"),), ""),
    ("mlp.linear_fc2.bias", "replicated", (("mlp.down_proj.bias", "hidden"),), "linear_bias"),
)

# The norms' names in megatron-core's local layer spec, where they are modules of their own.
LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter and the HF tensors it is made of."""

    key: str
    """Key in a torch_dist checkpoint: without a layer number, as all layers are one tensor
    there."""
    layer: int | None
    """Layer in the whole model, counted from 0; None outside the layers."""
    kind: Kind
    """How the parts are joined and sharded."""
    parts: tuple[str, ...]
    """HF names, in the order of the runs' part numbers."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the parts."""
    groups: int
    """KV groups that a qkv interleaves."""

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names with the global layer number: TransformerEngine's layer spec and the
        local one.
        """
        if self.layer is None:
            return (self.key,)
        rest = self.key.removeprefix("decoder.layers.")
        return tuple(
            f"decoder.layers.{self.layer}.{name}"
            for name in dict.fromkeys([rest, LOCAL_NAMES.get(rest, rest)])
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter, without padding."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    @property
    def columns(self) -> int:
        """Elements of a row; 1 for vectors."""
        return self.shape[1] if len(self.shape) > 1 else 1

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """(part, first row there, rows), in the order of the parameter's rows at TP 1."""
        if self.kind != "qkv":
            return [(part, 0, shape[0]) for part, shape in enumerate(self.shapes)]
        heights = [shape[0] // self.groups for shape in self.shapes]
        return [
            (part, g * rows, rows) for g in range(self.groups) for part, rows in enumerate(heights)
        ]

    def local_ranges(
        self, tp_rank: int, tp: int, *, padded_rows: int
    ) -> tuple[list[tuple[int, int]], tuple[int, int]]:
        """The rows [first, last) at TP 1, in local order, and the columns [first, last), that a
        rank holds.
        """
        columns = (0, self.columns)
        if self.kind == "replicated":
            return [(0, self.shape[0])], columns
        if self.kind == "columns":
            width = self.columns // tp
            return [(0, self.shape[0])], (tp_rank * width, (tp_rank + 1) * width)
        if self.kind == "gate_up":
            height = self.shapes[0][0]
            part = height // tp
            return [(up + tp_rank * part, up + (tp_rank + 1) * part) for up in (0, height)], columns
        part = (padded_rows if self.kind == "vocab" else self.shape[0]) // tp
        return [(tp_rank * part, (tp_rank + 1) * part)], columns

    def from_hf(
        self,
        hf: Sequence[StoredTensor],
        dtype: str,
        ranges: Sequence[tuple[int, int]],
        columns: tuple[int, int],
    ) -> Piece:
        """The rectangle `ranges` x `columns` of the Megatron parameter, made of its HF tensors."""
        runs = row_ranges([Run(hf[part], row, rows) for part, row, rows in self.runs], ranges)
        return self._piece(runs, dtype, ranges, columns)

    def from_megatron(
        self,
        megatron: StoredTensor,
        dtype: str,
        ranges: Sequence[tuple[int, int]],
        columns: tuple[int, int],
    ) -> Piece:
        """The rectangle `ranges` x `columns` of the Megatron parameter, out of a checkpoint of any
        layout.
        """
        runs = row_ranges([Run(megatron, 0, self.shape[0])], ranges)
        return self._piece(runs, dtype, ranges, columns)

    def _piece(
        self,
        runs: tuple[Run, ...],
        dtype: str,
        ranges: Sequence[tuple[int, int]],
        columns: tuple[int, int],
    ) -> Piece:
        height, width = sum(last - first for first, last in ranges), columns[1] - columns[0]
        shape = (height, width) if len(self.shape) > 1 else (height,)
        return Piece(f"{self.key}[{self.layer}]", dtype, shape, runs, columns[0], width)

    def to_hf(self, megatron: StoredTensor, part: int, dtype: str) -> Piece:
        """HF tensor `part`, made of the Megatron parameter in a checkpoint."""
        runs, top = [], 0
        for owner, _, rows in self.runs:
            if owner == part:
                runs.append(Run(megatron, top, rows))
            top += rows
        return Piece(self.parts[part], dtype, self.shapes[part], tuple(runs), 0, self.columns)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """The HF tensors, out of every tensor-parallel rank's live parameter in rank order.

        A vocabulary is padded.

        What is whole on one rank is a view of its parameter.
        """
        if self.kind == "replicated":
            return [shards[0]]
        if self.kind == "columns":
            return [_joined(shards, dim=1)]
        if self.kind == "gate_up":
            halves = [shard.chunk(2) for shard in shards]
            return [_joined([half[i] for half in halves]) for i in range(2)]
        if self.kind == "vocab":
            return [_joined(shards)]
        everything = _joined(shards)
        parts: list[list[Tensor]] = [[] for _ in self.parts]
        top = 0
        for part, _, rows in self.runs:
            parts[part].append(everything[top : top + rows])
            top += rows
        return [_joined(rows) for rows in parts]


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    import torch

    return torch.cat(list(tensors), dim) if len(tensors) > 1 else tensors[0]


class Weights(Protocol):
    """Where weights come from: an HF directory or a Megatron checkpoint."""

    @property
    def dtype(self) -> str:
        """Key of DTYPE_BYTES: the embedding's dtype, which stands for all matrices."""

    def megatron_piece(
        self, entry: Entry, ranges: Sequence[tuple[int, int]], columns: tuple[int, int]
    ) -> Piece:
        """The rectangle of a Megatron parameter, in the files' own dtype."""


def entries(architecture: Architecture) -> Iterator[Entry]:
    """Every parameter of the model once, in forward order.

    A tied output weight has no entry: it is the embedding.
    """
    a = architecture
    sizes = {
        "hidden": a.hidden_size,
        "ffn": a.ffn_size,
        "q": a.num_heads * a.head_dim,
        "kv": a.num_kv_heads * a.head_dim,
        "head": a.head_dim,
    }
    table = (a.vocab_size, a.hidden_size)
    yield Entry(EMBEDDING, None, "vocab", (HF_EMBEDDING,), (table,), 1)
    for layer in range(a.num_layers):
        for key, kind, parts, trait in LAYER:
            if not trait or getattr(a, trait):
                yield Entry(
                    key=f"decoder.layers.{key}",
                    layer=layer,
                    kind=kind,
                    parts=tuple(f"model.layers.{layer}.{name}" for name, *_ in parts),
                    shapes=tuple(tuple(sizes[size] for size in dims) for _, *dims in parts),
                    groups=a.num_kv_heads,
                )
    yield Entry(
        "decoder.final_layernorm.weight",
        None,
        "replicated",
        ("model.norm.weight",),
        ((a.hidden_size,),),
        1,
    )
    if not a.tied:
        yield Entry(OUTPUT, None, "vocab", (HF_OUTPUT,), (table,), 1)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """HF name -> shape of every tensor of the model, in forward order."""
    return {
        name: shape
        for e in entries(architecture)
        for name, shape in zip(e.parts, e.shapes, strict=True)
    }
