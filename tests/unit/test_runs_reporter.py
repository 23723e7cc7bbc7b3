"""The files of one run, written by the same calls as the training loop makes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_real.config import BatchConfig, Config, Given, RolloutConfig, TrainerConfig, load
from megatron_real.evaluation.figures import Evaluation
from megatron_real.records import (
    NEGATIVE,
    POSITIVE,
    Completion,
    Label,
    Prompt,
    Rollout,
    Status,
    Verdict,
)
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.reporter import Reporter, Training
from megatron_real.runs.rollouts import read_rollouts, read_rows


def accuracy(pass_at_1: float = 0.5) -> Evaluation:
    return Evaluation(
        pass_at_1=pass_at_1,
        standard_error=0.1,
        pass_at_k=((1, pass_at_1), (2, 0.75)),
        majority=None,
        problems=30,
        samples=2,
        failed_checks=1,
        unanswered_share=0.25,
        truncated_share=0.0,
        response_tokens_mean=4.0,
        correct=(("heldout/0", 2), ("heldout/1", 0)),
    )


def rollout(group: int, sample: int, label: Label) -> Rollout:
    prompt = Prompt(f"train/{group}", "1+1=", (1, 2), ("2",))
    verdict = Verdict(Status.OK if label else Status.WRONG, label, float(label))
    return Rollout(prompt, group, sample, Completion((7, 8), (-0.5, -0.25), "2", True), verdict)


ROLLOUTS = [
    rollout(group, sample, label)
    for group in (0, 1)
    for sample, label in ((0, POSITIVE), (1, NEGATIVE))
]
TRAINING = Training(
    losses=[1.0, math.nan],
    scores=[0.1, -0.1, math.nan, math.nan],
    weights=[-0.5, 0.5, math.nan, math.nan],
    max_abs_weight_tau=0.5,
    grad_norms=[2.0, math.nan],
    lr=1e-3,
    skipped=[2],
    token_means={"entropy": 0.375, "mismatch_mean_abs": math.nan},
    lag=0.0,
    kl=[math.nan, math.nan],
    clipped_low_share=[0.0, math.nan],
    clipped_high_share=[0.0, math.nan],
    low_ratio_tokens=[(1, 1, 4), (0, 0, 0)],
    equal_groups=0,
    tokens=16,
    flops=1e9,
)


CANARY = "canary-9012"  # a secret that the configuration has from the environment


def config_of(path: Path, **trainer: Any) -> Config:
    return Config(
        trainer=TrainerConfig(run_dir=str(path), steps=1, **trainer),
        rollout=RolloutConfig(
            num_prompts=2, group_size=2, max_response_tokens=8, vllm={"hf_token": CANARY}
        ),
        batch=BatchConfig(minibatch_prompts=1),
        given={"rollout.vllm.hf_token": Given("${oc.env:TOKEN}", CANARY)},
    )


def begun(config: Config, **options: Any) -> Reporter:
    """Returns a reporter that owns its run directory."""
    reporter = Reporter(config, **options)
    reporter.begin()
    return reporter


def one_step(reporter: Reporter) -> None:
    with reporter.progress:
        reporter.evaluated(0, accuracy())
        with reporter.step(1):
            for stage in ("old_logprobs", "update"):
                with reporter.progress.stage(stage):
                    pass
            reporter.trained(1, ROLLOUTS, TRAINING)
            reporter.skipped(1, 2, ROLLOUTS[2:])
        reporter.finish()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Returns a finished run's directory and its output."""
    path = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        one_step(begun(config_of(path, profile=(1,)), rank=0, world=2))
    return path, out.getvalue()


def test_a_run_leaves_its_files_and_says_where(done: tuple[Path, str]) -> None:
    path, out = done
    names = {
        str(p.relative_to(path))
        for p in path.rglob("*")
        if p.is_file() and "tensorboard" not in p.parts
    }

    assert names == {
        "config.yaml",
        "lives/life-0001.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "curves.png",
        "heldout/step-00000.json",
        "status.json",
        "logs/run.log",
        "profile/step-00001.json",
        "rollouts/step-00001.parquet",
        "dumps/step-00001-update-2/rollouts/step-00001.parquet",
    }
    assert list((path / "tensorboard").iterdir())

    answers = json.loads((path / "heldout/step-00000.json").read_text())
    assert answers == {"samples": 2, "correct": {"heldout/0": 2, "heldout/1": 0}}

    row = json.loads((path / "metrics.jsonl").read_text())
    assert row["step"] == 1
    assert row["reward_mean"] == 0.5
    assert row["skipped_updates"] == 1.0
    assert row["mismatch_mean_abs"] is None
    assert row["loss"] == 1.0 and "mfu" not in row
    assert f"run directory  {path}" in out and f"curves         {path / 'curves.png'}" in out


