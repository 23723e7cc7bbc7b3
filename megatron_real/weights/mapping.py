"""The one mapping between HF and Megatron weights: names, shapes, and which row goes where.

Conversion, loading, weight sync and export all walk `entries(architecture)`. An entry ties one
Megatron parameter to the one to three HF tensors it is made of, always as whole rows (`spans`).

    linear_qkv      q_proj, k_proj, v_proj: per KV group its q rows, its k rows, its v rows.
                    Tensor parallelism splits it over rows.
    linear_fc1      gate_proj, up_proj: gate rows, then up rows. Each half is split over rows.
    embedding       embed_tokens, and lm_head likewise: padded to a multiple of 128 * TP rows, split
                    over rows.
    linear_proj, linear_fc2
                    o_proj, down_proj: one to one, split over columns.
    norms, and the biases of linear_proj and linear_fc2
                    one to one, replicated.

A new architecture is a line in architecture.SUPPORTED, its traits, and rows of LAYER that hold for
a trait.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from megatron_real.weights.architecture import Architecture
from megatron_real.weights.stored import Piece, RowSpan, StoredTensor, cut_rows

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["qkv", "gate_up", "vocab", "columns", "replicated"]
"""How HF tensors are joined to a Megatron parameter, and where it is cut for its ranks."""

Axis = Literal["tp"]
"""An axis of the ranks' layout over which parameters are cut. Pipeline stages hold whole ones."""


@dataclass(frozen=True)
class Coordinates:
    """Where a rank is on each axis."""

    tp_rank: int
    """Number among the tensor-parallel ranks."""
    tp: int
    """How many tensor-parallel ranks there are."""

    def on(self, axis: Axis | None) -> tuple[int, int]:
        """Returns the rank's number on an axis and the axis's size; (0, 1) for no axis."""
        if axis is None:
            return 0, 1
        return self.tp_rank, self.tp


@dataclass(frozen=True)
class Rectangle:
    """Some rows and columns of a Megatron parameter. A vector has one column."""

    rows: tuple[tuple[int, int], ...]
    """Ranges [first, last) of rows, one below the other."""
    columns: tuple[int, int]
    """Range [first, last) of columns."""

    @property
    def height(self) -> int:
        """Number of rows."""
        return sum(last - first for first, last in self.rows)

    @property
    def width(self) -> int:
        """Number of columns."""
        first, last = self.columns
        return last - first


class PartSpan(NamedTuple):
    """Consecutive rows of an HF tensor within a Megatron parameter."""

    part: int
    """Number of the HF tensor among those that the parameter is made of."""
    row: int
    """First row there."""
    rows: int
    """How many."""


@dataclass(frozen=True)
class LayerRow:
    """A row of the table below: a Megatron parameter of a layer, and what it is made of."""

    name: str
    """Name in a checkpoint, where a norm belongs to the linear after it, as TransformerEngine fuses
    them."""
    kind: Kind
    """How the parts are joined and sharded."""
    parts: Mapping[str, tuple[str, ...]]
    """HF name of each part -> its dimensions, as `entries` names their sizes."""
    trait: str = ""
    """The trait of `Architecture` that it needs; "" for a parameter that every model has."""


LAYER: tuple[LayerRow, ...] = (
    LayerRow(
        "self_attention.linear_qkv.layer_norm_weight",
        "replicated",
        {"input_layernorm.weight": ("hidden",)},
    ),
    LayerRow(
        "self_attention.linear_qkv.weight",
        "qkv",
        {
            "self_attn.q_proj.weight": ("q", "hidden"),
            "self_attn.k_proj.weight": ("kv", "hidden"),
            "self_attn.v_proj.weight": ("kv", "hidden"),
        },
    ),
    LayerRow(
        "self_attention.linear_qkv.bias",
        "qkv",
        {
            "self_attn.q_proj.bias": ("q",),
            "self_attn.k_proj.bias": ("kv",),
            "self_attn.v_proj.bias": ("kv",),
        },
        trait="qkv_bias",
    ),
    LayerRow(
        "self_attention.q_layernorm.weight",
        "replicated",
        {"self_attn.q_norm.weight": ("head",)},
        trait="qk_norm",
    ),
    LayerRow(
        "self_attention.k_layernorm.weight",
        "replicated",
        {"self_attn.k_norm.weight": ("head",)},
        trait="qk_norm",
    ),
    LayerRow(
        "self_attention.linear_proj.weight",
        "columns",
        {"self_attn.o_proj.weight": ("hidden", "q")},
    ),
    LayerRow(
        "self_attention.linear_proj.bias",
        "replicated",
        {"self_attn.o_proj.bias": ("hidden",)},
        trait="linear_bias",
    ),
    LayerRow(
        "mlp.linear_fc1.layer_norm_weight",
        "replicated",
        {"post_attention_layernorm.weight": ("hidden",)},
    ),
    LayerRow(
        "mlp.linear_fc1.weight",
        "gate_up",
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
    ),
    LayerRow(
        "mlp.linear_fc1.bias",
        "gate_up",
        {"mlp.gate_proj.bias": ("ffn",), "mlp.up_proj.bias": ("ffn",)},
        trait="linear_bias",
    ),
    LayerRow("mlp.linear_fc2.weight", "columns", {"mlp.down_proj.weight": ("hidden", "ffn")}),
    LayerRow(
        "mlp.linear_fc2.bias",
        "replicated",
        {"mlp.down_proj.bias": ("hidden",)},
        trait="linear_bias",
    ),
)
"""Parameters of a layer, in forward order."""

