"""Sweeps are refused in one sentence before anything starts, read from run directories, and
compared seed by seed.
"""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from megatron_real import cli
from megatron_real.compare.results import RunOutcome, RunResult, read_result
from megatron_real.compare.statistics import mean_over_seeds, paired_difference
from megatron_real.compare.sweep import Sweep, SweepRun, load_sweep
from megatron_real.compare.table import as_json, figure_table, runs_table, variant_rows, write_table
from megatron_real.config import to_plain
from megatron_real.disk import write_whole
from megatron_real.runs.rows import append_row
from megatron_real.runs.status import write_status

ROOT = Path(__file__).parents[2]


# ---- statistics


def test_mean_and_standard_error_equal_those_computed_by_hand() -> None:
    # Deviations -2, 0, 2: s^2 = 8 / 2 = 4, and 2 / sqrt(3).
    mean = mean_over_seeds([1.0, 3.0, 5.0])
    assert mean.value == 3.0 and mean.count == 3
    assert mean.standard_error == pytest.approx(2 / math.sqrt(3), abs=1e-15)


@pytest.mark.parametrize("values", [[], [0.5, math.nan]], ids=["nothing", "a NaN"])
def test_an_unknown_figure_makes_the_mean_unknown(values: list[float]) -> None:
    assert math.isnan(mean_over_seeds(values).value)


def test_one_seed_has_no_spread() -> None:
    mean = mean_over_seeds([0.5])
    assert mean.value == 0.5 and math.isnan(mean.standard_error)


def test_the_interval_of_two_differences_equals_that_computed_by_hand() -> None:
    # Differences 0.1 and 0.3. Their four resamples have the means 0.1, 0.2, 0.2, 0.3, so that 25 %
    # lie at either end: the 95 % interval is [0.1, 0.3]. Standard error: |0.3 - 0.1| / 2.
    difference = paired_difference({1: 0.5, 2: 0.4}, {1: 0.6, 2: 0.7})
    assert difference.value == pytest.approx(0.2)
    assert difference.standard_error == pytest.approx(0.1)
    assert (difference.low, difference.high) == pytest.approx((0.1, 0.3))


def per_problem(*rows: list[float]) -> dict[int, dict[str, float]]:
    """Returns {seed: {problem: figure}} of a row for each seed."""
    return {
        seed: {f"heldout/{i}": value for i, value in enumerate(row)}
        for seed, row in enumerate(rows)
    }


ZERO = {0: 0.0, 1: 0.0}
ZERO_OF = per_problem([0.0, 0.0], [0.0, 0.0])


@pytest.mark.parametrize(
    "table",
    [
        # Every seed gains 1 on one problem and 0 on the other: a resample of the two problems has
        # the mean 0, 1/2 or 1 in 1, 2 and 1 of 4 cases, so that more than 2.5 % lie at either end.
        pytest.param(per_problem([0.0, 1.0], [0.0, 1.0]), id="problems differ, seeds agree"),
        pytest.param(per_problem([0.0, 0.0], [1.0, 1.0]), id="seeds differ, problems agree"),
    ],
)
def test_the_interval_over_seeds_and_problems_equals_that_computed_by_hand(
    table: dict[int, dict[str, float]],
) -> None:
    means = {seed: sum(row.values()) / 2 for seed, row in table.items()}
    difference = paired_difference(ZERO, means, first_problems=ZERO_OF, other_problems=table)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.5, 0.0, 1.0))
    assert difference.resampled == "seeds and problems"


def test_without_the_problems_the_interval_is_over_seeds() -> None:
    means = {0: 0.5, 1: 0.5}
    others = per_problem([0.0, 1.0], [0.0, 1.0])
    others[1]["heldout/9"] = others[1].pop("heldout/1")  # another set of problems
    for problems in ({}, others):
        difference = paired_difference(ZERO, means, first_problems=ZERO_OF, other_problems=problems)
        assert (difference.low, difference.high, difference.resampled) == (0.5, 0.5, "seeds")


