"""torch.save files without loading them.

`TorchFile` says where each tensor's bytes lie; `blank_archive` lays a file out
before its bytes exist.

A torch.save file is a zip archive of uncompressed records: `data.pkl`, a pickle of the object in
which each storage is a reference, and `data/0`, `data/1`, ... with the bytes. Reading runs no code
of the file and imports nothing: a class or function of the pickle becomes a record of ours or an
inert stand-in. Checkpoints bring their training's arguments, so that any class may be among them;
but a file that names what only an attack needs is refused.
"""

from __future__ import annotations

import collections
import io
import pickle
import struct
import zipfile
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_real.weights import WeightsError
from megatron_real.weights.stored import DTYPE_BYTES, TORCH_NAMES, Extent, StoredTensor

# The pickle of a checkpoint's structure; that of a 70B model in 8 parts is 20 MB.
LARGEST_PICKLE = 2**28

_STORAGES = {
    "BFloat16Storage": "BF16",
    "HalfStorage": "F16",
    "FloatStorage": "F32",
    "DoubleStorage": "F64",
}
_DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}
TORCH_DTYPES = frozenset(
    [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "float8_e4m3fn",
        "float8_e5m2",
        "float8_e4m3fnuz",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "complex64",
        "complex128",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint64",
        "uint32",
        "uint16",
        "uint8",
        "bool",
    ]
)
"""The names of torch that are dtypes."""


class Record:
    """An inert stand-in for an object of a pickle.

    It keeps the constructor's arguments and the state. Nothing of the object's class is run.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args
        self.__dict__.update(kwargs)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            attributes = {key: value for key, value in state.items() if isinstance(key, str)}
            self.__dict__.update(attributes)
        else:
            self.state = state

    def append(self, *_: Any) -> None:
        """Drops an item of a stood-in list, set or table."""

    # The unpickler calls these on whatever it has built, to fill a list, a set or a table.
    add = extend = __setitem__ = append


class TorchName(str):
    """A name of torch in a pickle. A dtype or a layout stays it; a call of it gives a Record."""

    def __call__(self, *args: Any) -> Record:
        return Record(*args)


@dataclass(frozen=True)
class PickledTensor:
    """A tensor in a torch.save file, as its pickle tells it."""

    key: str
    """Name of its storage's record."""
    dtype: str
    """Key of DTYPE_BYTES, or another dtype's name in torch."""
    start: int
    """First element in the storage."""
    shape: tuple[int, ...]
    """Its shape."""
    strides: tuple[int, ...]
    """Elements from one index to the next, along each dimension."""


