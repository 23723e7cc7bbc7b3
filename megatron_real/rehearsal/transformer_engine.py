"""Runs TransformerEngine's own Python over a replaced compiled half, on a machine without a GPU.

Its published wheel has the Python part and no library; docs/testing.md says how to get it. The
compiled half, `transformer_engine_torch`, is replaced by functions of the same names: te_kernels.py
has those of fake CUDA tensors, tests/emulated_te those of real CPU tensors.
"""

from __future__ import annotations

import enum
import importlib.metadata
import os
import sys
import types
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

DType = enum.IntEnum(
    "DType",
    [
        "kByte", "kInt32", "kFloat32", "kFloat16", "kBFloat16", "kFloat8E4M3", "kFloat8E5M2",
        "kFloat4E2M1",
    ],
    start=0,
)  # fmt: skip
"""TransformerEngine's numbers for dtypes, in its order."""

_ENUMS = (
    "FP8FwdTensors", "FP8BwdTensors", "CommOverlapType", "CommOverlapAlgo",
    "Float8BlockScaleTensorFormat",
)  # fmt: skip
"""Enums of the compiled half whose names do not begin with NVTE."""

_ANSWERS: dict[str, Any] = {
    # 9.20.0 and 13.1.0, as the libraries write them.
    "get_cudnn_version": 92000,
    "get_cublasLt_version": 130100,
    "get_num_cublas_streams": 4,
    "device_supports_multicast": True,
    "ubuf_built_with_mpi": False,
    "get_stream_priority_range": (0, -5),
}
"""What the compiled half says of the libraries below it."""


def root() -> Path | None:
    """Returns the folder with the unpacked wheel: TE_PYTHON, or .te-python in this checkout.

    It is None where the Python part is not there.
    """
    folder = Path(os.environ.get("TE_PYTHON") or Path(__file__).parents[2] / ".te-python")
    if not (folder / "transformer_engine" / "pytorch").is_dir():
        return None
    return folder


def import_over(extension: types.ModuleType) -> None:
    """Makes `import transformer_engine.pytorch` work over this compiled half.

    It does so in this process, for good. It must come before megatron is imported, which asks once
    whether TransformerEngine is there, and where torch.cuda answers as if there were a GPU.
    """
    folder = root()
    assert folder is not None, "TransformerEngine's Python part is missing"
    # The wheel's metadata have the version in their folder's name.
    (info,) = folder.glob("transformer_engine-*.dist-info")
    version = info.name.removesuffix(".dist-info").partition("-")[2]
    sys.path.insert(0, str(folder))

    sys.modules["transformer_engine_torch"] = extension

    # The version of TransformerEngine's three distributions: the wheel, the library and the
    # extension, of which only one is here.
    metadata: Any = importlib.metadata
    original_version = metadata.version

    def version_of(name: str) -> str:
        if name.replace("-", "_").startswith("transformer_engine"):
            return version
        return str(original_version(name))

    metadata.version = version_of
    _stand_in_for_onnx()

    # `common` would load the library, unless it believes that it is being built. The parent package
    # would import it by itself, so an empty parent stands in its place for that long.
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    os.environ.setdefault("NVTE_TORCH_COMPILE", "0")
    parent = types.ModuleType("transformer_engine")
    parent.__path__ = [str(folder / "transformer_engine")]
    sys.modules["transformer_engine"] = parent
    import transformer_engine.common as common

    del sys.modules["transformer_engine"]
    common.load_framework_extension = lambda framework: None
    common.sanity_checks_for_pypi_installation = lambda: None

    import transformer_engine.pytorch  # noqa: F401

    # __init__ takes the compiled half's names; those that are made on demand it cannot have seen.
    extensions: Any = sys.modules["transformer_engine.pytorch.cpp_extensions"]
    extensions.__getattr__ = lambda name: getattr(extension, name)
    package: Any = sys.modules["transformer_engine"]
    package.__version__ = version
    package.common = common


class _Export:
    """Stands for any name of an ONNX package, where it is imported, called, indexed or a type."""

    def __call__(self, *_: Any, **__: Any) -> _Export:
        return self

    def __getattr__(self, name: str) -> _Export:
        # Otherwise copy, pickle and inspect would find every protocol in it.
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, _key: Any) -> _Export:
        return self


def _stand_in_for_onnx() -> None:
    """Puts empty modules in the place of the ONNX packages that are not installed.

    TransformerEngine imports them for its export, which no training calls, and defines operators
    with them.
    """
    for name in ("onnx", "onnxscript", "onnxscript.ir"):
        try:
            __import__(name)
        except ImportError:
            module: Any = types.ModuleType(name)
            # importlib.util.find_spec() refuses a loaded module that has none.
            module.__spec__ = ModuleSpec(name, None)
            module.__getattr__ = _Export().__getattr__
            sys.modules[name] = module


class Member(int):
    """A member of an open enum, equal to no other member of it."""

    name: str

    def __new__(cls, name: str, value: int) -> Member:
        member = super().__new__(cls, value)
        member.name = name
        return member


def open_enum(name: str) -> Any:
    """Returns a class that answers every name with a member, always the same one."""
    known: dict[str, Member] = {}

    class Open(type):
        def __getattr__(cls, member: str) -> Any:
            if member == "__members__":
                return dict(known)
            if member.startswith("__"):
                raise AttributeError(member)
            return known.setdefault(member, Member(member, len(known)))

    return Open(name, (), {})


NVTE_Fused_Attn_Backend = open_enum("NVTE_Fused_Attn_Backend")


def get_fused_attn_backend(*_: Any, **__: Any) -> Any:
    """Says that cuDNN has a kernel, whatever the shape."""
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


class NotEmulated:
    """A function or class of the compiled half that dense training does not need."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(f"transformer_engine_torch.{type(self).__name__} is not emulated")


def extension(kernels: Iterable[Callable[..., Any]]) -> types.ModuleType:
    """Returns what stands in for `transformer_engine_torch`.

    Its `calls` counts the calls of each kernel by name. Whatever is not emulated can be imported,
    and raises NotImplementedError with its name once it is called.

    Args:
        kernels: functions by the names that the compiled half has for them.
    """
    made: Any = types.ModuleType("transformer_engine_torch")

    calls: dict[str, int] = {}
    made.calls = calls

    def counted(kernel: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[kernel.__name__] = calls.get(kernel.__name__, 0) + 1
            return kernel(*args, **kwargs)

        return call

    for kernel in (*kernels, get_fused_attn_backend):
        setattr(made, kernel.__name__, counted(kernel))
    for name, value in _ANSWERS.items():
        # value=value: without it all of them would give the loop's last value.
        setattr(made, name, lambda *_, value=value: value)
    made.DType = DType
    made.NVTE_Fused_Attn_Backend = NVTE_Fused_Attn_Backend

    # Whatever else is asked for is made on demand: an enum that has every member, or a class that
    # raises.
    def missing(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        is_enum = name.startswith("NVTE") or name in _ENUMS
        value = open_enum(name) if is_enum else type(name, (NotEmulated,), {})
        setattr(made, name, value)
        return value

    # A module's own __getattr__ is asked for the names that it lacks (PEP 562).
    made.__getattr__ = missing
    return made
