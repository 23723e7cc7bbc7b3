"""What a directory of weights is, from its headers alone."""

from __future__ import annotations

import collections
import dataclasses
import json
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from megatron_real.conversion.convert import checkpoint_of, open_megatron, recorded_hf
from megatron_real.conversion.torch_dist import (
    CONFIG,
    METADATA,
    OPTIMIZER_PREFIXES,
    TorchDistWeights,
    common_state,
    read_metadata,
)
from megatron_real.conversion.verify import is_hf
from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.hf import HfWeights


def describe(directory: Path, hf_config: Path | None = None) -> dict[str, Any]:
    """Returns format, architecture, parameters, dtypes, layout and size of a directory.

    Args:
        directory: HF directory or Megatron checkpoint.
        hf_config: HF directory of the checkpoint's config.json; None: the one that the conversion
            recorded. Without any, what follows from the architecture is left out.

    Raises:
        WeightsError: it is neither an HF directory nor a Megatron checkpoint.
    """
    if is_hf(directory):
        hf_weights = HfWeights(directory)
        hf_architecture = Architecture.read(directory)
        dtypes = collections.Counter(tensor.dtype for tensor in hf_weights.tensors.values())
        return {
            "format": "HF " + hf_weights.files[0].suffix.removeprefix("."),
            "files": len(hf_weights.files),
            "tensors": len(hf_weights.tensors),
            "dtypes": dict(dtypes),
            "parameters": hf_architecture.num_parameters,
            "architecture": dataclasses.asdict(hf_architecture),
            "bytes": sum(file.stat().st_size for file in hf_weights.files),
        }

    checkpoint = checkpoint_of(directory)
    # A checkpoint without its config.json still has a format, tensors and a size to show.
    try:
        architecture = Architecture.read(hf_config or recorded_hf(directory))
    except WeightsError:
        architecture = None

    if (checkpoint / METADATA).is_file():
        description = _describe_torch_dist(checkpoint, architecture)
    else:
        description = {
            "format": "Megatron torch, one file a rank",
            "checkpoint": str(checkpoint),
        }
        if architecture is not None:
            weights = open_megatron(checkpoint, architecture)
            assert not isinstance(weights, TorchDistWeights), "it has no .metadata"
            description["dtype"] = weights.dtype
            description["layout"] = {"tp": weights.tp, "pp": weights.pp}
            description["parameters"] = architecture.num_parameters
            description["architecture"] = dataclasses.asdict(architecture)

    # With the optimizer: what the disk holds, not what the model is.
    files = [file for file in checkpoint.rglob("*") if file.is_file()]
    description["bytes"] = sum(file.stat().st_size for file in files)
    return description


def _describe_torch_dist(checkpoint: Path, architecture: Architecture | None) -> dict[str, Any]:
    metadata = read_metadata(checkpoint)
    # The optimizer's tensors are of the same shapes and would be counted as parameters.
    model = {
        key: shape_and_dtype
        for key, shape_and_dtype in metadata.shapes.items()
        if not key.startswith(OPTIMIZER_PREFIXES)
    }
    written_by = "weights only"
    if len(model) < len(metadata.shapes):
        written_by = "megatron-core with optimizer"

    # Versions of the format, as megatron-core notes them; a note that cannot be read is none.
    versions = {}
    with suppress(OSError, ValueError, AttributeError, TypeError):
        noted = json.loads((checkpoint / CONFIG).read_bytes())
        versions = {key: noted[key] for key in sorted(noted) if key.endswith("_version")}

    iteration = common_state(checkpoint, metadata).get("iteration")
    if not isinstance(iteration, int):
        iteration = "unknown"

    description = {
        "format": "Megatron torch_dist",
        "versions": versions,
        "checkpoint": str(checkpoint),
        "written_by": written_by,
        "iteration": iteration,
        "tensors": len(model),
        "chunks": sum(len(metadata.chunks.get(key, [])) for key in model),
        "dtypes": dict(collections.Counter(dtype for _, dtype in model.values())),
        "parameters": sum(prod(shape) for shape, _ in model.values()),
        "layout": "any TP, PP and VPP",
    }
    if architecture is not None:
        description["architecture"] = dataclasses.asdict(architecture)
    return description
