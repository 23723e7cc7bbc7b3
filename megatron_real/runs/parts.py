"""A file of rollouts in parts, as a run on several nodes writes it. Loadable without torch.

    one node       step-00012.parquet                               the file
    four nodes     step-00012.parquet/part-00001-of-00004.parquet   what the first node holds
                                      ...
                                      part-00004-of-00004.parquet

Parts are written beside it, in step-00012.parquet.new. The first rank gives that directory its
name once all parts are on disk: what has the name is whole, and has no part of an earlier attempt.
Readers take a path and need not know which it is.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from megatron_real.disk import fsync, whole_binary_file
from megatron_real.records import Rollout

if TYPE_CHECKING:
    from megatron_real.parallel.exchange import Exchange

UNFINISHED = ".new"
"""What follows the name of a file or directory that is being written."""

_NAME = re.compile(r"part-(\d+)-of-(\d+)\.parquet")


@dataclass(frozen=True)
class Part:
    """What one process writes of a file of rollouts."""

    number: int = 1
    """From 1."""
    of: int = 1
    """Parts of the whole; 1: the file is written as such."""

    @property
    def name(self) -> str:
        """Its name in the directory of parts."""
        return f"part-{self.number:05d}-of-{self.of:05d}.parquet"

    @contextmanager
    def open(self, path: Path) -> Iterator[BinaryIO]:
        """Yields this part of `path` to write.

        It counts from `name_parts` on; a whole file does so when it is closed.
        """
        if self.of > 1:
            path = _unfinished(path) / self.name
        elif path.is_dir():
            # An earlier life, on several nodes, has written parts, which a file does not replace.
            delete(path)
        with whole_binary_file(path) as file:
            yield file


def name_parts(path: Path, *, of: int) -> None:
    """Gives the directory of parts its name, in place of what has it.

    Call it once all of them are written.

    Args:
        path: of the whole.
        of: how many parts there are.
    """
    unfinished = _unfinished(path)
    names = {Part(number, of).name for number in range(1, of + 1)}
    # An attempt of a life on another number of nodes may have left parts of other names.
    for left_over in unfinished.iterdir():
        if left_over.name not in names:
            left_over.unlink()
    # The names of the parts are on disk before the directory gets its final name.
    fsync(unfinished)
    if path.exists():
        # Between these two there is neither: a reader finds no file, and never a mixture.
        delete(path)
    unfinished.rename(path)
    fsync(path.parent)


def write_parts(
    path: Path,
    exchange: Exchange,
    rollouts: Sequence[Rollout],
    write: Callable[[list[Rollout], Part], None],
) -> None:
    """Writes rollouts: the first rank of each node what the ranks of its node hold. Collective.

    Args:
        path: of the whole; it counts once every node has written its part.
        exchange: between all ranks.
        rollouts: the same on every rank but for what is absent.
        write: writes whole rollouts as a part of `path`.

    Raises:
        RankFailed: a node could not write its part; `path` is as it was before. On one node the
            first rank alone raises what `write` raised.
    """
    # Here, because they need torch.
    import torch.distributed as dist

    from megatron_real.parallel.collective import all_well

    # Collective, and so outside of what may fail on one node alone.
    whole = exchange.to_nodes(rollouts)

    def write_own() -> None:
        if exchange.first_of_node:
            own = [whole[i] for i in exchange.held_by_node(whole)]
            write(own, Part(exchange.node + 1, exchange.num_nodes))

    if exchange.num_nodes == 1:
        write_own()
        return

    # Every part is on disk before the directory gets its name: `name_parts` does not wait.
    all_well(write_own, group=exchange.group or dist.group.WORLD)
    if exchange.rank == 0:
        name_parts(path, of=exchange.num_nodes)


def part_files(path: Path) -> list[Path]:
    """Returns the files that hold the rollouts of `path`, in order: itself, or its parts.

    Raises:
        ValueError: a part is missing; names it.
    """
    if not path.is_dir():
        return [path]

    matches = {file.name: _NAME.fullmatch(file.name) for file in path.iterdir()}
    counts = {int(match[2]) for match in matches.values() if match}
    if not counts:
        raise ValueError(f"{path} is a directory without a part of a step's rollouts")

    # Of several counts the largest: a part that is missing then shows by its name.
    names = [Part(number, max(counts)).name for number in range(1, max(counts) + 1)]
    for name in names:
        if name not in matches:
            raise ValueError(f"{path / name} is missing; the other parts of it are there")
    return [path / name for name in names]


def delete(path: Path) -> None:
    """Deletes a file of rollouts, or its parts."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _unfinished(path: Path) -> Path:
    return path.with_name(path.name + UNFINISHED)