def test_the_interval_is_as_wide_as_both_spreads() -> None:
    """The variance of a mean over both seeds and problems is about the variance over seeds plus
    that over problems (Owen 2007, Section 3).
    """
    rng = np.random.default_rng(3)
    table_SN = rng.normal(0.1, 0.1, (8, 1)) + rng.normal(0.0, 0.5, (1, 60))
    rows = per_problem(*table_SN.tolist())
    zeros = per_problem(*np.zeros_like(table_SN).tolist())
    means = dict(enumerate(table_SN.mean(1).tolist()))
    zero = dict.fromkeys(means, 0.0)
    difference = paired_difference(zero, means, first_problems=zeros, other_problems=rows)

    error = math.sqrt(table_SN.mean(1).var(ddof=1) / 8 + table_SN.mean(0).var(ddof=1) / 60)
    # A 95 % interval is 1.96 standard errors wide to each side; resampling leaves about a tenth.
    assert difference.high - difference.low == pytest.approx(2 * 1.96 * error, rel=0.1)

    # The spread over problems is the larger part here, so leaving it out must show.
    over_seeds = paired_difference(zero, means)
    assert over_seeds.high - over_seeds.low < 0.8 * (difference.high - difference.low)


def test_seeds_are_paired() -> None:
    """Seeds differ by 0.4 and variants by 0.1 on each seed: a paired interval is that of 0.1, a
    crossed one would cover 0.
    """
    first = {1: 0.1, 2: 0.5, 3: 0.9}
    paired = paired_difference(first, {1: 0.2, 2: 0.6, 3: 1.0})
    crossed = paired_difference(first, {1: 1.0, 2: 0.2, 3: 0.6})
    assert paired.value == pytest.approx(0.1) and crossed.value == pytest.approx(0.1)
    assert (paired.low, paired.high) == pytest.approx((0.1, 0.1))
    assert crossed.low < 0 < crossed.high


def test_a_seed_that_only_one_variant_has_is_left_out_of_the_difference() -> None:
    difference = paired_difference({1: 0.5, 2: 0.4}, {2: 0.7, 3: 0.0})
    assert difference.count == 1 and difference.value == pytest.approx(0.3)
    assert math.isnan(difference.low)


# ---- the sweep's file


