"""A step's rollouts in parts, as several nodes write them: one reader reads all parts or none."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.parts import Part, name_parts
from megatron_real.runs.rollouts import (
    read_minibatches,
    read_rollouts,
    read_rows,
    write_rollouts,
)
from tests.unit.test_runs_rollouts import ROLLOUTS


def write_parts(path: Path) -> None:
    """Writes two parts, of which the first has the rollouts at both ends."""
    write_rollouts(
        path, ROLLOUTS[::2], step=7, scores=[0.1, 0.3], minibatches=[1, 2], part=Part(1, 2)
    )
    write_rollouts(path, ROLLOUTS[1:2], step=7, scores=[0.2], minibatches=[1], part=Part(2, 2))


def test_parts_count_when_all_are_there_and_are_read_as_one(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    path = run.rollouts(7)
    write_parts(path)
    assert run.saved_steps() == [] and run.kept_rollouts() == []
    assert run.unfinished_rollouts() == [path.with_name("step-00007.parquet.new")]

    name_parts(path, of=2)
    assert run.saved_steps() == [7] and run.unfinished_rollouts() == []
    assert read_rollouts(run.saved_rollouts(7)) == ROLLOUTS

    rows = list(read_rows(path))
    assert [row["score"] for row in rows] == [0.1, 0.2, 0.3], "in order of group and sample"
    assert sorted(read_minibatches(path)) == [(4, 1), (4, 1), (5, 2)]


def test_a_part_that_is_damaged_or_missing_names_itself(tmp_path: Path) -> None:
    path = tmp_path / "step-00007.parquet"
    write_parts(path)
    name_parts(path, of=2)
    second = path / "part-00002-of-00002.parquet"
    second.write_bytes(second.read_bytes()[:-9])

    with pytest.raises(ValueError, match=r"part-00002-of-00002.parquet is not a whole file"):
        read_rollouts(path)
    with pytest.raises(ValueError, match=r"part-00002-of-00002.parquet is not a whole file"):
        list(read_rows(path))

    second.unlink()
    for read in (read_rollouts, read_minibatches, lambda path: list(read_rows(path))):
        with pytest.raises(ValueError, match=r"part-00002-of-00002.parquet is missing"):
            read(path)


def test_parts_and_whole_files_replace_each_other(tmp_path: Path) -> None:
    """A run may be resumed on another number of nodes."""
    path = tmp_path / "step-00007.parquet"
    write_rollouts(path, ROLLOUTS[:1], step=7)
    write_rollouts(path, ROLLOUTS, step=7, part=Part(4, 4))  # whose life has ended before the rest
    write_parts(path)

    assert read_rollouts(path) == ROLLOUTS[:1], "the old one, until the new one is whole"

    name_parts(path, of=2)
    assert len(list(path.iterdir())) == 2 and read_rollouts(path) == ROLLOUTS

    write_parts(path)
    name_parts(path, of=2)
    assert read_rollouts(path) == ROLLOUTS

    write_rollouts(path, ROLLOUTS[:2], step=7)
    assert path.is_file() and read_rollouts(path) == ROLLOUTS[:2]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