# The norms' names in megatron-core's local layer spec, where they are modules of their own.
LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}

EMBEDDING = "embedding.word_embeddings.weight"
LAYERS = "decoder.layers."
"""How the key of every parameter of a layer begins."""
FINAL_NORM = "decoder.final_layernorm.weight"
OUTPUT = "output_layer.weight"
HF_EMBEDDING = "model.embed_tokens.weight"
HF_OUTPUT = "lm_head.weight"


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
    """HF names, in the order of the spans' part numbers."""
    shapes: tuple[tuple[int, ...], ...]
    """Shapes of the parts."""
    groups: int
    """KV groups that a qkv interleaves."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names with the layer's number: that of TransformerEngine's layer spec, then the local."""
        if self.layer is None:
            return (self.key,)
        name = self.key.removeprefix(LAYERS)
        # Without repeats where both spellings are one.
        spellings = dict.fromkeys([name, LOCAL_NAMES.get(name, name)])
        return tuple(f"{LAYERS}{self.layer}.{spelling}" for spelling in spellings)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter, without padding."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    @property
    def columns(self) -> int:
        """Elements of a row; 1 for vectors."""
        if len(self.shape) == 1:
            return 1
        return self.shape[1]

    @property
    def over(self) -> Axis | None:
        """The axis of ranks that the parameter is cut over; None where each rank has all of it."""
        if self.kind == "replicated":
            return None
        return "tp"

    @property
    def spans(self) -> list[PartSpan]:
        """What the parameter is made of, in the order of its rows when it is not cut."""
        if self.kind != "qkv":
            return [PartSpan(part, 0, shape[0]) for part, shape in enumerate(self.shapes)]

        # Interleaved by KV group, so that a tensor-parallel rank's whole groups are adjacent rows.
        spans = []
        for group in range(self.groups):
            for part, shape in enumerate(self.shapes):
                rows = shape[0] // self.groups
                spans.append(PartSpan(part, group * rows, rows))
        return spans

    def shard(self, coordinates: Coordinates, *, padded_rows: int) -> Rectangle:
        """Returns what a rank holds of the parameter.

        Args:
            coordinates: where the rank is.
            padded_rows: rows of the padded vocabulary; read for a vocabulary only.

        Returns:
            Rows and columns of the parameter that is not cut, in the rank's own order.
        """
        number, ranks = coordinates.on(self.over)
        rows = self.shape[0]
        columns = (0, self.columns)
        if self.kind == "columns":
            # A column-cut matrix has all rows on every rank, and a part of each.
            width = self.columns // ranks
            return Rectangle(((0, rows),), (number * width, (number + 1) * width))
        if self.kind == "gate_up":
            # A rank holds its part of the gate and its part of up, one below the other.
            up = self.shapes[0][0]
            part = up // ranks
            first = number * part
            last = first + part
            return Rectangle(((first, last), (up + first, up + last)), columns)

        if self.kind == "vocab":
            rows = padded_rows
        # Without a rest: a vocabulary is padded for it, and heads that TP does not divide are
        # refused.
        part = rows // ranks
        return Rectangle(((number * part, (number + 1) * part),), columns)

    def from_hf(
        self,
        hf: Sequence[StoredTensor],
        dtype: str,
        rectangle: Rectangle,
    ) -> Piece:
        """Returns a rectangle of the parameter, made of its HF tensors."""
        spans = [RowSpan(hf[part], row, rows) for part, row, rows in self.spans]
        return self._piece(spans, dtype, rectangle)

    def from_megatron(self, megatron: StoredTensor, dtype: str, rectangle: Rectangle) -> Piece:
        """Returns a rectangle of the parameter, out of any checkpoint."""
        return self._piece([RowSpan(megatron, 0, self.shape[0])], dtype, rectangle)

    def _piece(self, spans: Sequence[RowSpan], dtype: str, rectangle: Rectangle) -> Piece:
        """Returns a rectangle of the parameter, whose rows are those of `spans`."""
        return Piece(
            name=f"{self.key}[{self.layer}]",
            dtype=dtype,
            shape=self.shape_of(rectangle),
            spans=cut_rows(spans, rectangle.rows),
            first_column=rectangle.columns[0],
            columns=rectangle.width,
        )

    def shape_of(self, rectangle: Rectangle) -> tuple[int, ...]:
        """Returns the shape of a tensor that holds a rectangle of the parameter."""
        if len(self.shape) == 1:
            return (rectangle.height,)
        return rectangle.height, rectangle.width

    def to_hf(self, megatron: StoredTensor, part: int, dtype: str) -> Piece:
        """Returns HF tensor `part`, made of the Megatron parameter in a checkpoint."""
        spans = []
        top = 0
        for owner, _, rows in self.spans:
            # Between two spans of one part lie those of the others, where a qkv interleaves them.
            if owner == part:
                spans.append(RowSpan(megatron, top, rows))
            top += rows
        return Piece(self.parts[part], dtype, self.shapes[part], tuple(spans), columns=self.columns)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Returns the HF tensors, out of every tensor-parallel rank's live parameter.

        What is whole on one rank is a view of its parameter. A vocabulary stays padded.

        Args:
            shards: the parameter on each tensor-parallel rank, in rank order.
        """
        if self.kind == "replicated":
            return [shards[0]]
        if self.kind == "columns":
            return [_joined(shards, dim=1)]
        if self.kind == "gate_up":
            # Each rank has its gate rows above its up rows.
            halves = [shard.chunk(2) for shard in shards]
            return [_joined([half[i] for half in halves]) for i in range(2)]
        if self.kind == "vocab":
            return [_joined(shards)]

        qkv = _joined(shards)
        # Undoes the interleaving: each span goes to the HF tensor that it is of.
        rows_of_parts: list[list[Tensor]] = [[] for _ in self.parts]
        top = 0
        for part, _, rows in self.spans:
            rows_of_parts[part].append(qkv[top : top + rows])
            top += rows
        return [_joined(rows) for rows in rows_of_parts]


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Returns the tensors concatenated; a single one as it is, without a copy."""
    import torch

    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(list(tensors), dim)


