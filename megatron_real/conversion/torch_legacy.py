"""Megatron's older `torch` checkpoints: a torch.save file for each rank of a fixed layout.

    mp_rank_TT/model_optim_rng.pt          TT the tensor-parallel rank
    mp_rank_TT_PPP/model_optim_rng.pt      PPP the pipeline stage, where there are several

A file holds {"args", "model": parameter name -> tensor}, or "model0", "model1", ... with virtual
stages. Names are those of the layer spec, layers are numbered from 0 in each stage; stages may hold
unequal numbers of them. The optimizer is never opened.
"""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from megatron_real.conversion.arguments import megatron_args
from megatron_real.conversion.torch_dist import EXTRA_STATE
from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.containers import PickledTensor, TorchFile, blank_archive, tensors_of
from megatron_real.weights.mapping import (
    EMBEDDING,
    OUTPUT,
    Coordinates,
    Entry,
    Rectangle,
    Weights,
    entries,
)
from megatron_real.weights.stored import (
    DTYPE_BYTES,
    Extent,
    Piece,
    StoredTensor,
    torch_dtype,
    whole,
)
from megatron_real.weights.transfer import Output, Target

FILE = "model_optim_rng.pt"
_LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.", re.ASCII)
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")


class _RankState:
    """The model's part of one rank's file.

    Raises:
        WeightsError: it is corrupt or hostile, or holds no model.
    """

    def __init__(self, file: TorchFile) -> None:
        self.file = file
        state: dict[str, Any] = {}
        if isinstance(file.object, dict):
            state = file.object
        self.arguments = state.get("args")
        # More virtual chunks than any model has layers.
        names = ["model", *(f"model{i}" for i in range(1000))]
        keys = [name for name in names if name in state]
        if "model" in keys and len(keys) > 1:
            raise WeightsError(
                f"{file.file} has both model and {keys[1]}; it is unclear which is meant"
            )

        self.chunks: list[dict[str, PickledTensor]] = []
        """Of each virtual chunk: parameter name in the chunk -> tensor."""
        for key in keys:
            if not isinstance(state[key], dict):
                raise WeightsError(f"{file.file}: its {key} is no table of tensors; copy it again")

            self.chunks.append(tensors_of(state[key], file.file))
        if not self.chunks:
            raise WeightsError(f"{file.file} has no model; it is not a checkpoint of Megatron-LM")

    def layers(self, chunk: int) -> int:
        """Returns how many layers a virtual chunk has.

        Raises:
            WeightsError: they are not numbered from 0.
        """
        matches = [_LAYER.match(name) for name in self.chunks[chunk]]
        numbers = {int(match[1]) for match in matches if match is not None}
        if numbers != set(range(len(numbers))):
            raise WeightsError(
                f"{self.file.file}: its layers are numbered {sorted(numbers)}, not from 0 on; it "
                f"is incomplete, or was not written by Megatron-LM"
            )
        return len(numbers)


