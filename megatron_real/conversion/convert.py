"""HF directory -> Megatron checkpoint and back, by moving bytes.

    OUT/latest_checkpointed_iteration.txt    "release", as Megatron-LM marks weights that no run
                                             has trained
    OUT/release/                             the checkpoint: torch_dist, or mp_rank_* of the older
                                             torch format
    OUT/hf/                                  the source's config, tokenizer and headers, so that
                                             an export needs no more

A conversion needs no model, process group, GPU or transformers. It takes the memory of a few
blocks, whatever the model's size.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_real.conversion.arguments import check_arguments
from megatron_real.conversion.torch_dist import CONFIG, METADATA, TorchDistWeights, plan_torch_dist
from megatron_real.conversion.torch_legacy import TorchLegacyWeights, plan_torch_legacy
from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.hf import (
    INDEX,
    SINGLE,
    HfFile,
    HfWeights,
    file_of_header,
    has_weights,
    hf_files,
    hf_side_files,
    index_of,
    open_model,
    parse_header,
    read_header,
    side_files,
    weight_index,
)
from megatron_real.weights.mapping import HF_EMBEDDING, entries, hf_shapes
from megatron_real.weights.stored import OpenFiles, Piece, same_bytes, torch_dtype
from megatron_real.weights.transfer import Limits, Output, Target, check_target, write_directory

if TYPE_CHECKING:
    from torch import Tensor

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HF = "hf"
_HEADER = ".header"
# The size to which transformers 4 fills a file by default.
_SHARD_BYTES = 5 * 10**9

Progress = Callable[[int, int], None]
"""Called with (bytes of a piece that is done, bytes in all)."""


MegatronWeights = TorchDistWeights | TorchLegacyWeights
"""The weights of a Megatron checkpoint."""


@dataclass(frozen=True)
class LegacyLayout:
    """What the older `torch` format fixes."""

    tp: int = 1
    """Tensor-parallel size."""
    pp: int = 1
    """Pipeline stages."""
    layers: Literal["te", "local"] = "te"
    """Whose parameter names: TransformerEngine's layer spec, Megatron-LM's default, or the local
    one."""


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    out: Path
    """The directory that was made."""
    num_bytes: int
    """Bytes of weights written."""
    resumed_bytes: int
    """Of these, already there from an interrupted run."""
    tensors: int
    """Tensors or chunks written."""
    dtype: str
    """Dtype of the matrices."""


def hf_to_megatron(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    tp_chunks: int = 1,
    layout: LegacyLayout | None = None,
    limits: Limits | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Writes HF weights as a Megatron checkpoint.

    That is a torch_dist checkpoint, which loads into any TP, PP and VPP, or with `layout` one of
    the older format.

    Args:
        source: HF directory.
        out: directory to make.
        dtype: key of stored.DTYPE_BYTES; None keeps each tensor's.
        tp_chunks: see torch_dist.plan_torch_dist.
        layout: write the older `torch` format, which fixes a layout.
        limits: threads and memory.
        overwrite: replace `out`.
        progress: called for each tensor that is done.

    Raises:
        WeightsError: the source cannot be converted, `out` exists, or the disk is too small; in one
            sentence.
    """
    # Before the source is opened: what cannot be written is said at once.
    check_target(out, overwrite=overwrite, sources=[source])
    architecture, weights = open_model(source)
    prefix = f"{RELEASE}/"
    if layout is None:
        plan = plan_torch_dist(
            weights, architecture, dtype=dtype, tp_chunks=tp_chunks, prefix=prefix
        )
    else:
        plan = plan_torch_legacy(
            weights,
            architecture,
            dtype=dtype,
            tp=layout.tp,
            pp=layout.pp,
            layers=layout.layers,
            prefix=prefix,
        )

    # Megatron-LM looks here for the checkpoint, and takes `release` as weights without a history.
    plan.add_file(TRACKER, RELEASE.encode())

    # What an export needs: the side files, and of safetensors the headers, which say how the
    # weights were cut. In another dtype those headers would be wrong.
    record = hf_side_files(source, dtype=dtype or weights.dtype)
    if dtype is None and all(file.suffix == ".safetensors" for file in weights.files):
        for file in weights.files:
            record[f"{file.name}{_HEADER}"] = read_header(file)
        if (source / INDEX).is_file():
            record[INDEX] = (source / INDEX).read_bytes()
    for name, data in record.items():
        plan.add_file(f"{HF}/{name}", data)

    return _write(plan, out, dtype or weights.dtype, limits, overwrite, progress)


