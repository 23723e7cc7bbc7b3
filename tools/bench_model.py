"""A random model for the benchmarks, in a directory that all ranks see."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_real.parallel.groups import join_world


@contextlib.contextmanager
def shared_directory(parent: str | None = None) -> Iterator[Path]:
    """Joins the world; rank 0's temporary directory, on every rank until all have left."""
    join_world(timeout_minutes=30)
    with tempfile.TemporaryDirectory(dir=parent) as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        yield Path(shared[0])
        dist.barrier()


def write_model(directory: Path, **shape: int) -> None:
    """Rank 0 writes an untied Qwen2 of that shape, the others wait."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    if dist.get_rank() == 0:
        logging.disable_progress_bar()
        torch.manual_seed(0)
        settings: dict[str, Any] = {**shape, "tie_word_embeddings": False}
        Qwen2ForCausalLM(Qwen2Config(**settings)).save_pretrained(directory)
    dist.barrier()