class TorchLegacyWeights:
    """The weights of a `torch` checkpoint of any TP, PP and VPP.

    Raises:
        WeightsError: files are missing, corrupt or hostile.
    """

    def __init__(self, directory: Path, architecture: Architecture) -> None:
        self.directory = directory
        self.architecture = architecture
        matches = [_RANK.fullmatch(path.name) for path in directory.iterdir()]
        ranks = sorted(match.groups() for match in matches if match is not None)
        # The directories' names are all that says how large the layout is.
        self.tp = 1 + max((int(tp) for tp, _ in ranks), default=0)
        self.pp = 1 + max((int(pp or 0) for _, pp in ranks), default=0)
        if len(ranks) != self.tp * self.pp:
            raise WeightsError(
                f"{directory} has {len(ranks)} of {self.tp} x {self.pp} mp_rank directories; copy "
                f"it again"
            )

        states: dict[tuple[int, int], _RankState] = {}
        for tp, pp in ranks:
            name = f"mp_rank_{tp}"
            if pp is not None:
                name += f"_{pp}"
            states[int(tp), int(pp or 0)] = _RankState(TorchFile(directory / name / FILE))
        self.arguments = states[0, 0].arguments
        """Megatron-LM's arguments that the checkpoint was trained with; None where it has none."""

        first_layers = self._first_layers(states)
        self._parameters: list[dict[str, tuple[TorchFile, PickledTensor]]] = []
        """Of each tensor-parallel rank: parameter name in the whole model -> file and tensor."""
        for rank in range(self.tp):
            parameters = {}
            for (stage, chunk), first_layer in first_layers.items():
                state = states[rank, stage]
                for name, tensor in state.chunks[chunk].items():
                    match = _LAYER.match(name)
                    if match is not None:
                        number = first_layer + int(match[1])
                        name = f"decoder.layers.{number}.{name[match.end() :]}"
                    parameters[name] = (state.file, tensor)
            self._parameters.append(parameters)

    def _first_layers(
        self, states: dict[tuple[int, int], _RankState]
    ) -> dict[tuple[int, int], int]:
        """Returns (stage, virtual chunk) -> number in the whole model of its first layer.

        Layers go through all stages before they come back to the first one's next chunk.

        Raises:
            WeightsError: the ranks disagree, or there are more or fewer layers than the model has.
        """
        if len({len(state.chunks) for state in states.values()}) > 1:
            raise WeightsError(
                f"{self.directory}: its ranks have unequal numbers of virtual chunks"
            )

        first_layers = {}
        num_layers = 0
        for chunk in range(len(states[0, 0].chunks)):
            for stage in range(self.pp):
                heights = {states[rank, stage].layers(chunk) for rank in range(self.tp)}
                if len(heights) > 1:
                    raise WeightsError(
                        f"{self.directory}: the tensor-parallel ranks of pipeline stage {stage} "
                        f"have unequal numbers of layers; copy it again"
                    )
                first_layers[stage, chunk] = num_layers
                num_layers += heights.pop()

        if num_layers != self.architecture.num_layers:
            raise WeightsError(
                f"{self.directory} has {num_layers} layers where config.json asks for "
                f"{self.architecture.num_layers}; they do not belong together"
            )

        return first_layers

    @property
    def dtype(self) -> str:
        """The embedding's dtype, which stands for all matrices."""
        return self.tensor(next(entries(self.architecture))).dtype

    @property
    def unmapped(self) -> list[str]:
        """Parameters that no HF tensor stands for."""
        known = {OUTPUT}
        for entry in entries(self.architecture):
            known.update(entry.names)
        held: set[str] = set()
        for parameters in self._parameters:
            # The extra states are TransformerEngine's for fp8, and hold no weight.
            held.update(name for name in parameters if not name.endswith("._extra_state"))
        return sorted(held - known)

    def tensor(self, entry: Entry) -> StoredTensor:
        """Returns where a parameter lies, over all ranks.

        Raises:
            WeightsError: a rank lacks it, or its shape is not the model's.
        """
        names = [name for name in entry.names if name in self._parameters[0]]
        if len(names) > 1:
            raise WeightsError(
                f"{self.directory} has one parameter twice, as {names[0]} and {names[1]}; it is "
                f"unclear which is meant"
            )
        if not names or any(names[0] not in parameters for parameters in self._parameters):
            raise WeightsError(
                f"{self.directory} has no tensor {entry.names[-1]}; it is not a checkpoint of this "
                f"model"
            )

        name = names[0]

        # Every rank has a replicated parameter whole; `copies` compares them.
        parts = self._parameters
        if entry.kind == "replicated":
            parts = parts[:1]
        extents: list[Extent] = []
        padded_rows = 0
        for rank, parameters in enumerate(parts):
            file, pickled = parameters[name]
            stored = file.stored(name, pickled)
            if entry.kind == "vocab":
                # Megatron pads a vocabulary for the TP of its training: only the file says how far.
                padded_rows = max(entry.shape[0], stored.shape[0] * self.tp)
            extents += self._extents(entry, stored, rank, padded_rows)

        shape = entry.shape
        if entry.kind == "vocab":
            shape = (padded_rows, *entry.shape[1:])
        tensor = StoredTensor(name, stored.dtype, shape, tuple(extents))
        # Each element once: parts of two layouts in one directory overlap, or leave gaps.
        tensor.check_tiling()
        return tensor

    def copies(self) -> Iterator[tuple[str, Piece, Piece]]:
        """Yields (name, tensor, the one it must be a copy of) of what is not read as a weight.

        That is the last stage's output layer of a tied model, and what every tensor-parallel rank
        holds whole.
        """
        if self.architecture.tied and OUTPUT in self._parameters[0]:
            embedding = next(entries(self.architecture))
            output = self.tensor(dataclasses.replace(embedding, key=OUTPUT))
            table = self.tensor(embedding)
            yield (
                OUTPUT,
                embedding.to_hf(output, 0, output.dtype),
                embedding.to_hf(table, 0, table.dtype),
            )

        for entry in entries(self.architecture):
            if entry.kind != "replicated":
                continue

            names = [n for n in entry.names if all(n in rank for rank in self._parameters)]
            if not names:
                continue  # `tensor` names what is missing

            name = names[0]
            first_file, first_tensor = self._parameters[0][name]
            # Every other rank's copy against the first one's.
            for parameters in self._parameters[1:]:
                file, pickled = parameters[name]
                copy = file.stored(f"{name} of {file.file.parent.name}", pickled)
                yield copy.name, whole(copy), whole(first_file.stored(name, first_tensor))

    def _extents(
        self, entry: Entry, stored: StoredTensor, rank: int, padded_rows: int
    ) -> Iterator[Extent]:
        """Yields a rank's parameter as rectangles of the whole one."""
        (local,) = stored.extents
        # Where our own mapping would cut it for this rank: the file must agree.
        rectangle = entry.shard(Coordinates(rank, self.tp), padded_rows=padded_rows)
        if stored.shape != entry.shape_of(rectangle):
            raise WeightsError(
                f"{local.file}: {stored.name} has the shape {list(stored.shape)}, which is not a "
                f"{self.tp}th part of {list(entry.shape)}; the config.json is of another model"
            )

        row_bytes = rectangle.width * DTYPE_BYTES[stored.dtype]
        first_column, _ = rectangle.columns
        offset = local.offset
        # A gate_up has two ranges of rows, one after the other in the rank's file.
        for first, last in rectangle.rows:
            rows = last - first
            yield Extent(local.file, offset, first, first_column, rows, rectangle.width)
            offset += rows * row_bytes

    def megatron_piece(self, entry: Entry, rectangle: Rectangle) -> Piece:
        """Returns a rectangle of a parameter, in the checkpoint's dtype."""
        tensor = self.tensor(entry)
        return entry.from_megatron(tensor, tensor.dtype, rectangle)


