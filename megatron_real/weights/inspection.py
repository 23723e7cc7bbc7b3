"""What a directory of weights is, from its headers alone."""

from __future__ import annotations

import collections
import dataclasses
import json
from math import prod
from pathlib import Path
from typing import Any

from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.conversion import checkpoint_of, open_megatron, recorded_hf
from megatron_real.weights.hf import HfWeights
from megatron_real.weights.torch_dist import (
    CONFIG,
    METADATA,
    TorchDistWeights,
    common_state,
    read_metadata,
)
from megatron_real.weights.verify import is_hf


def describe(directory: Path, hf_config: Path | None = None) -> dict[str, Any]:
    """Format, architecture, parameters, dtypes, layout and size.

    Raises:
        WeightsError: it is neither an HF directory nor a Megatron checkpoint.
    """
    if is_hf(directory):
        return _describe_hf(directory)
    checkpoint = checkpoint_of(directory)
    try:
        architecture = Architecture.read(hf_config or recorded_hf(directory))
    except WeightsError:
        architecture = None
    size = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    if (checkpoint / METADATA).is_file():
        return _describe_torch_dist(checkpoint, architecture) | {"bytes": size}
    found: dict[str, Any] = {
        "format": "Megatron torch, one file a rank",
        "checkpoint": str(checkpoint),
    }
    if architecture is not None:
        weights = open_megatron(checkpoint, architecture)
        assert not isinstance(weights, TorchDistWeights), "it has no .metadata"
        found |= {"dtype": weights.dtype, "layout": {"tp": weights.tp, "pp": weights.pp}} | _model(
            architecture
        )
    return found | {"bytes": size}


def _describe_hf(directory: Path) -> dict[str, Any]:
    weights, architecture = HfWeights(directory), Architecture.read(directory)
    dtypes = collections.Counter(tensor.dtype for tensor in weights.tensors.values())
    return {
        "format": "HF " + weights.files[0].suffix.removeprefix("."),
        "files": len(weights.files),
        "tensors": len(weights.tensors),
        "dtypes": dict(dtypes),
        **_model(architecture),
        "bytes": sum(file.stat().st_size for file in weights.files),
    }


def _describe_torch_dist(checkpoint: Path, architecture: Architecture | None) -> dict[str, Any]:
    metadata = read_metadata(checkpoint)
    shapes, chunks = metadata.shapes, metadata.chunks
    ours = {
        key: value
        for key, value in shapes.items()
        if not key.startswith(("optimizer.", "chained_"))
    }
    dtypes = collections.Counter(dtype for _, dtype in ours.values())
    iteration = common_state(checkpoint, metadata).get("iteration")
    return {
        "format": "Megatron torch_dist",
        "versions": _versions(checkpoint),
        "checkpoint": str(checkpoint),
        "written_by": "megatron-core with optimizer" if len(ours) < len(shapes) else "weights only",
        "iteration": iteration if isinstance(iteration, int) else "unknown",
        "tensors": len(ours),
        "chunks": sum(len(chunks.get(key, [])) for key in ours),
        "dtypes": dict(dtypes),
        "parameters": sum(prod(shape) for shape, _ in ours.values()),
        "layout": "any TP, PP and VPP",
        **(
            {}
            if architecture is None
            else {k: v for k, v in _model(architecture).items() if k != "parameters"}
        ),
    }


def _versions(checkpoint: Path) -> dict[str, Any]:
    """Of the checkpoint's format, as megatron-core notes them."""
    try:
        noted = json.loads((checkpoint / CONFIG).read_bytes())
        return {key: noted[key] for key in sorted(noted) if key.endswith("_version")}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _model(architecture: Architecture) -> dict[str, Any]:
    return {
        "parameters": architecture.num_parameters,
        "architecture": dataclasses.asdict(architecture),
    }
