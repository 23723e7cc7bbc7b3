"""Loading a checkpoint by megatron-core without running code that its files bring.

megatron-core and torch read four kinds of pickles of a torch_dist checkpoint, and a pickle may call
whatever can be imported:

    .metadata             pickle.load of torch's FileSystemReader: anything may run
    common.pt             torch.load with torch's default, weights_only
    *.distcp, tensors     torch.load(weights_only=True)
    *.distcp, objects     torch.load(weights_only=False) of torch's DefaultLoadPlanner: anything may
                          run

So `.metadata` may name only the classes of its own format, and within `weights_only` every
torch.load is a load of weights only. (torch 2.13, torch/distributed/checkpoint/filesystem.py and
default_planner.py; megatron-core 0.16.1 and 0.19.2, dist_checkpointing/strategies/.)
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_real.weights import WeightsError
from megatron_real.weights.containers import LARGEST_PICKLE, TORCH_DTYPES, load_pickle

_METADATA = "torch.distributed.checkpoint.metadata"
# What torch's writer and ours put into .metadata, and nothing that could be called to any effect.
_NAMES_OF_METADATA = frozenset(
    {
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }
    | {("torch", name) for name in TORCH_DTYPES}
)
_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def check_metadata(checkpoint: Path) -> None:
    """Refuses a torch_dist checkpoint whose `.metadata` names what metadata do not need.

    Raises:
        WeightsError: it does, or it is missing, unreadable or corrupt, or there are others beside
            it; nothing of them has run.
    """
    # torch falls back on a rank's own metadata where those of all ranks cannot be loaded
    # (state_dict_loader.py).
    others = sorted(file.name for file in checkpoint.glob("__*.metadata"))
    if others:
        raise WeightsError(
            f"{checkpoint} has {others[0]} beside .metadata, which no checkpoint of all ranks has; "
            f"do not trust it"
        )

    file = checkpoint / ".metadata"
    try:
        size = file.stat().st_size
        if size > LARGEST_PICKLE:
            raise WeightsError(f"{file} has {size:,} bytes; no checkpoint needs that many")
        load_pickle(file.read_bytes(), file, only=_NAMES_OF_METADATA)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror})") from error


@contextmanager
def weights_only(checkpoint: Path) -> Iterator[None]:
    """Within, torch.load builds tensors and plain values only, whatever its caller asks for.

    Args:
        checkpoint: what is loaded, for the sentence.

    Raises:
        WeightsError: a file of the checkpoint needs more, which is an attack or damage.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    before = os.environ.get(_FORCE)
    # torch.load reads the variable at each call, so that callers within megatron-core obey it too.
    os.environ[_FORCE] = "1"
    try:
        yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        # torch's reader gathers the errors of all ranks into one exception.
        causes = [cause for cause, _ in getattr(error, "failures", {}).values()]
        refusals = [e for e in (error, *causes) if isinstance(e, pickle.UnpicklingError)]
        if not refusals:
            raise

        # torch's message goes on with advice to switch the check off.
        lines = str(refusals[0]).strip().splitlines() or [""]
        raise WeightsError(
            f"{checkpoint} holds an object that is not plain data ({lines[0]}); do not trust it"
        ) from error
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before