@pytest.fixture
def base(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    """Writes a base configuration of 10 steps of 4 x 8 rollouts."""
    model = tmp_path / "model"
    model.symlink_to(tiny_model(num_hidden_layers=2, max_position_embeddings=16384))
    values = {
        "model": {"path": str(model)},
        "trainer": {"steps": 10},
        "data": {"train": "train.jsonl", "heldout": "heldout.jsonl"},
        "rollout": {"engine": "transformers", "num_prompts": 4, "group_size": 8},
        "batch": {"minibatch_prompts": 4},
    }
    OmegaConf.save(OmegaConf.create(values), tmp_path / "base.yaml")
    return tmp_path / "base.yaml"


def write_sweep(base: Path, /, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "base": base.name,
        "out": str(base.parent / "out"),
        "seeds": [1, 2, 3],
        "variants": {"real": {}, "grpo": {"objective": {"name": "grpo", "clip": 0.3}}},
    }
    path = base.parent / "sweep.yaml"
    OmegaConf.save(OmegaConf.create(values | changes), path)
    return path


def test_a_sweep_has_a_run_for_each_variant_and_seed(base: Path) -> None:
    sweep = load_sweep(write_sweep(base))
    assert sweep.variants == ("real", "grpo") and sweep.budget == 320
    names = [run.name for run in sweep.runs]
    assert names[:3] == ["real, seed 1", "grpo, seed 1", "real, seed 2"] and len(names) == 6
    grpo = sweep.runs[1]
    assert (grpo.config.objective.name, grpo.config.trainer.seed) == ("grpo", 1)
    assert grpo.directory.path == base.parent / "out/grpo/seed-1"
    assert {"objective.clip=0.3", "trainer.seed=1", "trainer.steps=10"} <= set(grpo.overrides)


def test_variants_use_the_same_number_of_rollouts(base: Path) -> None:
    variants = {"real": {}, "large": {"rollout": {"group_size": 16}}}
    sweep = load_sweep(write_sweep(base, budget=640, variants=variants))
    assert [run.config.trainer.steps for run in sweep.runs[:2]] == [20, 10]


def test_permuted_labels_are_accepted_as_a_control(base: Path) -> None:
    variants = {"real": {}, "control": {"labels": {"permute": True}}}
    sweep = load_sweep(write_sweep(base, variants=variants))
    assert [run.config.labels.permute for run in sweep.runs[:2]] == [False, True]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"variant": {}}, "unknown key variant; did you mean variants?"),
        ({"out": None}, "out is None; give a path"),
        ({"base": "other.yaml"}, "there is no config file"),
        ({"seeds": [1, 1]}, "each seed may be there once"),
        ({"seeds": []}, "give whole numbers"),
        ({"seeds": [True]}, "give whole numbers"),
        ({"budget": 0}, "give a number of rollouts above 0"),
        ({"budget": 100}, "take a budget of 96 rollouts"),
        ({"variants": {}}, "give each variant a name"),
        ({"variants": {"a/b": {}}}, "use letters, digits"),
        ({"variants": {"..": {}}}, "use letters, digits"),
        ({"variants": {"a": 3}}, "it takes sections of a configuration"),
        ({"variants": {"a": {"objective": {"tua": 1}}}}, "variant a: unknown key objective.tua"),
        ({"variants": {"a": {"trainer": {"seed": 4}}}}, "it comes from the sweep's `seeds`"),
        ({"variants": {"a": {"trainer": {"steps": 4}}}}, "it follows from the sweep's `budget`"),
        ({"variants": {"a": {"data": {"shuffle": False}}}}, "trained on the same prompts"),
        ({"variants": {"a": {"evaluation": {"samples": 4}}}}, "evaluated alike"),
        ({"variants": {"a": {"labels": {"verifier": "exact"}}}}, "judged alike"),
        ({"variants": {"a": {"rollout": {"refill_rounds": 2}}}}, "more rollouts than the others"),
        ({"variants": {"a": {"parallel": {"tp": 2}}}}, "variant a: "),
    ],
    ids=str,
)  # fmt: skip
def test_an_invalid_sweep_is_refused(
    base: Path, changes: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", str(write_sweep(base, **changes))]) == 2
    output = capsys.readouterr().err
    assert sentence in output and output.count("\n") == 1
    assert not (base.parent / "out").exists(), "something was written"


def test_settings_on_the_command_line_apply_to_all_variants(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = load_sweep(write_sweep(base), ["optimizer.lr=3e-5"])
    assert {run.config.optimizer.lr for run in sweep.runs} == {3e-5}
    assert cli.main(["compare", str(write_sweep(base)), "objective.tau=1"]) == 2
    assert "set it in the variants" in capsys.readouterr().err


def test_runs_of_other_settings_are_refused(base: Path) -> None:
    run = load_sweep(write_sweep(base)).runs[0]
    keep(run, accuracy=0.5)
    load_sweep(
        write_sweep(base), ["checkpoint.every=5", f"data.train={Path('train.jsonl').absolute()}"]
    )
    with pytest.raises(ValueError, match=r"was made with optimizer.lr=.* give another out"):
        load_sweep(write_sweep(base), ["optimizer.lr=3e-5"])


def test_a_run_of_an_earlier_version_may_lack_new_settings(base: Path) -> None:
    """It ran with what is now the default of these settings, and with no other value."""
    run = load_sweep(write_sweep(base)).runs[0]
    keep(run, accuracy=0.5)
    values = OmegaConf.load(run.directory.config)
    assert isinstance(values, DictConfig)
    del values["rollout"]["max_lag"], values["objective"]["tau"]
    OmegaConf.save(values, run.directory.config)
    load_sweep(write_sweep(base))
    with pytest.raises(ValueError, match=r"made with objective\.tau=None"):
        load_sweep(write_sweep(base, variants={"real": {"objective": {"tau": 0.1}}}))


def test_shipped_sweeps_name_settings_that_exist(base: Path) -> None:
    """The runs are loaded with this test's model instead of theirs."""
    words = [f"model.path={base.parent / 'model'}"]
    for file in (ROOT / "examples/configs/compare").glob("*.yaml"):
        sweep = load_sweep(file, words, num_ranks=None)
        assert len(sweep.runs) == len(sweep.variants) * len(sweep.seeds)


def test_a_run_is_described_by_the_variables_of_the_slurm_scripts(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sweep(base)
    assert cli.main(["compare", str(file), "--describe", "3", "data.suffix=a 'b' $c"]) == 0
    values = dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines())
    assert values["RUN_DIR"] == str(base.parent / "out/grpo/seed-2")
    assert values["TRAIN"] == "train.jsonl" and values["OUTCOME"] == "unfinished"
    assert cli.main(["compare", str(file), "--describe", "6"]) == 2
    assert "--array=0-5" in capsys.readouterr().err


_SRUN = """\
#!/usr/bin/env bash
# What the node would do is shown for `train`, and done for everything else.
while [[ $1 == --* ]]; do shift; done
[[ $3 != train ]] && exec "$@"
printf '%s\\n' "$@" > "$SHOWN"
"""
_SCONTROL = """\
#!/usr/bin/env bash
case "$*" in
    *hostnames*) echo n1 ;;
    *node*) echo NodeAddr=127.0.0.1 ;;
    *) echo JobState=RUNNING ;;
esac
"""


def run_job(base: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Runs examples/compare.sh as it is, as job 3 of an array.

    Small commands take the place of Slurm's. What the node would train is in tmp_path / "shown".
    """
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
        "SHOWN": str(tmp_path / "shown"),
        "PROJECT": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_JOB_NODELIST": "n1",
        "SLURM_NNODES": "1",
        "SLURM_GPUS_PER_NODE": "1",
        "SLURM_CPUS_ON_NODE": "1",
        "SWEEP": str(write_sweep(base)),
        "VENV": sys.prefix,
        "OVERRIDES": """optimizer.lr=3e-5 "data.suffix=it's $HOME;" """,
    }
    return subprocess.run(
        ["bash", "examples/compare.sh"],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_job_of_the_array_trains_its_run(base: Path, tmp_path: Path) -> None:
    completed = run_job(base, tmp_path)
    assert completed.returncode == 0, completed.stdout + completed.stderr

    words = (tmp_path / "shown").read_text().splitlines()
    assert words[2:4] == ["train", str(base)]
    assert "model.weights=" in words, "no Megatron checkpoint was asked for"

    described = load_sweep(tmp_path / "sweep.yaml").runs[3]
    expected = ["optimizer.lr=3e-5", "data.suffix=it's $HOME;", *described.overrides]
    assert words[-len(expected) :] == expected


@pytest.mark.parametrize(
    ("status", "code", "sentence"),
    [
        ({"state": "finished"}, 0, "run 3 has finished"),
        ({"state": "failed", "diverged": True}, 1, "run 3 has diverged"),
    ],
    ids=["finished", "diverged"],
)
def test_a_job_of_the_array_leaves_what_is_done(
    base: Path, tmp_path: Path, status: dict[str, Any], code: int, sentence: str
) -> None:
    run_dir = base.parent / "out/grpo/seed-2"
    run_dir.mkdir(parents=True)
    (run_dir / "status.json").write_text(json.dumps(status))
    completed = run_job(base, tmp_path)
    assert completed.returncode == code, completed.stdout + completed.stderr
    assert sentence in completed.stdout
    assert not (tmp_path / "shown").exists()


# ---- results and the table


def keep(
    run: SweepRun,
    *,
    accuracy: float | None = None,
    correct: dict[str, int] | None = None,
    state: Any = "finished",
    reason: str = "",
    diverged: bool = False,
) -> None:
    """Writes the files that a finished run leaves in its directory.

    `correct` counts the right ones of two samples of each problem.
    """
    directory = run.directory
    directory.path.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(to_plain(run.config)), directory.config)
    for step in range(1, 11):
        row = {"reward_mean": step / 10, "response_tokens_mean": 5.0, "skipped_updates": 0.0}
        append_row(directory.metrics, {"step": step, **row, "seconds/rollout": 3.0})
    append_row(directory.evaluations, {"step": 5, "heldout/pass_at_1": 0.1})
    if accuracy is not None:
        last = {"step": 10, "heldout/pass_at_1": accuracy, "seconds/evaluation": 6.0}
        append_row(directory.evaluations, last)
    if correct is not None:
        answers = json.dumps({"samples": 2, "correct": correct})
        write_whole(directory.heldout_answers(10), answers)
    write_status(directory.status, state, reason, diverged=diverged)


def results_of(sweep: Sweep) -> list[RunResult]:
    return [read_result(run) for run in sweep.runs]


def test_the_figures_of_a_run_are_read_from_its_directory(base: Path) -> None:
    run = load_sweep(write_sweep(base)).runs[0]
    assert read_result(run).outcome == RunOutcome.UNFINISHED
    keep(run, accuracy=0.75)
    result = read_result(run)
    assert (result.outcome, result.steps) == (RunOutcome.FINISHED, 10)
    assert (result.accuracy, result.reward) == (0.75, 1.0)
    assert result.seconds == 36.0 and result.tokens == 10 * 5 * 32


def test_the_problems_of_a_run_are_read_from_its_last_evaluation(base: Path) -> None:
    first, grpo, *_ = load_sweep(write_sweep(base)).runs
    keep(first, accuracy=0.75, correct={"heldout/0": 2, "heldout/1": 1})
    assert read_result(first).accuracy_of == {"heldout/0": 1.0, "heldout/1": 0.5}
    keep(grpo, accuracy=0.75)
    assert read_result(grpo).accuracy_of == {}, "a run of an earlier version"
    grpo.directory.heldout_answers(10).parent.mkdir()
    grpo.directory.heldout_answers(10).write_text('{"samples": 2, "corr')
    assert read_result(grpo).accuracy_of == {}, "a file that was cut"


def test_the_table_resamples_problems_where_runs_have_them(base: Path) -> None:
    sweep = load_sweep(write_sweep(base, seeds=[1, 2]))
    for run in sweep.runs:
        correct = {"heldout/0": 0, "heldout/1": 0}
        if run.variant == "grpo":
            correct["heldout/1"] = 2
        keep(run, accuracy=sum(correct.values()) / 4, correct=correct)
    _, grpo = variant_rows(sweep, results_of(sweep))
    difference = grpo.differences["accuracy"]

    assert difference.low == 0.0
    assert difference.high == 1.0
    assert difference.resampled == "seeds and problems"
    assert grpo.differences["reward"].resampled == "seeds"


def test_a_refused_start_leaves_a_run_as_it_was(base: Path) -> None:
    run = load_sweep(write_sweep(base)).runs[0]
    keep(run, accuracy=0.75)
    before: dict[str, Any] = {"state": "finished", "reason": ""}
    write_status(run.directory.status, "failed", "refused", before=before)
    assert read_result(run).outcome == RunOutcome.FINISHED
    before = {"state": "failed", "reason": "3 updates", "diverged": True}
    write_status(run.directory.status, "failed", "refused", before=before)
    assert read_result(run).outcome == RunOutcome.DIVERGED


def test_a_diverged_run_is_counted_and_not_averaged(base: Path) -> None:
    sweep = load_sweep(write_sweep(base))
    for run in sweep.runs:
        accuracy = 0.5 + 0.1 * run.seed
        if run.variant == "grpo":
            accuracy += 0.1
        if run.name == "grpo, seed 2":
            keep(run, accuracy=None, state="failed", reason="3 updates in a row", diverged=True)
        else:
            keep(run, accuracy=accuracy)

    real, grpo = variant_rows(sweep, results_of(sweep))
    assert grpo.counts[RunOutcome.DIVERGED] == 1 and grpo.counts[RunOutcome.FINISHED] == 2
    assert grpo.means["accuracy"].value == pytest.approx(0.8)  # seeds 1 and 3: 0.7 and 0.9
    assert grpo.differences["accuracy"].count == 2
    assert grpo.differences["accuracy"].value == pytest.approx(0.1)
    assert real.means["accuracy"].value == pytest.approx(0.7) and not real.differences
    assert runs_table([real, grpo])[2] == ["grpo", "2 of 3", "1", "0", "0.6", "1,600"]

    figures = figure_table("accuracy", [real, grpo])[2]
    assert figures == ["grpo", "0.800", "0.100", "+0.100", "+0.100 to +0.100", "2"]

    write_table(sweep, results_of(sweep))
    kept = json.loads((sweep.out / "table.json").read_text())
    assert kept == as_json(sweep, results_of(sweep))

    lost = next(run for run in kept["runs"] if run["outcome"] == "diverged")
    assert (lost["variant"], lost["seed"], lost["accuracy"]) == ("grpo", 2, None)

    rows = list(csv.DictReader((sweep.out / "table.csv").open()))
    assert [row["counts.diverged"] for row in rows] == ["0", "1"]
    assert float(rows[1]["differences.accuracy.value"]) == pytest.approx(0.1)


def test_the_table_shows_the_runs_that_are_there(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_sweep(base)
    keep(load_sweep(file).runs[0], accuracy=0.5)
    assert cli.main(["compare", str(file), "--table", "--json"]) == 1
    output = json.loads(capsys.readouterr().out)
    assert [row["counts"]["finished"] for row in output["variants"]] == [1, 0]


# ---- starting runs

STUB = """\
#!{python} -S
# Stands for `python -m megatron_real train BASE WORD...`:
# leaves what a run leaves, in milliseconds.
import json, pathlib, sys

words = dict(word.split("=", 1) for word in sys.argv[5:] if "=" in word)
run = pathlib.Path(words["trainer.run_dir"])
seed = int(words["trainer.seed"])
(run / "logs").mkdir(parents=True, exist_ok=True)
with (run / "logs/starts").open("a") as starts:
    starts.write("started" + chr(10))
number = (run / "logs/starts").read_text().count("started")

def end(state, code, **more):
    (run / "status.json").write_text(json.dumps({{"state": state, "reason": "as planned", **more}}))
    sys.exit(code)

plan = {plan!r}.get(run.parent.name + " " + str(seed), "")
if plan == "diverge":
    end("failed", 1, diverged=True)
if plan == "crash once" and number == 1:
    print("out of luck")
    sys.exit(1)
if plan == "stop once" and number == 1:
    end("stopped", 75)
shift = 0.1 if words.get("objective.name") == "grpo" else 0.0
for step in range(1, 11):
    row = {{"step": step, "reward_mean": step / 10}}
    row |= {{"response_tokens_mean": 5.0, "seconds/rollout": 1.0}}
    with (run / "metrics.jsonl").open("a") as rows:
        rows.write(json.dumps(row) + chr(10))
row = {{"step": 10, "heldout/pass_at_1": seed / 10 + shift}}
(run / "evaluations.jsonl").write_text(json.dumps(row) + chr(10))
end("finished", 0)
"""


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Replaces the interpreter that starts runs by a stub, which fails as {"VARIANT SEED": what
    goes wrong} says.
    """

    python = sys.executable

    def plan(accidents: dict[str, str]) -> None:
        stub = tmp_path / "python"
        stub.write_text(STUB.format(python=python, plan=accidents))
        stub.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(stub))

    return plan


def starts(sweep: Sweep) -> dict[str, int]:
    """Returns how often each run was started."""
    counts = {}
    for run in sweep.runs:
        file = run.directory.path / "logs/starts"
        counts[run.name] = file.read_text().count("started") if file.exists() else 0
    return counts


def row_of(variant: str, shown: str) -> str:
    """Returns how often a variant finished, diverged and failed, as the printed table has it."""
    words = next(line.split() for line in shown.splitlines() if line.startswith(f"{variant} "))
    return " ".join(words[1:6])


def shown_table(file: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    cli.main(["compare", str(file), "--table", "--json"])
    return json.loads(capsys.readouterr().out)


def test_a_run_that_fails_does_not_end_the_sweep(
    base: Path,
    planned: Callable[[dict[str, str]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_sweep(base)
    planned({"grpo 1": "diverge", "real 2": "crash once"})
    assert cli.main(["compare", str(file)]) == 1

    output = capsys.readouterr()
    assert set(starts(load_sweep(file)).values()) == {1}
    assert "grpo, seed 1: diverged after 0 steps: as planned" in output.out
    assert (
        "real, seed 2: failed after 0 steps: it ended with exit code 1; out of luck" in output.out
    )
    assert row_of("real", output.out) == "2 of 3 0 1"

    assert cli.main(["compare", str(file)]) == 1, "one has diverged for good"

    again = starts(load_sweep(file))
    assert again.pop("real, seed 2") == 2 and set(again.values()) == {1}
    assert row_of("real", capsys.readouterr().out) == "3 of 3 0 0"


def test_a_sweep_that_was_stopped_ends_with_the_same_table(
    base: Path,
    planned: Callable[[dict[str, str]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    undisturbed = write_sweep(base)
    planned({})
    assert cli.main(["compare", str(undisturbed)]) == 0

    capsys.readouterr()
    expected = shown_table(undisturbed, capsys)

    stopped = write_sweep(base, out=str(base.parent / "stopped"))
    planned({"grpo 1": "stop once", "real 3": "stop once"})
    assert cli.main(["compare", str(stopped)]) == 75
    assert list(starts(load_sweep(stopped)).values()) == [1, 1, 0, 0, 0, 0]
    assert cli.main(["compare", str(stopped)]) == 75
    assert cli.main(["compare", str(stopped)]) == 0
    assert list(starts(load_sweep(stopped)).values()) == [1, 2, 1, 1, 2, 1]

    capsys.readouterr()
    assert cli.main(["compare", str(stopped)]) == 0
    again = capsys.readouterr()
    assert "variant " in again.out
    assert "variant " not in again.err, "what is done already brings no table before the end"
    assert shown_table(stopped, capsys) == expected
    assert expected["variants"][1]["differences"]["accuracy"]["value"] == pytest.approx(0.1)