def plan_torch_legacy(
    weights: Weights,
    architecture: Architecture,
    *,
    dtype: str | None,
    tp: int,
    pp: int,
    layers: Literal["te", "local"],
    prefix: str,
) -> Output:
    """Returns the plan of a `torch` checkpoint.

    Args:
        weights: where its weights come from.
        architecture: the model.
        dtype: key of DTYPE_BYTES; None keeps the source's.
        tp, pp: the layout, which this format fixes.
        layers: whose parameter names: TransformerEngine's layer spec or the local one.
        prefix: directory of the checkpoint within the output, with its slash.

    Raises:
        WeightsError: a tensor is missing or wrong, or the layout does not divide the model.
    """
    import torch

    sizes = {
        "num_key_value_heads": architecture.num_kv_heads,
        "intermediate_size": architecture.ffn_size,
    }
    for name, size in sizes.items():
        if tp < 1 or size % tp:
            raise WeightsError(f"--tp {tp} does not divide the model's {name} {size}")
    if pp < 1 or architecture.num_layers % pp:
        raise WeightsError(
            f"--pp {pp} does not divide the model's {architecture.num_layers} layers"
        )

    # A file for each rank of the layout, laid out before any byte of a tensor is there.
    output = Output()
    args = megatron_args(
        architecture, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
    )
    for rank in range(tp):
        for stage in range(pp):
            pieces = _pieces(
                weights,
                architecture,
                dtype=dtype,
                tp=tp,
                rank=rank,
                stage=stage,
                pp=pp,
                layers=layers,
            )
            # Tensors of these shapes, whose memory is never touched.
            model: OrderedDict[str, Any] = OrderedDict()
            for name, piece in pieces.items():
                model[name] = torch.empty(piece.shape, dtype=torch_dtype(piece.dtype))
            # Values of None, as TransformerEngine's modules without fp8 have them.
            model.update(dict.fromkeys(_extra_states(pieces, layers)))
            # Below version 2.0 Megatron-LM takes a query-key-value for one in another order, and
            # reorders it.
            state = {"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": model}
            archive = blank_archive(state)

            directory = f"mp_rank_{rank:02d}"
            if pp > 1:
                directory += f"_{stage:03d}"
            file = f"{prefix}{directory}/{FILE}"
            output.sizes[file] = archive.size
            for offset, data in archive.literals:
                output.literals.append((file, offset, data))
            # torch.save pickles a table in its order, and so the slots are in that of the pieces.
            for slot, piece in zip(archive.slots, pieces.values(), strict=True):
                output.targets.append(Target(file, slot.offset, piece, slot.crc_offsets))

    return output


