"""What the workers run for test_checkpoint.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.futures import Future

from megatron_real.config import Config
from tests.distributed.jobs import new_policy, rollouts_of
from tests.distributed.reference import Sample


def trained_and_saved(
    config: Config, samples: list[Sample], folder: str, live: bool = False
) -> dict[str, Any]:
    """Makes three updates, copies the state, makes three more, and only then writes the copy.

    Args:
        live: the negative control: the state itself takes the place of its copy.
    """
    from megatron_real.checkpoint import writer
    from megatron_real.checkpoint.state import schedule_state, sharded_state

    policy = new_policy(config, config.model.path)
    rollouts = rollouts_of(samples)
    for batch in policy.prepare(rollouts):
        policy.update(batch)
    state = state_of(policy)

    if live:
        # Nobody takes the patch back: this process ends with the function.
        mock.patch.object(
            writer, "host_copies", lambda like: [tensor.detach() for tensor in like]
        ).start()
    store = writer.Staging(policy.groups.dp_cp)
    by_key, common = store.copy(sharded_state(policy))
    schedule = schedule_state(policy)

    for batch in policy.prepare(rollouts):
        policy.update(batch)

    first = dist.get_rank() == 0
    if first:
        Path(folder).mkdir()
    dist.barrier()
    group = None
    if dist.get_world_size() > 1:
        group = dist.new_group(backend="gloo")
    writer.write(Path(folder), by_key, group)
    if first:
        writer.write_common(Path(folder), common)
    return {**state, "schedule": schedule, "later": state_of(policy)["weights"]}


def resumed(
    config: Config, samples: list[Sample], folder: str, schedule: dict[str, int]
) -> dict[str, Any]:
    """Returns the state as it is read back in this layout, and the weights three updates later."""
    from megatron_real.checkpoint.state import load_schedule_state, load_sharded_state
    from megatron_real.checkpoint.unpickling import check_metadata, weights_only

    policy = new_policy(config, config.model.path)
    check_metadata(Path(folder))
    with weights_only(Path(folder)), counted_reads() as numbers:
        load_sharded_state(policy, Path(folder))
    load_schedule_state(policy, schedule)
    state = state_of(policy)

    for batch in policy.prepare(rollouts_of(samples)):
        policy.update(batch)
    return {**state, "numbers read": sum(numbers), "later": state_of(policy)["weights"]}


@contextmanager
def counted_reads() -> Iterator[list[int]]:
    """Yields how many numbers of tensors this rank has read from a checkpoint's files, so far."""
    numbers: list[int] = []
    read_data = FileSystemReader.read_data

    def counted(self: FileSystemReader, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        items = [item for item in plan.items if item.type == LoadItemType.TENSOR]
        numbers.extend(prod(item.lengths) for item in items)
        return read_data(self, plan, planner)

    FileSystemReader.read_data = counted  # type: ignore[method-assign]
    try:
        yield numbers
    finally:
        FileSystemReader.read_data = read_data  # type: ignore[method-assign]


def numbers_of(folder: str) -> int:
    """Returns how many numbers the tensors of a checkpoint have."""
    entries = FileSystemReader(folder).read_metadata().state_dict_metadata.values()
    return sum(prod(entry.size) for entry in entries if isinstance(entry, TensorStorageMetadata))


def state_of(policy: Any) -> dict[str, Any]:
    """Returns the weights by HF names, and this rank's pieces of the optimizer's state, each with
    its key, the whole tensor's shape and the piece's offset in it.
    """
    from megatron_real.checkpoint.state import sharded_state

    pieces = [
        (piece.key, piece.global_shape, piece.global_offset, piece.data.clone())
        for piece in sharded_state(policy)["optimizer"].values()
    ]
    return {"weights": {name: tensor.clone() for name, tensor in policy.stream()}, "pieces": pieces}


def stopped_within_a_step(config: Config, samples: list[Sample], done: int) -> dict[str, Any]:
    """Returns the state of a step after `done` of its updates, and the scores of the others."""
    from megatron_real.checkpoint.state import unfinished

    policy = new_policy(config, config.model.path)
    batches = policy.prepare(rollouts_of(samples))
    updates = [policy.update(batch) for batch in batches[:done]]
    begun = unfinished(policy, batches, updates).state_dict()
    rest = [policy.update(batch) for batch in batches[done:]]
    return {
        "begun": begun,
        "scores": [u.gradient.score_R for u in rest],
        "stats": policy.token_stats(batches).means(),
    }


def taken_up(
    config: Config, samples: list[Sample], begun: dict[str, Any], done: int
) -> dict[str, Any]:
    """Makes the rest of the step in this layout, from the state `begun`.

    The updates before it are made again, to have the same weights.
    """
    from megatron_real.checkpoint.state import Unfinished, prepare_step

    policy = new_policy(config, config.model.path)
    for batch in policy.prepare(rollouts_of(samples))[:done]:
        policy.update(batch)
    batches, updates = prepare_step(policy, rollouts_of(samples), Unfinished.from_state_dict(begun))
    assert len(updates) == done
    rest = [policy.update(batch) for batch in batches[done:]]
    return {
        "scores": [u.gradient.score_R for u in rest],
        "stats": policy.token_stats(batches).means(),
    }


def assembled(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Returns the whole tensors of the optimizer's state, from the pieces of all ranks;
    NaN where nobody has an element.
    """
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for key, shape, offset, data in rank["pieces"]:
            tensor = whole.setdefault(key, torch.full(shape, torch.nan))
            place = slices(offset, data.shape)
            known = ~tensor[place].isnan()
            assert torch.equal(tensor[place][known], data[known]), f"two ranks disagree on {key}"
            tensor[place] = data
    return whole


def slices(offset: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """Returns the box of `size` elements that begins at `offset`, as an index of a tensor."""
    return tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
