"""Checkpoints on disk: which is the newest whole one, and which are kept. No torch needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_real.runs import saved
from megatron_real.runs.changes import check_changes, same_rollouts
from megatron_real.runs.saved import Position, Saved


def make(folder: Path, step: int, update: int = 0, accuracy: float | None = None) -> Saved:
    """A checkpoint of two files, written the way a run does."""
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
    for step in (9, 10, 100):
        make(tmp_path, step)
    make(tmp_path, 10, update=3)
    assert (tmp_path / "latest").read_text() == "step_10_update_3\n"
    assert positions(tmp_path) == ["step_100", "step_10_update_3", "step_10", "step_9"]
    found = saved.newest_whole(tmp_path, lambda one: one.damage(), pytest.fail)
    assert found is not None and found.position == Position(100)


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
        (Path.unlink, "state.pt", "state.pt: No such file or directory"),
        (cut, "manifest.json", "manifest.json is missing or cut"),
        (Path.unlink, "manifest.json", "manifest.json is missing or cut"),
    ],
    ids=["cut", "one bit", "missing", "manifest cut", "manifest missing"],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path, harm, name: str, words: str) -> None:  # type: ignore[no-untyped-def]
    make(tmp_path, 10)
    harm(make(tmp_path, 20).path / name)
    said: list[str] = []
    found = saved.newest_whole(tmp_path, lambda one: one.damage(), said.append)
    assert found is not None and found.position == Position(10)
    assert len(said) == 1 and words in said[0] and "step_20" in said[0]
    assert (tmp_path / "step_20.damaged").is_dir(), "it is kept, under another name"
    make(tmp_path, 20)
    assert positions(tmp_path) == ["step_20", "step_10"]


def test_ranks_share_the_reading(tmp_path: Path) -> None:
    one = make(tmp_path, 1)
    flip(one.path / "state.pt")
    found = [one.damage(part=rank, parts=2) for rank in range(2)]
    assert found[0] == "" and "state.pt" in found[1]


def test_what_a_dead_writer_left_is_deleted(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (saved.temporary(tmp_path, Position(2)) / "deep").mkdir(parents=True)
    assert saved.newest_whole(tmp_path, lambda one: one.damage(), pytest.fail) is not None, "it is not a checkpoint"
    assert saved.clean(tmp_path) == ["step_2.partial"]
    assert positions(tmp_path) == ["step_1"] and not saved.temporary(tmp_path, Position(2)).exists()


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
        ({"keep": 9, "keep_every": 0, "keep_best": False}, ["step_50", "step_40_update_1", "step_40", "step_30",
                                                            "step_20", "step_10"]),
    ],
    ids=["newest", "every 20th", "best", "all"],
)  # fmt: skip
def test_retention(tmp_path: Path, options: dict[str, int], kept: list[str]) -> None:
    """Accuracy 0.8 twice: of equals the newest counts as the best."""
    for step, accuracy in ((10, 0.8), (20, None), (30, 0.8), (40, 0.1), (50, None)):
        make(tmp_path, step, accuracy=accuracy)
    make(tmp_path, 40, update=1)
    gone = saved.retire(tmp_path, **options)  # type: ignore[arg-type]
    assert positions(tmp_path) == kept
    assert len(gone) == 6 - len(kept)
    assert not list(tmp_path.glob("*.partial"))


def test_changes_are_said_or_refused() -> None:
    before = {"trainer": {"seed": 1, "steps": 10}, "optimizer": {"lr": 1.0}, "batch": {"minibatch_prompts": 4}}
    now = json.loads(json.dumps(before))
    now["optimizer"]["lr"] = 2.0
    now["trainer"]["steps"] = 20
    assert check_changes(before, now, within_a_step=False) == ["trainer.steps: 10 -> 20", "optimizer.lr: 1.0 -> 2.0"]
    now["trainer"]["seed"] = 2
    with pytest.raises(ValueError, match=r"trainer.seed was 1 and is now 2.*order of the prompts.*set trainer.seed=1"):
        check_changes(before, now, within_a_step=False)


def test_a_step_that_is_begun_is_ended_as_it_was_begun() -> None:
    before, now = {"batch": {"minibatch_prompts": 4}}, {"batch": {"minibatch_prompts": 8}}
    assert check_changes(before, now, within_a_step=False) == ["batch.minibatch_prompts: 4 -> 8"]
    with pytest.raises(ValueError, match="in the middle of a step"):
        check_changes(before, now, within_a_step=True)


def test_rollouts_outlive_changes_that_do_not_concern_them() -> None:
    before = {"rollout": {"temperature": 0.6}, "optimizer": {"lr": 1.0}}
    assert same_rollouts(before, {"rollout": {"temperature": 0.6}, "optimizer": {"lr": 2.0}})
    assert not same_rollouts(before, {"rollout": {"temperature": 0.7}, "optimizer": {"lr": 1.0}})
