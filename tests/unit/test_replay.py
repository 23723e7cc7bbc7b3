"""Whether saved rollouts can be trained on again is checked before anything starts."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_real.config import BatchConfig, Config, RolloutConfig, TrainerConfig
from megatron_real.records import POSITIVE, Completion, Prompt, Rollout, Status, Verdict
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.replay import check_replay
from megatron_real.runs.rollouts import write_rollouts

ROLLOUTS = [
    Rollout(
        Prompt(str(group), "", (1,), ("1",)),
        group,
        sample,
        Completion((2,), (-1.0,), "half \ud83d pair", True),
        Verdict(Status.OK, POSITIVE, 1.0),
    )
    for group in range(4)
    for sample in range(2)
]


@pytest.fixture
def saved(tmp_path: Path) -> RunDirectory:
    """Writes two steps of four prompts, two updates each, sampled at 0.7."""
    run = RunDirectory(tmp_path / "run")
    for step in (1, 2):
        numbers = [1, 1, 1, 1, 2, 2, 2, 2]
        write_rollouts(run.rollouts(step), ROLLOUTS, step=step, minibatches=numbers)
    run.config.write_text("rollout:\n  temperature: 0.7\n")
    return run


def config_of(run: RunDirectory, *, steps: int = 2, minibatch: int = 2, **changes: Any) -> Config:
    rollout = RolloutConfig(num_prompts=4, temperature=0.7, replay=str(run.path))
    return Config(
        trainer=TrainerConfig(steps=steps),
        rollout=dataclasses.replace(rollout, **changes),
        batch=BatchConfig(minibatch_prompts=minibatch),
    )


def test_a_replay_that_fits_is_accepted_without_a_warning(saved: RunDirectory) -> None:
    assert check_replay(config_of(saved)) == []
    assert check_replay(config_of(saved, steps=1)) == []
    assert check_replay(Config()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 3},
         r"has the rollouts of steps 1 to 2, but trainer.steps is 3; set trainer.steps=2"),
        ({"num_prompts": 8},
         r"of 4 prompts, but rollout.num_prompts is 8.*set rollout.num_prompts=4"),
        ({"temperature": 1.0},
         r"sampled at rollout.temperature = 0.7.*set rollout.temperature=0.7"),
        ({"replay": "/nowhere/at/all"}, r"rollout.replay = /nowhere/at/all is no directory"),
        ({"replay": str(Path(__file__).parent)}, r"has no rollouts of step 1"),
    ],
)  # fmt: skip
def test_a_replay_that_cannot_be_made_is_refused(
    saved: RunDirectory, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_replay(config_of(saved, **options))


def test_other_minibatches_are_warned_of(saved: RunDirectory) -> None:
    (sentence,) = check_replay(config_of(saved, minibatch=4))
    assert "made its updates of 2 prompts, this replay makes them of 4" in sentence


def test_a_cut_file_is_named(saved: RunDirectory) -> None:
    whole = saved.rollouts(1).read_bytes()
    saved.rollouts(1).write_bytes(whole[:-20])
    with pytest.raises(
        ValueError, match=r"step-00001.parquet is not a whole file of rollouts .*it may be cut"
    ):
        check_replay(config_of(saved))


def test_a_kept_batch_of_a_skipped_update_can_be_replayed(tmp_path: Path) -> None:
    """Its directory has neither a configuration nor updates."""
    dump = RunDirectory(tmp_path / "dump")
    write_rollouts(dump.rollouts(1), ROLLOUTS, step=12)
    assert check_replay(config_of(dump, steps=1, temperature=0.2)) == []
    fewer = RolloutConfig(num_prompts=8, replay=str(dump.path))
    with pytest.raises(ValueError, match=r"set rollout\.num_prompts=4"):
        check_replay(Config(trainer=TrainerConfig(steps=1), rollout=fewer,
                            batch=BatchConfig(minibatch_prompts=8)))  # fmt: skip


def test_the_check_needs_no_torch() -> None:
    code = "import sys, megatron_real.runs.replay; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
