"""Megatron's older `torch` checkpoints: one torch.save file for each tensor- and pipeline-parallel rank.

    mp_rank_TT/model_optim_rng.pt          TT the tensor-parallel rank
    mp_rank_TT_PPP/model_optim_rng.pt      PPP the pipeline stage, where there are several

A file holds {"args", "model": parameter name -> tensor}, or "model0", "model1", ... with virtual stages. Names are
those of the layer spec, layers are numbered from 0 in each stage. The optimizer is never opened.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.containers import PickledTensor, TorchFile, layout
from megatron_real.weights.mapping import EMBEDDING, OUTPUT, Entry, Weights, entries
from megatron_real.weights.stored import DTYPE_BYTES, Chunk, Piece, StoredTensor, torch_dtype
from megatron_real.weights.torch_dist import EXTRA_STATE, megatron_args
from megatron_real.weights.transfer import Output, Target

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")


class TorchLegacyWeights:
    """The weights of a `torch` checkpoint of any TP, PP and VPP.

    Raises:
        WeightsError: files are missing, corrupt or hostile.
    """

    def __init__(self, directory: Path, architecture: Architecture) -> None:
        self.directory, self.architecture = directory, architecture
        ranks = sorted(match.groups() for path in directory.iterdir() if (match := _RANK.fullmatch(path.name)))
        self.tp = 1 + max((int(tp) for tp, _ in ranks), default=0)
        self.pp = 1 + max((int(pp or 0) for _, pp in ranks), default=0)
        if len(ranks) != self.tp * self.pp:
            raise WeightsError(
                f"{directory} has {len(ranks)} of {self.tp} x {self.pp} mp_rank directories; copy it again"
            )
        self._parameters: list[dict[str, tuple[TorchFile, PickledTensor]]] = [{} for _ in range(self.tp)]
        for tp, pp in ranks:
            suffix = "" if pp is None else f"_{pp}"
            file = TorchFile(directory / f"mp_rank_{tp}{suffix}" / FILE)
            self._parameters[int(tp)] |= self._stage(file, int(pp or 0))

    def _stage(self, file: TorchFile, stage: int) -> dict[str, tuple[TorchFile, PickledTensor]]:
        """A rank's parameters by their names in the whole model."""
        state = file.object if isinstance(file.object, dict) else {}
        chunks = [
            state[key] for key in ("model", *(f"model{i}" for i in range(1000))) if isinstance(state.get(key), dict)
        ]
        if not chunks:
            raise WeightsError(f"{file.file} has no model; it is not a checkpoint of Megatron-LM")
        per_chunk = self.architecture.num_layers // (self.pp * len(chunks))
        found = {}
        for i, chunk in enumerate(chunks):
            first = (i * self.pp + stage) * per_chunk
            for name, tensor in chunk.items():
                if isinstance(tensor, PickledTensor):
                    whole = re.sub(r"(?<=decoder\.layers\.)\d+", lambda m: str(int(m[0]) + first), str(name))  # noqa: B023
                    found[whole] = (file, tensor)
        return found

    @property
    def dtype(self) -> str:
        """The embedding's dtype, which stands for all matrices."""
        return self.tensor(next(entries(self.architecture))).dtype

    @property
    def unmapped(self) -> list[str]:
        """Parameters that no HF tensor stands for."""
        known = {name for entry in entries(self.architecture) for name in entry.names} | {OUTPUT}
        held = {name for rank in self._parameters for name in rank if not name.endswith("._extra_state")}
        return sorted(held - known)

    def tensor(self, entry: Entry) -> StoredTensor:
        """Where a parameter lies, over all ranks.

        Raises:
            WeightsError: a rank lacks it, or its shape is not the model's.
        """
        name = next((name for name in entry.names if name in self._parameters[0]), None)
        if name is None or any(name not in rank for rank in self._parameters):
            raise WeightsError(
                f"{self.directory} has no tensor {entry.names[-1]}; it is not a checkpoint of this model"
            )
        chunks: list[Chunk] = []
        rows = 0
        for rank, parameters in enumerate(self._parameters if entry.kind != "replicated" else self._parameters[:1]):
            file, tensor = parameters[name]
            stored = file.stored(name, tensor)
            if entry.kind == "vocab":
                rows = max(entry.shape[0], stored.shape[0] * self.tp)
            chunks += self._chunks(entry, stored, rank, rows)
        shape = (rows, *entry.shape[1:]) if entry.kind == "vocab" else entry.shape
        found = StoredTensor(name, stored.dtype, shape, tuple(chunks))
        found.check_tiling()
        return found

    def _chunks(self, entry: Entry, stored: StoredTensor, rank: int, padded_rows: int) -> Iterator[Chunk]:
        """A rank's parameter as rectangles of the whole one."""
        (local,) = stored.chunks
        ranges, (left, right) = entry.local_ranges(rank, self.tp, padded_rows=padded_rows)
        height = sum(last - first for first, last in ranges)
        if stored.shape != ((height, right - left) if len(entry.shape) > 1 else (height,)):
            raise WeightsError(
                f"{local.file}: {stored.name} has the shape {list(stored.shape)}, which is not a {self.tp}th part of "
                f"{list(entry.shape)}; the config.json is of another model"
            )
        row_bytes = (right - left) * DTYPE_BYTES[stored.dtype]
        offset = local.offset
        for first, last in ranges:
            yield Chunk(local.file, offset, first, left, last - first, right - left)
            offset += (last - first) * row_bytes

    def megatron_piece(self, entry: Entry, ranges: Sequence[tuple[int, int]], columns: tuple[int, int]) -> Piece:
        """The rectangle `ranges` x `columns` of a parameter, in the checkpoint's dtype."""
        tensor = self.tensor(entry)
        return entry.from_megatron(tensor, tensor.dtype, ranges, columns)


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
    """The files of a `torch` checkpoint with these weights.

    Args:
        weights: where they come from.
        architecture: the model.
        dtype: key of DTYPE_BYTES; None keeps the source's.
        tp, pp: the layout, which this format fixes.
        layers: whose parameter names: TransformerEngine's layer spec or the local one.
        prefix: directory of the checkpoint within the output, with its slash.

    Raises:
        WeightsError: a tensor is missing or wrong, or the layout does not divide the model.
    """
    _check_layout(architecture, tp, pp)
    output = Output()
    args = megatron_args(architecture, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    for rank in range(tp):
        for stage in range(pp):
            pieces = _pieces(weights, architecture, dtype=dtype, tp=tp, rank=rank, stage=stage, pp=pp, layers=layers)
            file = f"{prefix}mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "") + f"/{FILE}"
            state = _empty(pieces) | _extra_state(pieces, layers)
            plan = layout({"args": args, "checkpoint_version": 3.0, "iteration": 0, "model": state})
            output.sizes[file] = plan.size
            output.literals += [(file, offset, data) for offset, data in plan.literals]
            for slot, piece in zip(plan.slots, pieces.values(), strict=True):
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
    """Parameter name of a rank -> the piece of it."""
    per_stage = architecture.num_layers // pp
    pieces = {}
    for entry in entries(architecture):
        name = entry.names[0 if layers == "te" else -1]
        if entry.layer is not None:
            if entry.layer // per_stage != stage:
                continue
            name = name.replace(f"layers.{entry.layer}.", f"layers.{entry.layer % per_stage}.")
        elif stage != (0 if entry.key == EMBEDDING else pp - 1):
            if not (entry.key == EMBEDDING and architecture.tied and stage == pp - 1):
                continue
            name = OUTPUT  # the last stage's copy of the tied embedding
        ranges, columns = entry.local_ranges(rank, tp, padded_rows=architecture.padded_vocab(tp))
        piece = weights.megatron_piece(entry, ranges, columns)
        pieces[name] = piece.cast(dtype or piece.dtype)
    return pieces


def _empty(pieces: dict[str, Piece]) -> OrderedDict[str, Any]:
    """A state dict of these shapes, whose memory is never touched."""
    import torch

    return OrderedDict((name, torch.empty(p.shape, dtype=torch_dtype(p.dtype))) for name, p in pieces.items())


def _extra_state(pieces: dict[str, Piece], layers: Literal["te", "local"]) -> OrderedDict[str, Any]:
    """The empty states of modules that a strict load_state_dict asks for."""
    skipped = () if layers == "te" else ("self_attention.core_attention",)
    prefixes = sorted({match[0] for name in pieces if (match := re.match(r"decoder\.layers\.\d+\.", name))})
    modules = [prefix + module for prefix in prefixes for module in EXTRA_STATE if module not in skipped]
    modules += ["output_layer"] if OUTPUT in pieces else []
    return OrderedDict((f"{module}._extra_state", None) for module in modules)


def _check_layout(architecture: Architecture, tp: int, pp: int) -> None:
    sizes = {"num_key_value_heads": architecture.num_kv_heads, "intermediate_size": architecture.ffn_size}
    for name, size in sizes.items():
        if tp < 1 or size % tp:
            raise WeightsError(f"--tp {tp} does not divide the model's {name} {size}")
    if pp < 1 or architecture.num_layers % pp:
        raise WeightsError(f"--pp {pp} does not divide the model's {architecture.num_layers} layers")
