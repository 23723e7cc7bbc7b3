"""Checks a directory of weights, HF or Megatron, or compares two.

It goes tensor by tensor, in constant memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from megatron_real.conversion.convert import (
    HF,
    checkpoint_of,
    hf_pieces,
    open_megatron,
    recorded_hf,
)
from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.hf import open_model
from megatron_real.weights.mapping import Weights, hf_shapes
from megatron_real.weights.stored import (
    DTYPE_BYTES,
    OpenFiles,
    Piece,
    torch_dtype,
    whole,
    widest,
)
from megatron_real.weights.transfer import MANIFEST, check_manifest

_BLOCK_BYTES = 2**22


@dataclass
class VerifyReport:
    """What a check came to; `problems` is empty where all is well."""

    problems: list[str] = field(default_factory=list)
    """One sentence each."""
    descriptions: list[str] = field(default_factory=list)
    """Those of the problems that are about the two config.json."""
    tensors: int = 0
    """HF tensors looked at."""
    num_bytes: int = 0
    """Bytes of the first directory read."""
    identical: int = 0
    """Tensors equal bit by bit, after widening where the dtypes differ."""
    max_abs_difference: float = 0.0
    """Over all values."""
    worst: str = ""
    """Tensor of max_abs_difference."""
    nans: int = 0
    """NaN values in the first directory."""


@dataclass(frozen=True)
class Opened:
    """A directory of weights as HF tensors."""

    directory: Path
    """The directory itself."""
    kind: str
    """`HF` or `Megatron`."""
    config: Path
    """Directory of its config.json."""
    architecture: Architecture
    """What that one says."""
    weights: Weights
    """The same tensors, as our model loads them."""
    pieces: dict[str, Piece]
    """HF name -> tensor, in forward order."""
    unmapped: list[str]
    """Tensors that the model has no place for."""


def is_hf(directory: Path) -> bool:
    """Whether a directory is one of HF weights, not a Megatron checkpoint."""
    # A Megatron checkpoint has the config in hf/, where it has one.
    return (directory / "config.json").is_file()


def open_as_hf(directory: Path, hf_config: Path | None = None) -> Opened:
    """Opens a directory of weights as HF tensors.

    Args:
        directory: HF directory or Megatron checkpoint.
        hf_config: HF directory of the checkpoint's config.json; None: the one that the conversion
            recorded.

    Raises:
        WeightsError: a tensor is missing, cut short or of another shape, or two share bytes.
    """
    if is_hf(directory):
        architecture, hf_weights = open_model(directory)
        opened = Opened(
            directory=directory,
            kind="HF",
            config=directory,
            architecture=architecture,
            weights=hf_weights,
            pieces={name: whole(hf_weights.tensor(name)) for name in hf_shapes(architecture)},
            unmapped=[],
        )
    else:
        config = hf_config or recorded_hf(directory)
        architecture = Architecture.read(config)
        megatron_weights = open_megatron(directory, architecture)
        opened = Opened(
            directory=directory,
            kind="Megatron",
            config=config,
            architecture=architecture,
            weights=megatron_weights,
            pieces=hf_pieces(megatron_weights),
            unmapped=megatron_weights.unmapped,
        )

    # Several pieces are made of one tensor (q, k and v), so that its extents come more than once.
    # With the name, because one extent under two names is two tensors of the same bytes.
    extents = set()
    for piece in opened.pieces.values():
        for tensor in [span.tensor for span in piece.spans if span.tensor is not None]:
            extents |= {(extent, tensor.dtype, tensor.name) for extent in tensor.extents}
    # In order of their bytes, none may begin before the one before it has ended.
    last_file = None
    last_end = 0
    for extent, dtype, _ in sorted(extents, key=lambda item: (item[0].file, item[0].offset)):
        if extent.file == last_file and extent.offset < last_end:
            raise WeightsError(
                f"{extent.file}: two tensors share the bytes from {extent.offset} on; it is corrupt"
            )

        last_file = extent.file
        last_end = extent.offset + extent.rows * extent.columns * DTYPE_BYTES[dtype]

    return opened


def verify(
    a: Opened,
    b: Opened | None,
    *,
    atol: float = 0.0,
    progress: Callable[[int, int], None] | None = None,
) -> VerifyReport:
    """Checks `a` by itself and, where given, against `b`.

    Args:
        a, b: the directories.
        atol: largest absolute difference that is no problem; 0 asks for equal bits.
        progress: called with (bytes of a tensor that is done, bytes in all).
    """
    report = VerifyReport()
    directories = [a]
    if b is not None:
        directories.append(b)
    for opened in directories:
        for name in opened.unmapped:
            report.problems.append(
                f"{opened.directory} has {name}, which the model has no place for"
            )
        report.problems += _checksums(opened)

    if b is not None:
        # What tensors need not show: 32 heads of 64 are as wide as 16 of 128.
        names = ("num_heads", "num_kv_heads", "head_dim", "norm_eps", "rope_theta", "rope_factor")
        for name in names:
            of_a = getattr(a.architecture, name)
            of_b = getattr(b.architecture, name)
            if of_a != of_b:
                report.descriptions.append(
                    f"the models differ: {name} is {of_a} in {a.config}/config.json and "
                    f"{of_b} in {b.config}/config.json"
                )
        report.problems += report.descriptions

        for name in sorted(a.pieces.keys() ^ b.pieces.keys()):
            owner = b
            if name in a.pieces:
                owner = a
            report.problems.append(f"{name} is only in {owner.directory}")

    # Of the first directory alone, by which the bar counts.
    total = sum(piece.num_bytes for piece in a.pieces.values())
    with OpenFiles() as files:
        for name, piece in a.pieces.items():
            counterpart = None
            if b is not None:
                counterpart = b.pieces.get(name)
            _compare(report, name, piece, counterpart, files, atol)
            if progress is not None:
                progress(piece.num_bytes, total)

    return report


def _checksums(opened: Opened) -> list[str]:
    """Returns what the manifest says of the directory, or of the checkpoint in it that was opened.

    Megatron-LM may have gone on saving there: then the tracker names a later checkpoint, which no
    manifest covers, and the converted one need not be there any more.
    """
    # The conversion's output, or the checkpoint in it.
    roots = [opened.directory, opened.directory.parent]
    covered = [root for root in roots if (root / MANIFEST).is_file()]
    if not covered:
        return []
    if opened.kind == "HF":
        return check_manifest(covered[0])
    checkpoint = checkpoint_of(opened.directory).resolve().name
    parts = (f"{checkpoint}/", f"{HF}/")
    return check_manifest(covered[0], skip=lambda path: not path.startswith(parts))


def _compare(
    report: VerifyReport, name: str, a: Piece, b: Piece | None, files: OpenFiles, atol: float
) -> None:
    """Adds one tensor to the report: `a` by itself, and against `b` where it is given."""
    import torch

    report.tensors += 1
    report.num_bytes += a.num_bytes
    if b is not None and a.shape != b.shape:
        report.problems.append(f"{name} has the shapes {list(a.shape)} and {list(b.shape)}")
        return

    # In the wider of two dtypes, so that a conversion to it counts as identical.
    dtype = a.dtype
    if b is not None:
        dtype = widest([a.dtype, b.dtype])
    blocks = a.cast(dtype).blocks(files, _BLOCK_BYTES)
    pairs: Iterator[tuple[memoryview, memoryview]]
    if b is None:
        # Against itself, as only NaNs are looked for.
        pairs = ((block, block) for block in blocks)
    else:
        pairs = _aligned(blocks, b.cast(dtype).blocks(files, _BLOCK_BYTES))

    num_nans = 0
    largest = 0.0
    identical = True
    for left, right in pairs:
        left_values = torch.frombuffer(left, dtype=torch_dtype(dtype))
        num_nans += int(left_values.isnan().sum())
        # Bytes first: equal blocks need no arithmetic.
        if left != right:
            identical = False
            right_values = torch.frombuffer(right, dtype=torch_dtype(dtype))
            difference = (left_values.double() - right_values.double()).abs()
            # A NaN against a number is the largest difference that there is.
            largest = max(largest, float(difference.nan_to_num(nan=float("inf")).max()))

    report.nans += num_nans
    report.identical += identical
    if num_nans:
        report.problems.append(f"{name} has {num_nans} NaN values")
    if largest > report.max_abs_difference:
        report.max_abs_difference = largest
        report.worst = name
    # Written so that NaN is a problem.
    if not identical and not largest <= atol:
        report.problems.append(f"{name} differs by up to {largest:.3g}")
    elif not identical and atol == 0.0:
        report.problems.append(f"{name} differs in the sign of zeros or the bits of NaNs")


def _aligned(
    a: Iterator[memoryview], b: Iterator[memoryview]
) -> Iterator[tuple[memoryview, memoryview]]:
    """Yields equal stretches of two streams whose blocks are cut at different places."""
    left = memoryview(b"")
    right = memoryview(b"")
    while True:
        # A block is valid until the next one of its stream: it is used up before that.
        left = left or next(a, left)
        right = right or next(b, right)
        # An exhausted stream stays empty. The shapes are equal, so both end together.
        length = min(len(left), len(right))
        if not length:
            return

        yield left[:length], right[:length]
        left = left[length:]
        right = right[length:]