class Weights(Protocol):
    """Where weights come from: an HF directory or a Megatron checkpoint."""

    @property
    def dtype(self) -> str:
        """Key of DTYPE_BYTES: the embedding's dtype, which stands for all matrices."""

    def megatron_piece(self, entry: Entry, rectangle: Rectangle) -> Piece:
        """Returns a rectangle of a Megatron parameter, in the files' own dtype."""


def entries(architecture: Architecture) -> Iterator[Entry]:
    """Yields every parameter of the model once, in forward order.

    A tied output weight has no entry: it is the embedding.
    """
    a = architecture
    # What the names of dimensions in LAYER stand for.
    sizes = {
        "hidden": a.hidden_size,
        "ffn": a.ffn_size,
        "q": a.num_heads * a.head_dim,
        "kv": a.num_kv_heads * a.head_dim,
        "head": a.head_dim,
    }
    # Without padding: HF knows none, and every layout has another.
    table = (a.vocab_size, a.hidden_size)

    yield Entry(EMBEDDING, None, "vocab", (HF_EMBEDDING,), (table,), 1)

    for layer in range(a.num_layers):
        for row in LAYER:
            # Families differ in traits alone: no row names a family.
            if row.trait and not getattr(a, row.trait):
                continue
            shapes = [tuple(sizes[name] for name in dims) for dims in row.parts.values()]
            yield Entry(
                key=f"{LAYERS}{row.name}",
                layer=layer,
                kind=row.kind,
                parts=tuple(f"model.layers.{layer}.{name}" for name in row.parts),
                shapes=tuple(shapes),
                groups=a.num_kv_heads,
            )

    yield Entry(
        key=FINAL_NORM,
        layer=None,
        kind="replicated",
        parts=("model.norm.weight",),
        shapes=((a.hidden_size,),),
        groups=1,
    )
    if not a.tied:
        yield Entry(OUTPUT, None, "vocab", (HF_OUTPUT,), (table,), 1)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Returns HF name -> shape of every tensor of the model, in forward order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in entries(architecture):
        shapes.update(zip(entry.parts, entry.shapes, strict=True))
    return shapes
