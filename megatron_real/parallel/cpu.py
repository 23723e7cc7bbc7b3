"""The one room that lets megatron-core run on a machine without a GPU.

megatron-core names the device "cuda" in many places, whatever backend the process groups use.
`enable()` answers those few questions with the CPU's own means (gloo, the CPU generator);
everything else, from the schedules to the distributed optimizer, is megatron-core untouched. It
does nothing where CUDA is available, so a GPU run never sees a patch. Works with megatron-core
0.16.1 to 0.19.x.
"""

# mypy: disable-error-code="assignment,method-assign,return-value"
# Replacing functions of torch by others of like use is what this module does.

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

CPU = torch.device("cpu")

# Constructors that megatron-core calls with device="cuda" (optimizer scalars, the schedules' token
# count, checkpoints).
_CONSTRUCTORS = ("tensor", "zeros", "ones", "empty", "full", "empty_like", "zeros_like")

_enabled = False


class _Stream:
    """The CPU's only stream: whoever waits for it has nothing to wait for."""

    def wait_stream(self, _other: Any) -> None:
        pass


_STREAM = _Stream()


def enable() -> bool:
    """Makes megatron-core usable without CUDA.

    Call it before megatron is imported. Calling it again changes nothing.

    Returns:
        True if the process now runs on the CPU, False if CUDA is available and nothing was changed.
    """
    global _enabled
    if torch.cuda.is_available():
        return False
    if _enabled:
        return True
    _enabled = True

    # torch.cuda's questions about the device are answered by the CPU.
    torch.cuda.current_device = lambda: CPU  # only ever used as a `device=` argument
    torch.cuda.set_device = lambda _device: None
    torch.cuda.synchronize = lambda _device=None: None  # CPU work is synchronous
    torch.cuda.empty_cache = lambda: None
    torch.cuda.current_stream = torch.cuda.default_stream = lambda _device=None: _STREAM

    # torch keeps, from its first use on, the set of constructors that `with torch.device(...)`
    # applies to. It must be made of torch's own: with ours in it, a model that is built on the
    # device "meta" (from_pretrained does) would get buffers of uninitialised memory.
    _device_constructors()
    for name in _CONSTRUCTORS:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    # A tensor stays where it is and is not copied, as on a GPU one that is there already.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    tensor_type = torch.Tensor.type

    def type_as_if_on_cuda(
        self: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **kwargs: Any
    ) -> Any:
        # megatron-core's optimizers accept a parameter by the name of its type,
        # "torch.cuda.FloatTensor".
        if dtype is None:
            return tensor_type(self).replace("torch.", "torch.cuda.", 1)
        return tensor_type(self, dtype, non_blocking, **kwargs)

    torch.Tensor.type = type_as_if_on_cuda

    # megatron-core's RNG tracker forks the CPU generator. Its own accessors index torch.cuda's
    # generators.
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)

    from megatron.core.tensor_parallel import random

    # Its forks compare the CPU generator before and after and warn: here that one is the one that
    # is forked.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    return True


def device() -> torch.device:
    """Returns the device of this process: its current CUDA device, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return CPU


def _on_cpu(constructor: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns a constructor that takes device="cuda" for the CPU, every other device as it is."""

    @functools.wraps(constructor)
    def construct(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)  # pinning needs CUDA; rotary embeddings under CP ask for it
        return constructor(*args, **kwargs)

    return construct