class TorchFile:
    """A torch.save file, or one that lies within another file.

    Raises:
        WeightsError: not such a file, a corrupt one, or one whose pickle is an attack.
    """

    def __init__(self, file: Path, offset: int = 0, length: int | None = None) -> None:
        self.file = file
        self.offset = offset
        try:
            with open(file, "rb") as stream:
                size = stream.seek(0, io.SEEK_END)
                if length is None:
                    length = size - offset
                self.length = length
                if offset < 0 or length < 0 or offset + length > size:
                    raise WeightsError(
                        f"{file} has {size} bytes, but its index points to {offset + length}"
                    )

                # zipfile looks for its directory at the end of a file: of this part, not of the
                # whole.
                window = io.BufferedReader(_Window(stream, offset, length))
                archive = zipfile.ZipFile(window)
                # A record's name begins with the archive's own name, which does not matter.
                records = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
                pickled = records.get("data.pkl")
                if pickled is None or pickled.file_size > LARGEST_PICKLE:
                    raise zipfile.BadZipFile("no data.pkl of a sane size")
                # Before the pickle is read: a compressed one could unpack to any size.
                self._data_offset(window, pickled)
                self.object = load_pickle(archive.read(pickled), file)

                self.storages: dict[str, tuple[int, int]] = {}
                """Key of a storage -> its first byte in the archive, and its size."""
                for name, info in records.items():
                    if name.startswith("data/"):
                        begin = self._data_offset(window, info)
                        self.storages[name.removeprefix("data/")] = (begin, info.file_size)
        except WeightsError:
            raise
        # NotImplementedError is zipfile's word for a compression that it does not know.
        except (
            OSError,
            ValueError,
            zipfile.BadZipFile,
            NotImplementedError,
            struct.error,
            EOFError,
        ) as error:
            raise WeightsError(
                f"{file} is not a torch.save archive or is corrupt ({error}); copy it again, or "
                f"load it with torch and save it as safetensors"
            ) from error

    def _data_offset(self, window: BinaryIO, info: zipfile.ZipInfo) -> int:
        """Returns where a record's data begins in the archive, which must hold all of it as it is.

        The local header says it: its name and extra field may be longer than the directory's.
        """
        # A local header has 30 fixed bytes. At 26 stand the lengths of the name and the extra field
        # that follow it (APPNOTE.TXT of PKWARE, 4.3.7).
        window.seek(info.header_offset)
        header = window.read(30)
        offset = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if info.compress_type != zipfile.ZIP_STORED or offset + info.file_size > self.length:
            raise zipfile.BadZipFile(
                f"record {info.filename} is compressed or reaches beyond the file"
            )
        return offset

    def stored(self, name: str, tensor: PickledTensor) -> StoredTensor:
        """Returns where `tensor` lies.

        Raises:
            WeightsError: its bytes are not in the file, not contiguous, or of a dtype that weights
                do not have.
        """
        if tensor.dtype not in DTYPE_BYTES:
            raise WeightsError(
                f"{self.file}: {name} has dtype {tensor.dtype}; supported are "
                f"{', '.join(DTYPE_BYTES)}"
            )

        size = DTYPE_BYTES[tensor.dtype]
        # A storage that is not there has fewer bytes than any tensor needs.
        begin, num_bytes = self.storages.get(tensor.key, (0, -1))

        # In row-major order each stride is the product of the sizes after it.
        contiguous = True
        numel = 1
        for length, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
            # The stride of a dimension of one element is never used, and torch may save any.
            contiguous &= length == 1 or stride == numel
            numel *= length
        if not contiguous or tensor.start < 0 or min((*tensor.shape, 0)) < 0:
            raise WeightsError(
                f"{self.file}: {name} is not stored as one contiguous tensor; save it again"
            )
        if (tensor.start + numel) * size > num_bytes:
            raise WeightsError(f"{self.file}: the data of {name} is missing; copy the file again")

        # As a matrix: a vector has one column, a scalar is one row.
        rows = 1
        if tensor.shape:
            rows = tensor.shape[0]
        # Without rows there are no elements, and nothing to divide by.
        columns = 0
        if rows:
            columns = numel // rows
        first_byte = self.offset + begin + tensor.start * size
        extent = Extent(self.file, first_byte, row=0, column=0, rows=rows, columns=columns)
        return StoredTensor(name, tensor.dtype, tensor.shape, (extent,))


def tensors_of(table: dict[Any, Any], file: Path) -> dict[str, PickledTensor]:
    """Returns the tensors of a table of weights. Empty states beside them are left out.

    Raises:
        WeightsError: an object of a class that is not read stands where a tensor should.
    """
    tensors = {}
    for name, value in table.items():
        if isinstance(value, PickledTensor):
            tensors[str(name)] = value
        elif isinstance(value, Record) and str(name).endswith((".weight", ".bias")):
            kind = f"{type(value).__module__}.{type(value).__name__}"
            raise WeightsError(
                f"{file}: {name} is a {kind}, not a plain tensor; load it where that class is "
                f"installed, and save plain tensors"
            )
    return tensors


def load_pickle(data: bytes, file: Path, *, only: Container[tuple[str, str]] | None = None) -> Any:
    """Returns the object of a pickle, with inert records in place of classes.

    Args:
        data: the pickle.
        file: where it is from, for messages.
        only: (module, name) of everything that it may name; None allows all that is no attack,
            because nothing is imported here. Give it where another reader loads the file next.

    Raises:
        WeightsError: corrupt, or it names what it must not.
    """
    try:
        return _Reader(io.BytesIO(data), only).load()
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from error
    except Exception as error:  # a hostile pickle can fail in any way; none of them ran code
        raise WeightsError(
            f"{file}: its pickle is corrupt ({type(error).__name__}: {error})"
        ) from error