def _pieces(
    weights: Weights,
    architecture: Architecture,
    *,
    dtype: str | None,
    tp: int,
    rank: int,
    stage: int,
    pp: int,
    layers: Literal["te", "local"],
) -> dict[str, Piece]:
    """Returns parameter name of a rank -> the piece of it."""
    layers_per_stage = architecture.num_layers // pp
    pieces = {}
    for entry in entries(architecture):
        # The last name is the local layer spec's; they differ for norms only.
        name = entry.names[-1]
        if layers == "te":
            name = entry.names[0]

        # Whether this stage has the parameter, and under which number.
        if entry.layer is not None:
            if entry.layer // layers_per_stage != stage:
                continue
            local = entry.layer % layers_per_stage
            name = name.replace(f"layers.{entry.layer}.", f"layers.{local}.")
        elif entry.key == EMBEDDING:
            if stage > 0 and not (architecture.tied and stage == pp - 1):
                continue
            if stage > 0:
                name = OUTPUT  # the last stage's copy of the tied embedding
        # The final norm, and an output layer of its own.
        elif stage != pp - 1:
            continue

        rectangle = entry.shard(Coordinates(rank, tp), padded_rows=architecture.padded_vocab(tp))
        piece = weights.megatron_piece(entry, rectangle)
        pieces[name] = piece.cast(dtype or piece.dtype)
    return pieces


def _extra_states(pieces: dict[str, Piece], layers: Literal["te", "local"]) -> list[str]:
    """Returns the names of the modules' empty states, which a strict load_state_dict asks for."""
    modules = list(EXTRA_STATE)
    if layers == "local":
        # The attention of the local layers has no state.
        modules.remove("self_attention.core_attention")
    matches = [_LAYER.match(name) for name in pieces]
    prefixes = sorted({match[0] for match in matches if match is not None})

    names = [f"{prefix}{module}._extra_state" for prefix in prefixes for module in modules]
    if OUTPUT in pieces:
        names.append("output_layer._extra_state")
    return names
