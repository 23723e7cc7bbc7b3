"""Imports TransformerEngine's own Python on a machine without a GPU, over the emulated kernels.

Its published wheel has the Python part and no library; docs/testing.md says how to get it. To be called before megatron
is imported, which asks once whether TransformerEngine is there.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch

from tests.emulated_te import kernels

ROOT = Path(os.environ.get("TE_PYTHON") or Path(__file__).parents[2] / ".te-python")
"""The unpacked wheel: it has the folder transformer_engine."""


def available() -> bool:
    """Whether TransformerEngine's Python is there."""
    return (ROOT / "transformer_engine" / "pytorch").is_dir()


def install() -> None:
    """Makes `import transformer_engine.pytorch` work in this process, on CPU tensors."""
    (info,) = ROOT.glob("transformer_engine-*.dist-info")
    version = info.name.removesuffix(".dist-info").partition("-")[2]
    sys.path.insert(0, str(ROOT))
    sys.modules["transformer_engine_torch"] = kernels.module()
    _answer_for_its_version(version)
    _stand_in_for_onnx()
    common = _import_common()
    _answer_for_a_gpu()
    # megatron-core compiles its fused SwiGLU, and the compiler would ask a real GPU for its name.
    torch.compiler.set_stance("force_eager")

    import transformer_engine.pytorch as te

    # __init__ takes the compiled half's names; those that are made on demand it cannot have seen.
    extensions: Any = sys.modules["transformer_engine.pytorch.cpp_extensions"]
    extensions.__getattr__ = lambda name: getattr(sys.modules["transformer_engine_torch"], name)
    package: Any = sys.modules["transformer_engine"]
    package.__version__ = version
    package.common = common
    _build_modules_without_cuda(te.module.base.TransformerEngineBaseModule)


def _answer_for_its_version(version: str) -> None:
    """Its three distributions (the wheel, the library, the extension) are of one version, and one of them is here."""
    ask = importlib.metadata.version

    def answer(name: str) -> str:
        ours = name.replace("-", "_").startswith("transformer_engine")
        return version if ours else ask(name)

    importlib.metadata.version = answer


def _stand_in_for_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxscript.ir"):
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))


def _import_common() -> Any:
    """Its `common` package loads the library, unless it believes that it is being built; the parent imports it first."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    os.environ.setdefault("NVTE_TORCH_COMPILE", "0")
    parent = types.ModuleType("transformer_engine")
    parent.__path__ = [str(ROOT / "transformer_engine")]
    sys.modules["transformer_engine"] = parent
    import transformer_engine.common as common

    del sys.modules["transformer_engine"]
    common.load_framework_extension = lambda framework: None
    common.sanity_checks_for_pypi_installation = lambda: None
    return common


def _answer_for_a_gpu() -> None:
    """CPU tensors pass for tensors of an H100; what is asked for on `cuda` is made on the CPU."""
    properties = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="emulated", total_memory=1 << 36
    )
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda self: True)
    tensor.to = _on_cpu(torch.Tensor.to)
    for name in (
        "arange", "rand", "randn", "randint", "full_like", "ones_like", "rand_like", "linspace",
    ):  # fmt: skip
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(function: Any) -> Any:
    def is_cuda(word: Any) -> bool:
        return isinstance(word, str | torch.device) and str(word).startswith("cuda")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if is_cuda(word) else word for word in args)
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return call


def _build_modules_without_cuda(base: Any) -> None:
    """Its modules refuse to be built where torch.cuda.is_available() is false, and megatron_real.cpu needs it false."""
    build = base.__init__

    @functools.wraps(build)
    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        asked: Any = torch.cuda
        answer = asked.is_available
        asked.is_available = lambda: True
        try:
            build(self, *args, **kwargs)
        finally:
            asked.is_available = answer

    base.__init__ = built