class _Reader(pickle._Unpickler):
    """Turns tensors into PickledTensor, containers into themselves, all else into Record.

    It builds on the unpickler in Python, which reads 8 MB/s: the one in C allocates what a hostile
    memo index asks for, 32 GB by 5 bytes.
    """

    def __init__(self, stream: io.BytesIO, only: Container[tuple[str, str]] | None) -> None:
        super().__init__(stream)
        self._only = only

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self._enum_member

        # `__builtin__` is Python 2's name of the module, most of whose names are harmless.
        if module in ("builtins", "__builtin__"):
            is_attack = name in _RUNNING_BUILTINS
        else:
            is_attack = module.split(".")[0] in _RUNNERS
        allowed = self._only is None or (module, name) in self._only
        if not allowed or is_attack:
            raise WeightsError(
                f"its pickle names {module}.{name}, which no checkpoint of weights needs; do not "
                f"trust it"
            )

        known = _KNOWN.get((module, name))
        if known is not None:
            return known
        if module != "torch":
            # A class of the same name, so that a message can say what stood there.
            return type(name.rpartition(".")[2] or "Record", (Record,), {"__module__": module})
        if name.endswith("Storage"):
            return _STORAGES.get(name, name)
        if name[:1].isupper():
            return type(name, (Record,), {})

        return _DTYPES.get(name) or TorchName(name)

    def _enum_member(self, enum: Any, name: Any) -> Record:
        """Returns an enum's member, which Python 3.11.2 pickles as getattr(the enum, its name).

        Where another reader loads the file next, its getattr is the real one: of the classes that
        it may name then, some have methods (PosixPath.unlink), and none of them is in capitals.
        """
        is_class = isinstance(enum, type) and issubclass(enum, Record)
        is_member = isinstance(name, str) and (self._only is None or name.isupper())
        if not is_class or not is_member:
            raise WeightsError(
                f"its pickle asks for the attribute {name!r:.100} of {enum!r:.100}, which no "
                f"checkpoint of weights needs; do not trust it"
            )
        return enum(name)

    def persistent_load(self, reference: Any) -> tuple[str, str]:
        """Returns a storage as its record's key and its dtype."""
        # What follows is the device and the size, which the archive itself says better.
        kind, dtype, key = reference[:3]
        if kind != "storage" or not isinstance(dtype, str) or not isinstance(key, str):
            raise WeightsError("its pickle has a storage that is not one")
        return key, dtype


def _rebuild_tensor(
    storage: tuple[str, str], start: int, shape: Any, strides: Any, *_: Any
) -> PickledTensor:
    # The arguments after the strides are requires_grad, hooks and metadata: weights need none.
    key, dtype = storage
    sizes = tuple(shape)
    steps = tuple(strides)
    if not all(type(number) is int for number in (start, *sizes, *steps)):
        raise WeightsError("its pickle has a tensor whose shape is not one")
    return PickledTensor(key, dtype, start, sizes, steps)


_KNOWN: dict[tuple[str, str], Any] = {
    # What torch pickles a tensor, a parameter or a subclass as: a call of a function.
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): lambda rebuild, _, args, *__: rebuild(*args),
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch.serialization", "_get_layout"): lambda name: name,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): lambda items=(): list(items),
    ("__builtin__", "set"): lambda items=(): list(items),
    ("_codecs", "encode"): lambda text, *_: text,
}
# Modules whose names a pickle holds only to run something. They would be inert here like all
# others: the refusal tells the user what was sent.
_RUNNERS = frozenset(
    [
        "os",
        "posix",
        "nt",
        "subprocess",
        "sys",
        "importlib",
        "runpy",
        "code",
        "codeop",
        "pty",
        "shutil",
        "socket",
        "ctypes",
        "pickle",
        "_pickle",
        "marshal",
        "webbrowser",
        "multiprocessing",
        "threading",
        "_thread",
        "asyncio",
        "inspect",
        "timeit",
        "pdb",
        "cProfile",
        "profile",
        "pip",
    ]
)
_RUNNING_BUILTINS = frozenset(
    ["eval", "exec", "execfile", "compile", "open", "__import__", "input", "breakpoint", "apply"]
)


@dataclass(frozen=True)
class StorageSlot:
    """Room for one storage in a laid-out file."""

    offset: int
    """Its first byte."""
    num_bytes: int
    """Its size."""
    crc_offsets: tuple[int, ...]
    """Where the archive wants the CRC-32 of its bytes, 4 bytes little-endian each."""