def test_saved_rollouts_carry_scores_weights_and_the_update_that_used_them(
    done: tuple[Path, str],
) -> None:
    path, _ = done
    rows = list(read_rows(path / "rollouts" / "step-00001.parquet"))
    assert [(r["step"], r["minibatch"], r["score"], r["weight"]) for r in rows] == [
        (1, 1, 0.1, -0.5),
        (1, 1, -0.1, 0.5),
        (1, 2, None, None),
        (1, 2, None, None),
    ]


def test_no_file_of_a_run_has_a_secret_in_it(done: tuple[Path, str]) -> None:
    path, out = done
    assert "hf_token: ${oc.env:TOKEN}" in (path / "config.yaml").read_text()
    for file in path.rglob("*"):
        assert not file.is_file() or CANARY.encode() not in file.read_bytes(), file
    assert CANARY not in out


def test_the_batch_of_a_skipped_update_can_be_replayed(done: tuple[Path, str]) -> None:
    path, out = done
    dump = RunDirectory(path).dump(1, 2)
    assert f"rollout.replay={dump.path} trainer.steps=1" in out
    assert read_rollouts(dump.rollouts(1)) == ROLLOUTS[2:]


def test_the_saved_configuration_is_that_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "megatron_real.config.checks.check_model", lambda config: None
    )  # there is no model here
    monkeypatch.setenv("TOKEN", CANARY)
    config = config_of(tmp_path, tensorboard=False, profile=(3, 5))
    begun(config, rank=0, world=1)
    assert load(tmp_path / "config.yaml") == config


def test_other_ranks_write_and_say_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_step(begun(config_of(tmp_path / "run", profile=(1,)), rank=1, world=2))
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_evaluation_seconds_do_not_leak_into_the_next_step_on_any_rank(tmp_path: Path) -> None:
    for rank in (0, 1):
        reporter = begun(config_of(tmp_path / str(rank), tensorboard=False), rank=rank, world=2)
        with reporter.progress.stage("evaluation"):
            pass
        reporter.evaluated(0, accuracy())
        assert reporter.progress.take_seconds() == {}


def test_an_evaluation_is_written_with_every_figure(tmp_path: Path) -> None:
    begun(config_of(tmp_path, tensorboard=False), rank=0, world=1).evaluated(0, accuracy())
    row = json.loads((tmp_path / "evaluations.jsonl").read_text())
    assert row["heldout/pass_at_1"] == 0.5
    assert row["heldout/pass_at_2"] == 0.75
    assert row["heldout/unanswered_share"] == 0.25
    assert "heldout/majority" not in row, "validation holds no vote"


def test_a_step_s_rollouts_take_the_place_of_its_chunks_when_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the writing thread is raised where a checkpoint would count the step."""
    path = tmp_path / "run"
    directory = RunDirectory(path)
    reporter = begun(config_of(path), rank=0, world=1)
    chunk = directory.chunk(1, 0, 0)
    chunk.parent.mkdir(parents=True)
    chunk.touch()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken, reporter.progress:
        broken.setattr("megatron_real.runs.reporter.write_rollouts", full)
        reporter.trained(1, ROLLOUTS, TRAINING)
        with pytest.raises(OSError, match="no space left"):
            reporter.settle()

    assert chunk.exists() and directory.saved_steps() == []

    with reporter.progress:
        reporter.trained(1, ROLLOUTS, TRAINING)
        reporter.settle()
    assert not chunk.exists() and directory.saved_steps() == [1]


def test_the_newest_steps_and_every_so_many_keep_their_rollouts(tmp_path: Path) -> None:
    config = config_of(tmp_path / "run")
    rollout = dataclasses.replace(config.rollout, keep_steps=2, keep_every=3)
    reporter = begun(dataclasses.replace(config, rollout=rollout), rank=0, world=1)
    with reporter.progress:
        for step in range(1, 9):
            reporter.trained(step, ROLLOUTS, TRAINING)
        reporter.settle()
    assert RunDirectory(tmp_path / "run").saved_steps() == [3, 6, 7, 8]


def test_a_sample_of_groups_is_drawn_by_the_seed_and_counted_whole(tmp_path: Path) -> None:
    groups = {}
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        config = config_of(tmp_path / name, seed=seed)
        rollout = dataclasses.replace(config.rollout, keep_groups=1)
        reporter = begun(dataclasses.replace(config, rollout=rollout), rank=0, world=1)
        with reporter.progress:
            for step in range(1, 9):
                reporter.trained(step, ROLLOUTS, TRAINING)
            reporter.settle()
        directory = RunDirectory(tmp_path / name)
        steps = [list(read_rows(directory.rollouts(step))) for step in range(1, 9)]
        assert [len(rows) for rows in steps] == [2] * 8, "one group of two"
        groups[name] = [{row["group"] for row in rows} for rows in steps]
        for rows in steps:
            figures = [(row["minibatch"], row["score"]) for row in rows]
            assert figures in ([(1, 0.1), (1, -0.1)], [(2, None), (2, None)])
        metrics = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])
        assert metrics["reward_mean"] == 0.5, "of all rollouts"

    assert groups["first"] == groups["again"] != groups["other"]
    assert {0} in groups["first"] and {1} in groups["first"], "each step draws anew"
