"""Imports TransformerEngine's own Python on a machine without a GPU, over the emulated kernels.

Its published wheel has the Python part and no library; docs/testing.md says how to get it. To be
called before megatron is imported, which asks once whether TransformerEngine is there.
"""

from __future__ import annotations

import functools
import types
from typing import Any
from unittest import mock

import torch

from megatron_real.parallel import cpu
from megatron_real.rehearsal import transformer_engine
from tests.emulated_te import kernels


def available() -> bool:
    """Whether TransformerEngine's Python is there."""
    return transformer_engine.root() is not None


def install() -> None:
    """Makes `import transformer_engine.pytorch` work in this process, on CPU tensors."""
    _answer_for_a_gpu()
    # megatron-core compiles its fused SwiGLU, and the compiler would ask a real GPU for its name.
    torch.compiler.set_stance("force_eager")
    transformer_engine.import_over(transformer_engine.extension(kernels.KERNELS))

    import transformer_engine.pytorch as te

    _build_modules_without_cuda(te.module.base.TransformerEngineBaseModule)


def _answer_for_a_gpu() -> None:
    """CPU tensors pass for tensors of an H100; what is asked for on `cuda` is made on the CPU."""
    properties = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="emulated", total_memory=1 << 36
    )
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda device=None: properties
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda.is_current_stream_capturing = lambda: False
    # Context parallelism's ring computes on two streams; on a CPU everything happens in order.
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = lambda _stream: _Stream()
    streams: Any = cpu
    streams._STREAM = _Stream()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_: None
    tensor: Any = torch.Tensor
    tensor.is_cuda = property(lambda self: True)
    tensor.to = _on_cpu(torch.Tensor.to)
    for name in (
        "arange", "rand", "randn", "randint", "full_like", "ones_like", "rand_like", "linspace",
    ):  # fmt: skip
        setattr(torch, name, _on_cpu(getattr(torch, name)))


class _Stream:
    """A stream or an event: whoever waits for it has nothing to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _other: Any) -> None:
        pass

    def wait_event(self, _event: Any) -> None:
        pass

    def record_event(self, _event: Any = None) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        pass


def _on_cpu(function: Any) -> Any:
    """The function, with `cpu` in the place of each argument that names a CUDA device."""

    def is_cuda(arg: Any) -> bool:
        return isinstance(arg, str | torch.device) and str(arg).startswith("cuda")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if is_cuda(arg) else arg for arg in args)
        if is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return call


def _build_modules_without_cuda(base: Any) -> None:
    """Its modules refuse to be built where torch.cuda.is_available() is false,
    and megatron_real.parallel.cpu needs it false.
    """
    build = base.__init__

    @functools.wraps(build)
    def built(self: Any, *args: Any, **kwargs: Any) -> None:
        with mock.patch.object(torch.cuda, "is_available", lambda: True):
            build(self, *args, **kwargs)

    base.__init__ = built
