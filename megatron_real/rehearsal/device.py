"""Makes a CUDA device without a GPU: loads guard.cpp, and answers torch.cuda's questions.

`load()` must come before the first import of torch, `install(gpu)` after it. Both change the
process for good: only worker.py calls them.
"""

# mypy: disable-error-code="assignment,method-assign,attr-defined,return-value"
# Replacing functions of torch by others of like use is what this module does.

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("guard.cpp")

GIB = 1 << 30


class NoDevice(ValueError):
    """Raised where the device cannot be made on this machine.

    The message says why, and what would help.
    """


def check_machine() -> None:
    """Checks that a rehearsal can run here, before anything heavy is imported.

    Raises:
        NoDevice: there is no compiler, or no torch.
    """
    if shutil.which(_compiler()) is None:
        raise NoDevice(
            f"a rehearsal compiles a small library, and there is no {_compiler()} here; "
            "install g++, or name another C++20 compiler in CXX"
        )
    if importlib.util.find_spec("torch") is None:
        raise NoDevice("torch is not installed; install its CPU build")


def load() -> None:
    """Compiles guard.cpp if this version of it is not there yet (20 s), and loads it.

    Raises:
        NoDevice: the compiler is missing or fails, or torch is a CUDA build.
    """
    assert "torch" not in sys.modules, "the guard must be loaded before torch"
    check_machine()
    specification = importlib.util.find_spec("torch")
    assert specification is not None and specification.submodule_search_locations
    torch_directory = Path(specification.submodule_search_locations[0])
    if (torch_directory / "lib" / "libtorch_cuda.so").exists():
        raise NoDevice(
            "this torch is a CUDA build, which asks the driver itself; rehearse with torch's CPU "
            "build (pip install torch --index-url https://download.pytorch.org/whl/cpu)"
        )

    library = _compiled(torch_directory)
    # RTLD_GLOBAL: the guard finds torch's symbols in the libraries that were loaded before it.
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_directory / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _compiled(torch_directory: Path) -> Path:
    """Returns the library of this source against this torch.

    It is compiled once, into the user's cache.
    """
    key = hashlib.sha256(_SOURCE.read_bytes())
    # The guard reaches into torch's classes: another version may have laid them out otherwise.
    key.update((torch_directory / "version.py").read_bytes())
    key.update(sys.version.encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_real"
    library = cache / f"guard-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library

    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        compiled = Path(folder) / "guard.so"
        # -O0: it answers a few calls, and somebody waits while it is compiled.
        command = [_compiler(), "-O0", "-std=c++20", "-shared", "-fPIC", "-o", str(compiled)]
        command += [f"-I{torch_directory}/include", str(_SOURCE)]
        command += [f"-L{torch_directory}/lib", "-lc10", "-ltorch_cpu"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            line = (result.stderr.strip().splitlines() or ["no message"])[0]
            raise NoDevice(f"guard.cpp does not compile against this torch: {line}")
        # Whoever compiles at the same time makes the same file.
        os.replace(compiled, library)
    return library


@dataclass(frozen=True)
class Properties:
    """What libraries ask of a GPU."""

    name: str
    """The GPU's name, as the driver gives it."""
    total_memory: int
    """Bytes of device memory."""
    major: int
    """First number of the compute capability."""
    minor: int
    """Second number of the compute capability."""
    multi_processor_count: int
    """Number of streaming multiprocessors."""
    warp_size: int = 32
    """Threads of a warp."""
    # These two are an H100's, 228 KiB and 50 MiB; other GPUs answer with them, too.
    shared_memory_per_multiprocessor: int = 233472
    """Bytes of shared memory of a streaming multiprocessor."""
    L2_cache_size: int = 50 << 20
    """Bytes of the L2 cache."""


PROPERTIES = {
    "a100-40g": Properties("NVIDIA A100-SXM4-40GB", 40 * GIB, 8, 0, 108),
    "a100-80g": Properties("NVIDIA A100-SXM4-80GB", 80 * GIB, 8, 0, 108),
    "h100-80g": Properties("NVIDIA H100 80GB HBM3", 80 * GIB, 9, 0, 132),
    "h200-141g": Properties("NVIDIA H200", 141 * GIB, 9, 0, 132),
    "b200-180g": Properties("NVIDIA B200", 180 * GIB, 10, 0, 148),
}
"""The GPUs that can be rehearsed, by the keys of plan/devices.py."""

on_synchronize: list[Callable[[str], None]] = []
"""Functions that are called, with what was waited for, whenever the host waits for the device."""


def _synchronized(what: str) -> None:
    for listener in on_synchronize:
        listener(what)


on_launch: list[Callable[[str, int], None]] = []
"""Functions that are called, with name and FLOPs, for a kernel that no operation of torch runs."""


def launched(kernel: str, flops: int = 0) -> None:
    """Counts a kernel of another library than torch.

    Its outputs are counted where they are allocated.
    """
    for listener in on_launch:
        listener(kernel, flops)


def install(gpu: str) -> None:
    """Answers torch.cuda's questions as a node of eight GPUs of this kind would.

    This process has the first of them.

    Args:
        gpu: a key of PROPERTIES.
    """
    import torch

    properties = PROPERTIES[gpu]

    class Stream:
        """The only stream, whatever is asked for."""

        cuda_stream = 0
        device = torch.device("cuda", 0)

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def wait_stream(self, _other: Any) -> None:
            pass

        def wait_event(self, _event: Any) -> None:
            pass

        def record_event(self, event: Any = None) -> Any:
            return event or Event()

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            _synchronized("stream.synchronize")

        def __enter__(self) -> Stream:
            return self

        def __exit__(self, *_: Any) -> None:
            pass

    class Event:
        """An event that has always happened already."""

        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def record(self, _stream: Any = None) -> None:
            pass

        def wait(self, _stream: Any = None) -> None:
            pass

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            _synchronized("event.synchronize")

        def elapsed_time(self, _other: Any) -> float:
            # Milliseconds; not 0, so that a rate can be divided by it.
            return 1.0

    stream = Stream()
    # The size of a CUDA generator's state: seed and offset, 8 bytes each.
    generator_state = torch.zeros(16, dtype=torch.uint8)
    cuda: Any = torch.cuda
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_compiled": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: 8,
        "current_device": lambda: 0,
        "set_device": lambda _device: None,
        "synchronize": lambda _device=None: _synchronized("cuda.synchronize"),
        "empty_cache": lambda: None,
        "current_stream": lambda _device=None: stream,
        "default_stream": lambda _device=None: stream,
        "set_stream": lambda _stream: None,
        "stream": lambda asked_for: asked_for if asked_for is not None else stream,
        "Stream": Stream,
        "Event": Event,
        "get_device_capability": lambda _device=None: (properties.major, properties.minor),
        "get_device_properties": lambda _device=None: properties,
        "get_device_name": lambda _device=None: properties.name,
        # All of it free, always: the meter counts what is taken.
        "mem_get_info": lambda _device=None: (properties.total_memory, properties.total_memory),
        "memory_allocated": lambda _device=None: 0,
        "max_memory_allocated": lambda _device=None: 0,
        "memory_reserved": lambda _device=None: 0,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": lambda _seed: None,
        "manual_seed_all": lambda _seed: None,
        "get_rng_state": lambda device=None: generator_state,
        "set_rng_state": lambda state, device=None: None,
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)

    # The same questions under other names.
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.random.set_rng_state = cuda.set_rng_state
    cuda.nvtx.range_push = lambda *_: None
    cuda.nvtx.range_pop = lambda *_: None
    cuda_bindings: Any = torch._C
    cuda_bindings._cuda_getCurrentRawStream = lambda _device=0: 0

    # Inductor would look for a driver; a fake tensor needs no kernel.
    torch.compile = _not_compiled


def _not_compiled(model: Any = None, **_: Any) -> Any:
    """Returns what torch.compile was to compile, as it is; without it, a decorator that does so."""
    if model is None:
        return lambda function: function
    return model