@dataclass(frozen=True)
class BlankArchive:
    """A torch.save file whose tensors' bytes are still to be written."""

    size: int
    """Bytes of the whole file."""
    literals: tuple[tuple[int, bytes], ...]
    """(offset, bytes): all that is not tensor data."""
    slots: tuple[StorageSlot, ...]
    """Room for the storages, in the order of the pickle."""


def blank_archive(obj: Any) -> BlankArchive:
    """Returns the file that torch.save(obj) writes, with room for the tensors' bytes.

    The tensors' memory is never touched, so `obj` may hold empty tensors of any size.
    """
    import torch

    recorder = _Recorder()
    # torch then seeks over the storages instead of writing them.
    with torch.serialization.skip_data():
        torch.save(obj, recorder)  # type: ignore[arg-type]

    entry_of_data = _central_directory(recorder.literals)
    slots = []
    for offset, num_bytes in recorder.gaps:
        # After the data comes its descriptor, signature then CRC. The central directory repeats
        # the CRC.
        crc_offsets = (offset + num_bytes + 4, entry_of_data[offset] + 16)
        slots.append(StorageSlot(offset, num_bytes, crc_offsets))
    literals = tuple((offset, bytes(data)) for offset, data in recorder.literals)
    return BlankArchive(recorder.position, literals, tuple(slots))


class _Recorder:
    """A stream that keeps what is written and the gaps that are sought over."""

    def __init__(self) -> None:
        self.literals: list[tuple[int, bytearray]] = []
        self.gaps: list[tuple[int, int]] = []
        self.position = 0

    def write(self, data: Any) -> int:
        """Appends to the last literal, or begins one after a gap."""
        raw = bytes(data)
        begins = True
        if self.literals:
            start, last = self.literals[-1]
            # A gap lies between the last literal and here.
            begins = start + len(last) != self.position
        if begins:
            self.literals.append((self.position, bytearray()))
        self.literals[-1][1].extend(raw)
        self.position += len(raw)
        return len(raw)

    def seek(self, distance: int, whence: int) -> int:
        """Notes a gap: torch's writer seeks over a storage."""
        assert whence == io.SEEK_CUR and distance >= 0, "torch.save only skips forward"
        self.gaps.append((self.position, distance))
        self.position += distance
        return self.position

    def flush(self) -> None:
        """Does nothing, because nothing is buffered."""


def _central_directory(literals: list[tuple[int, bytearray]]) -> dict[int, int]:
    """Returns where each record's data begins -> where its entry in the central directory does.

    The directory ends the archive, entry after entry. (APPNOTE.TXT of PKWARE, 4.3.7 and 4.3.12.)

    Args:
        literals: (offset, bytes) of all of the archive but the data.
    """

    def read(offset: int, count: int) -> bytes:
        start, data = next((s, d) for s, d in literals if s <= offset < s + len(d))
        return bytes(data[offset - start : offset - start + count])

    entry_of_data: dict[int, int] = {}
    for start, data in literals:
        end = data.rfind(b"PK\x06\x06")  # the end of a zip64 directory
        if end < 0:
            end = data.rfind(b"PK\x05\x06")
        # Entries of the directory begin with this signature; none of them holds tensor data.
        at = data.find(b"PK\x01\x02")
        while 0 <= at < end:
            # An entry has 46 fixed bytes. At 28 stand the lengths of what follows them, at 42 where
            # the record's local header begins.
            name_length, extra_length, comment_length = struct.unpack(
                "<HHH", data[at + 28 : at + 34]
            )
            entry_length = 46 + name_length + extra_length + comment_length
            header = struct.unpack("<I", data[at + 42 : at + 46])[0]
            if header == 0xFFFFFFFF:  # zip64: the offset is the last number of the extra field
                extra_end = at + 46 + name_length + extra_length
                header = struct.unpack("<Q", data[extra_end - 8 : extra_end])[0]

            # The local header has a name and an extra field of lengths of its own.
            local_lengths = struct.unpack("<HH", read(header + 26, 4))
            entry_of_data.setdefault(header + 30 + sum(local_lengths), start + at)
            at += entry_length
    return entry_of_data


class _Window(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, stream: BinaryIO, offset: int, length: int) -> None:
        self._stream = stream
        self._offset = offset
        self._length = length
        self._at = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if base + position < 0:
            raise OSError("seek before the start")
        self._at = base + position
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(self._length - self._at, 0))
        self._stream.seek(self._offset + self._at)
        data = self._stream.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
