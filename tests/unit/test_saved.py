"""Checkpoints on disk: which is the newest whole one, and which are kept. No test needs torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_real.runs import saved
from megatron_real.runs.changes import check_changes
from megatron_real.runs.saved import Position, Saved, UnreadableCheckpoint


def make(folder: Path, step: int, update: int = 0, accuracy: float | None = None) -> Saved:
    """Writes a checkpoint of two files, as a run does."""
    position = Position(step, update)
    partial = saved.temporary(folder, position)
    partial.mkdir(parents=True)
    for name in ("a.distcp", "state.pt"):
        (partial / name).write_bytes(f"{name} of {position}".encode() * 100)
    digests = {f.name: (f.stat().st_size, saved.checksum(f)) for f in partial.iterdir()}
    return saved.commit(folder, position, digests, {"accuracy": accuracy})


def positions(folder: Path) -> list[str]:
    return [str(one.position) for one in saved.saved(folder)]


def test_a_whole_checkpoint_is_found(tmp_path: Path) -> None:
    # As text, step_9 would come after step_100.
    for step in (9, 10, 100):
        make(tmp_path, step)
    make(tmp_path, 10, update=3)
    assert positions(tmp_path) == ["step_100", "step_10_update_3", "step_10", "step_9"]
    assert [one.damage() for one in saved.saved(tmp_path)] == ["", "", "", ""]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "name", "words"),
    [
        (cut, "a.distcp", "a.distcp has 1899 bytes instead of 1900"),
        (flip, "a.distcp", "a.distcp has another checksum"),
        (Path.unlink, "state.pt", "state.pt is missing"),
        (cut, "manifest.json", "manifest.json is missing or cut"),
        (Path.unlink, "manifest.json", "manifest.json is missing or cut"),
    ],
    ids=["cut", "one bit", "missing", "manifest cut", "manifest missing"],
)
def test_damage_is_named_and_set_aside(
    tmp_path: Path, harm: Callable[[Path], object], name: str, words: str
) -> None:
    make(tmp_path, 10)
    damaged = make(tmp_path, 20)
    harm(damaged.path / name)
    assert words in damaged.damage()
    assert saved.set_aside(damaged) == tmp_path / "step_20.damaged"
    assert positions(tmp_path) == ["step_10"]
    assert saved.set_aside_before(tmp_path) == ["step_20.damaged"], "it is kept, by another name"
    make(tmp_path, 20)
    assert positions(tmp_path) == ["step_20", "step_10"]


@pytest.mark.parametrize("name", ["a.distcp", "manifest.json"])
def test_a_checkpoint_that_cannot_be_read_is_not_damaged(tmp_path: Path, name: str) -> None:
    """A link to itself is an error (ELOOP) for every user, also for root, as EACCES or EIO would
    be.
    """
    one = make(tmp_path, 10)
    content = (one.path / name).read_bytes()
    (one.path / name).unlink()
    (one.path / name).symlink_to(name)
    with pytest.raises(UnreadableCheckpoint, match=r"symbolic links.*nothing was changed"):
        one.damage()
    (one.path / name).unlink()
    (one.path / name).write_bytes(content)
    assert one.damage() == ""


def test_a_file_that_becomes_unreadable_during_its_checksum_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(file: Path) -> str:
        raise PermissionError(13, "Permission denied", str(file))

    one = make(tmp_path, 10)
    monkeypatch.setattr(saved, "checksum", denied)
    with pytest.raises(
        UnreadableCheckpoint, match=r"a\.distcp cannot be read \(Permission denied\)"
    ):
        one.damage()


def test_ranks_share_the_reading_of_checksums(tmp_path: Path) -> None:
    one = make(tmp_path, 1)
    flip(one.path / "state.pt")
    files = one.manifest()["files"]
    damages = [one.corrupt(files, part=rank, parts=2) for rank in range(2)]
    assert damages[0] == "" and "state.pt" in damages[1]


def test_files_that_a_dead_writer_left_are_deleted(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (saved.temporary(tmp_path, Position(2)) / "deep").mkdir(parents=True)
    (tmp_path / "step_3.deleted").mkdir()
    assert positions(tmp_path) == ["step_1"], "neither is a checkpoint"
    assert saved.clean(tmp_path) == (["step_2.partial", "step_3.deleted"], [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1"]


def test_a_checkpoint_that_cannot_be_deleted_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    for step in (1, 2, 3):
        make(tmp_path, step)
    monkeypatch.setattr(shutil, "rmtree", busy)
    gone, failures = saved.retire(tmp_path, keep=2, keep_every=0, keep_best=False)

    assert gone == [Position(1)] and "step_1.deleted could not be deleted" in failures[0]
    assert positions(tmp_path) == ["step_3", "step_2"]
    assert saved.clean(tmp_path)[1] == failures, "a later start says it again, and goes on"

    make(tmp_path, 1)
    gone, failures = saved.retire(tmp_path, keep=2, keep_every=0, keep_best=False)
    assert gone == [Position(1)] and "step_1.deleted-2" in failures[0]


def test_a_checkpoint_that_was_moved_and_linked_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    elsewhere = tmp_path / "other_disk"
    for step in (1, 2, 3):
        make(folder, step)
    (folder / "step_1").rename(elsewhere)
    (folder / "step_1").symlink_to(elsewhere)

    assert saved.retire(folder, keep=1, keep_every=0, keep_best=False) == ([Position(2)], [])
    assert positions(folder) == ["step_3", "step_1"]
    assert saved.saved(folder)[1].damage() == ""

    make(folder, 1)
    assert not (folder / "step_1").is_symlink(), "the same position again takes the link's place"
    assert (elsewhere / "state.pt").exists(), "and leaves alone what it pointed to"


def test_the_same_position_again_replaces_it(tmp_path: Path) -> None:
    old = make(tmp_path, 5)
    (old.path / "extra").write_text("x")
    make(tmp_path, 5)
    assert not (tmp_path / "step_5/extra").exists()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep": 2, "keep_every": 0, "keep_best": False}, ["step_50", "step_40_update_1"]),
        ({"keep": 1, "keep_every": 20, "keep_best": False}, ["step_50", "step_40", "step_20"]),
        ({"keep": 1, "keep_every": 0, "keep_best": True}, ["step_50", "step_30"]),
        (
            {"keep": 9, "keep_every": 0, "keep_best": False},
            ["step_50", "step_40_update_1", "step_40", "step_30", "step_20", "step_10"],
        ),
    ],
    ids=["newest", "every 20th", "best", "all"],
)
def test_the_retention_keeps_the_newest_the_regular_and_the_best(
    tmp_path: Path, options: dict[str, Any], kept: list[str]
) -> None:
    """Accuracy 0.8 occurs twice: of equal ones the newest counts as the best."""
    for step, accuracy in ((10, 0.8), (20, None), (30, 0.8), (40, 0.1), (50, None)):
        make(tmp_path, step, accuracy=accuracy)
    make(tmp_path, 40, update=1)
    gone, failures = saved.retire(tmp_path, **options)
    assert positions(tmp_path) == kept
    assert len(gone) == 6 - len(kept) and not failures
    assert not saved.left_behind(tmp_path)


def test_changed_settings_are_reported_or_refused() -> None:
    before = {
        "trainer": {"seed": 1, "steps": 10},
        "optimizer": {"lr": 1.0},
        "batch": {"minibatch_prompts": 4},
    }
    now = json.loads(json.dumps(before))
    now["optimizer"]["lr"] = 2.0
    now["trainer"]["steps"] = 20

    assert check_changes(before, now, within_a_step=False) == [
        "trainer.steps: 10 -> 20",
        "optimizer.lr: 1.0 -> 2.0",
    ]

    now["trainer"]["seed"] = 2
    with pytest.raises(
        ValueError,
        match=r"trainer.seed was 1 and is now 2.*order of the prompts.*set trainer.seed=1",
    ):
        check_changes(before, now, within_a_step=False)


def test_a_step_is_finished_with_the_settings_it_began_with() -> None:
    before = {"batch": {"minibatch_prompts": 4}}
    now = {"batch": {"minibatch_prompts": 8}}
    assert check_changes(before, now, within_a_step=False) == ["batch.minibatch_prompts: 4 -> 8"]
    with pytest.raises(ValueError, match="in the middle of a step"):
        check_changes(before, now, within_a_step=True)
