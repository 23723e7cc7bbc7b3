"""What a run will take on disk, counted by hand for the shipped recipe of the 7B model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from megatron_real.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    RolloutConfig,
    TrainerConfig,
)
from megatron_real.runs.disk_needs import disk_needs
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.published import published_model

SEVEN_B = Architecture.read(published_model("r1-distill-qwen-7b"))
"""It has 7,615,616,512 parameters."""


def recipe(**rollout: Any) -> Config:
    """Returns the settings of examples/configs/real_7b.yaml."""
    return Config(
        trainer=TrainerConfig(run_dir="run", steps=1000),
        data=DataConfig(train="train.jsonl", heldout="heldout.jsonl"),
        rollout=RolloutConfig(**rollout),
        checkpoint=CheckpointConfig(every=10, keep=2, keep_every=100),
    )


def test_the_needs_of_the_7b_recipe_equal_those_computed_by_hand() -> None:
    """A parameter takes 14 bytes. Kept are steps 100, 200, ... 1000, 990 and the best one, beside
    the one that is being written.
    """
    needs = disk_needs(recipe(), SEVEN_B)
    assert needs.checkpoint == 14 * 7_615_616_512
    assert needs.num_checkpoints == 10 + 1 + 1 + 1
    assert needs.rollouts == 1000 * 128 * 8 * 4096 * 8
    assert needs.export == 2 * 7_615_616_512, "bf16"
    assert needs.total == 13 * needs.checkpoint + needs.rollouts + needs.export


def test_the_retention_of_rollouts_reduces_the_needs() -> None:
    needs = disk_needs(recipe(keep_steps=20), SEVEN_B, mean_response=1000)
    assert needs.rollouts == 20 * 128 * 8 * 1000 * 8
    needs = disk_needs(recipe(keep_steps=20, keep_every=50), SEVEN_B, mean_response=1000)
    assert needs.rollouts == (20 + 19) * 128 * 8 * 1000 * 8, "50, 100, ... 950 too"
    needs = disk_needs(recipe(keep_steps=20, keep_groups=16), SEVEN_B, mean_response=1000)
    assert needs.rollouts == 20 * 16 * 8 * 1000 * 8
    needs = disk_needs(recipe(keep_groups=500), SEVEN_B, mean_response=1000)
    assert needs.rollouts == 1000 * 128 * 8 * 1000 * 8, "more than there are"


@pytest.mark.parametrize(
    ("checkpoint", "kept"),
    [
        ({"every": 0}, 0),
        ({"every": 500, "keep": 5}, 2),
        ({"every": 300, "keep": 1, "keep_best": False}, 1),
        ({"every": 300, "keep": 1, "keep_every": 300, "keep_best": False}, 4),
    ],
    ids=["none", "all", "newest", "every one and the last"],
)
def test_the_number_of_checkpoints_kept_follows_the_retention(
    checkpoint: dict[str, Any], kept: int
) -> None:
    """With every=300, checkpoints are saved at steps 300, 600, 900 and 1000."""
    config = dataclasses.replace(recipe(), checkpoint=CheckpointConfig(**checkpoint))
    assert disk_needs(config, SEVEN_B).num_checkpoints == kept + 1