def megatron_to_hf(
    source: Path,
    out: Path,
    *,
    hf_config: Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    texts: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Converted:
    """Writes a Megatron checkpoint as an HF directory.

    The checkpoint may be of any layout, with an optimizer or without.

    Args:
        source: checkpoint, or directory of checkpoints whose tracker names the latest.
        out: directory to make.
        hf_config: HF directory with config.json and tokenizer; None: the one that the conversion
            recorded.
        dtype: key of stored.DTYPE_BYTES; None: that of the checkpoint's matrices, for all tensors.
        max_shard_bytes: largest file; None: the files that the weights came from, where they were
            recorded and the dtype is kept, else 5 GB.
        texts: other files by their names, such as a model card.
        limits: threads and memory.
        overwrite: replace `out`.
        progress: called for each tensor that is done.

    Raises:
        WeightsError: the source cannot be converted, `out` exists, or the disk is too small; in one
            sentence.
    """
    sources = [source]
    if hf_config is not None:
        sources.append(hf_config)
    check_target(out, overwrite=overwrite, sources=sources)
    config = hf_config or recorded_hf(source)
    architecture = Architecture.read(config)
    weights = open_megatron(source, architecture)
    check_mapped(weights, config)

    # The directory's dtype is that of its matrices; norms may be kept in a wider one.
    matrix_dtype = dtype or weights.dtype
    # The files that the weights came from, so that there and back gives the same bytes.
    files = None
    if max_shard_bytes is None:
        files, index = _recorded_files(
            config, architecture, matrix_dtype, all_tensors=dtype is not None
        )
    if files is None:
        tensors = {name: (matrix_dtype, shape) for name, shape in hf_shapes(architecture).items()}
        files, index = hf_files(tensors, max_shard_bytes=max_shard_bytes or _SHARD_BYTES)

    # The files with their headers, which say what dtype each piece must have.
    plan = Output()
    dtypes = {}
    for file in files:
        plan.sizes[file.name] = file.size
        plan.literals.append((file.name, 0, file.header))
        for name, entry in parse_header(file.header, Path(file.name)).items():
            dtypes[name] = entry["dtype"]

    # A piece reads nothing yet: it says which rows of which file make the tensor.
    pieces = hf_pieces(weights, dtypes)
    for file in files:
        # In the order of their bytes, so that each file is written from its beginning to its end.
        for name, offset in sorted(file.offsets.items(), key=lambda item: item[1]):
            plan.targets.append(Target(file.name, offset, pieces[name]))
    for name, data in hf_side_files(config, dtype=matrix_dtype, index=index).items():
        plan.add_file(name, data)
    for name, text in (texts or {}).items():
        plan.add_file(name, text.encode())
    return _write(plan, out, matrix_dtype, limits, overwrite, progress)


def open_start(
    path: str | Path, start: str | Path = ""
) -> tuple[Architecture, HfWeights | MegatronWeights]:
    """Opens the model of a run, and judges it as `convert` would.

    Args:
        path: HF directory with config and tokenizer, and with weights unless `start` has them.
        start: Megatron checkpoint that training starts from; "" for the weights in `path`.

    Raises:
        WeightsError: config, weights and side files do not belong together; in one sentence.
    """
    directory = Path(path)
    if not start:
        return open_model(directory)
    architecture = Architecture.read(directory)
    side_files(directory)
    weights = open_megatron(Path(start), architecture)
    check_mapped(weights, directory)
    return architecture, weights


def check_model(path: str | Path, start: str | Path = "", *, required: bool = True) -> Architecture:
    """Checks a model as `open_start` does, for train, eval, serve and plan before they begin.

    Args:
        path, start: as of `open_start`.
        required: refuse an HF directory without weights, which is enough for a plan.

    Returns:
        What the model is.

    Raises:
        WeightsError: as `open_start`, or a file cannot be read.
    """
    directory = Path(path)
    try:
        if required or start or has_weights(directory):
            architecture, _ = open_start(directory, start)
            return architecture

        architecture = Architecture.read(directory)
        side_files(directory)
    except OSError as error:
        raise WeightsError(
            f"{error.filename or directory} cannot be read ({error.strerror})"
        ) from error

    return architecture


def check_mapped(weights: MegatronWeights, config: Path) -> None:
    """Raises WeightsError where a checkpoint has a tensor that the model has no place for."""
    if weights.unmapped:
        raise WeightsError(
            f"{weights.directory} has {weights.unmapped[0]}, for which {config}/config.json has no "
            f"place; give the config of this model by --hf-config"
        )


def open_megatron(source: Path, architecture: Architecture) -> MegatronWeights:
    """Returns the weights of a Megatron checkpoint, of either format.

    Raises:
        WeightsError: it is corrupt, hostile, in parts lost, or of another model than `architecture`
            in its arguments or in tensors that must be copies of others.
    """
    try:
        checkpoint = checkpoint_of(source)
        weights: MegatronWeights
        # Only torch_dist has this file.
        if (checkpoint / METADATA).is_file():
            weights = TorchDistWeights(checkpoint, architecture)
        else:
            weights = TorchLegacyWeights(checkpoint, architecture)

        # First: that another model was trained says more than that some tensor does not fit.
        check_arguments(weights.arguments, architecture, checkpoint)
        # A copy that differs would be lost silently: one of the two is exported.
        for name, piece, original in weights.copies():
            if not same_bytes(piece, original):
                raise WeightsError(
                    f"{checkpoint}: {name} differs from {original.name}, of which it must be a "
                    f"copy in this model; it is a checkpoint of another model, or damaged"
                )
    except OSError as error:
        raise WeightsError(
            f"{error.filename or source} cannot be read ({error.strerror})"
        ) from error

    return weights


def checkpoint_of(directory: Path) -> Path:
    """Returns the checkpoint itself: `directory`, or the one in it that its tracker names.

    Raises:
        WeightsError: there is none, or one of a format that is not read.
    """
    # A checkpoint itself: of torch_dist, or of the older format.
    if (directory / METADATA).is_file() or any(directory.glob("mp_rank_*")):
        return directory

    _refuse_other_format(directory)

    tracker = directory / TRACKER
    try:
        latest = tracker.read_bytes().decode(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WeightsError(
            f"{directory} has neither {METADATA} nor {TRACKER}; give a Megatron checkpoint"
        ) from error
    except OSError as error:
        raise WeightsError(f"{tracker} cannot be read ({error.strerror})") from error

    if latest == RELEASE:
        named = directory / RELEASE
    # Digits alone: a tracker from elsewhere must not lead out of the directory.
    elif re.fullmatch(r"\d{1,12}", latest, re.ASCII):
        # Megatron-LM's name of an iteration's directory.
        named = directory / f"iter_{int(latest):07d}"
    else:
        raise WeightsError(
            f"{tracker} says {latest[:40]!r}, which is neither {RELEASE!r} nor an iteration"
        )
    if not named.is_dir():
        raise WeightsError(
            f"{tracker} says {latest!r}, but there is no {named}; copy the checkpoint again"
        )

    _refuse_other_format(named)
    return named


def _refuse_other_format(checkpoint: Path) -> None:
    """Refuses by its name a checkpoint of megatron-core in another format than torch_dist."""
    backend = None
    # Without this file it is of another kind, which the caller looks at.
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        backend = json.loads((checkpoint / CONFIG).read_bytes()).get("sharded_backend")
    if backend is None and any(checkpoint.glob("*/.zarray")):
        backend = "zarr"
    if backend not in (None, "torch_dist"):
        raise WeightsError(
            f"{checkpoint} is a checkpoint of megatron-core's format {str(backend)[:40]!r}, which "
            f"is not read; load it in Megatron-LM and save it with --ckpt-format torch_dist"
        )


def recorded_hf(source: Path) -> Path:
    """Returns the directory of the HF files that the conversion recorded beside the checkpoint.

    Raises:
        WeightsError: there are none.
    """
    # Beside the tracker, whether the directory or the checkpoint in it was given.
    for directory in (source / HF, checkpoint_of(source).parent / HF):
        if (directory / "config.json").is_file():
            return directory
    raise WeightsError(
        f"{source} has no {HF}/config.json; give the directory of the model's config by --hf-config"
    )


def hf_pieces(weights: MegatronWeights, dtypes: dict[str, str] | None = None) -> dict[str, Piece]:
    """Returns HF name -> that tensor, made of the checkpoint, in forward order.

    Args:
        weights: of the checkpoint.
        dtypes: HF name -> key of DTYPE_BYTES; None: the checkpoint's own dtypes.
    """
    pieces = {}
    for entry in entries(weights.architecture):
        tensor = weights.tensor(entry)
        for part, name in enumerate(entry.parts):
            dtype = tensor.dtype
            if dtypes is not None:
                dtype = dtypes[name]
            pieces[name] = entry.to_hf(tensor, part, dtype)
    return pieces


def hf_tensors(
    weights: HfWeights | MegatronWeights, architecture: Architecture
) -> Iterator[tuple[str, Tensor]]:
    """Yields every HF (name, tensor) of the weights, one at a time, on the CPU."""
    if isinstance(weights, HfWeights):
        for name in hf_shapes(architecture):
            yield name, weights.read(name)
        return

    import torch

    files = OpenFiles()
    for name, piece in hf_pieces(weights).items():
        values = torch.frombuffer(piece.read(files), dtype=torch_dtype(piece.dtype))
        yield name, values.reshape(piece.shape)


def _write(
    plan: Output,
    out: Path,
    dtype: str,
    limits: Limits | None,
    overwrite: bool,
    progress: Progress | None,
) -> Converted:
    """Writes the planned directory and says what was done."""
    total = plan.num_bytes

    def advance(num_bytes: int) -> None:
        if progress is not None:
            progress(num_bytes, total)

    resumed = write_directory(
        plan, out, limits=limits or Limits(), overwrite=overwrite, progress=advance
    )
    return Converted(out, total, resumed, len(plan.targets), dtype)


def _recorded_files(
    config: Path, architecture: Architecture, dtype: str, *, all_tensors: bool
) -> tuple[list[HfFile] | None, bytes | None]:
    """Returns the files that the weights came from, where they were recorded and fit.

    Args:
        config: directory of the record.
        architecture: the model that the files must hold.
        dtype: that of the export; the files must have it.
        all_tensors: all of their tensors, not only the matrices.

    Returns:
        The files and their index, None for a single file; (None, None) without files that fit.
    """
    files = []
    dtypes = {}
    shapes = {}
    for header in sorted(config.glob(f"*{_HEADER}")):
        file = file_of_header(header.name.removesuffix(_HEADER), header.read_bytes())
        files.append(file)
        for name, entry in parse_header(file.header, Path(file.name)).items():
            dtypes[name] = entry["dtype"]
            shapes[name] = tuple(entry["shape"])

    # A checkpoint that was trained on may have another --hf-config than the one recorded.
    if not files or shapes != hf_shapes(architecture):
        return None, None

    # The embedding's dtype stands for that of all matrices.
    recorded_dtypes = {dtypes[HF_EMBEDDING]}
    if all_tensors:
        recorded_dtypes = set(dtypes.values())
    if recorded_dtypes != {dtype}:
        return None, None

    if len(files) == 1:
        # A single file of another name is not read without an index.
        return [dataclasses.replace(files[0], name=SINGLE)], None

    # The source's own index keeps its bytes; shards that came without one, or with a wrong one,
    # get one, because transformers reads no shards without it.
    index = index_of(files)
    recorded = config / INDEX
    if recorded.is_file() and weight_index(config) == json.loads(index)["weight_map"]:
        index = recorded.read_bytes()
    return files, index
