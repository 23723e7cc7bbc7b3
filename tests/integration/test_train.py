"""Whole runs by the command line, in processes of their own: the quickstart in short."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_real import cli
from tests import zygote
from tests.amount import core
from tests.integration.conftest import LEARNING, ROOT, SMALL, command, rows, train


def pairs(path: Path) -> list[tuple[int, int]]:
    """The operands of each problem."""
    operands = []
    for row in rows(path):
        first, second = row["prompt"][0]["content"].removesuffix("=").split("+")
        operands.append((int(first), int(second)))
    return operands


@pytest.fixture(scope="session")
def learned(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on two data-parallel processes, at twice the quickstart's learning rate."""
    run_dir = tmp_path_factory.mktemp("runs") / "learned"
    words = ["trainer.steps=12", "optimizer.lr=1e-4", "trainer.profile=[2]"]
    words += ["evaluation.max_problems=150", "evaluation.every=0"]
    done = train(base, run_dir, *words)
    assert done.returncode == 0, done.stderr
    return run_dir


def heldout(run_dir: Path) -> list[float]:
    return [row["heldout/pass_at_1"] for row in rows(run_dir / "evaluations.jsonl")]


def test_held_out_pairs_are_seen_by_nothing_else(whole_base: Path) -> None:
    train_pairs = {frozenset(pair) for pair in pairs(whole_base / "train.jsonl")}
    heldout_pairs = {frozenset(pair) for pair in pairs(whole_base / "heldout.jsonl")}
    assert len(rows(whole_base / "heldout.jsonl")) == 400
    assert not train_pairs & heldout_pairs


def test_the_tokenizer_reads_back_as_it_was_made(base: Path) -> None:
    """transformers has a tokenizer class of its own for every qwen2 directory."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "58+67="}], tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    ids = tokenizer(text + "\\boxed{125}<|end|>", add_special_tokens=False)["input_ids"]
    # <|user|>, 58+67=, <|assistant|>, the opening of the box, 125, its end, <|end|>
    assert len(ids) == 1 + 6 + 1 + 1 + 3 + 1 + 1
    assert tokenizer.decode(ids) == text + "\\boxed{125}<|end|>"


def test_held_out_accuracy_rises(learned: Path) -> None:
    first, *_, last = heldout(learned)
    assert first < 0.5 and last > 0.9


def test_permuted_labels_teach_nothing(base: Path, tmp_path: Path) -> None:
    """The true labels raise the accuracy by more than 0.2 (test_vllm.py, test_server.py)."""
    words = [*LEARNING, "labels.permute=true", "trainer.export=false"]
    done = train(base, tmp_path / "run", *words, processes=1)
    assert done.returncode == 0, done.stderr
    first, *_, last = heldout(tmp_path / "run")
    assert last < first + 0.1


def test_metrics_are_whole(learned: Path) -> None:
    metrics = rows(learned / "metrics.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, 13))
    for row in metrics:
        assert 0 < row["max_abs_weight_tau"] <= 1
        assert row["mismatch_max_abs"] < 1e-4, "trainer and engine have the same fp32 weights"
        names = {"loss", "entropy", "grad_norm", "lr"}
        names |= {"seconds/rollout", "tokens_per_second_per_rank"}
        assert names <= row.keys()

    trace = json.loads((learned / "profile/step-00002.json").read_text())
    assert {"rollout", "label", "update"} <= {event.get("name") for event in trace["traceEvents"]}


def test_rollouts_are_kept(learned: Path) -> None:
    saved = rows(learned / "rollouts/step-00003.parquet")
    assert len(saved) == 64 * 8
    for row in saved:
        right = row["completion"] == f"\\boxed{{{row['answers'][0]}}}"
        assert row["label"] == int(right)
        assert (row["weight"] == 0) or (row["weight"] < 0) == right


def test_exported_weights_have_learned(learned: Path, base: Path) -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    import make_tiny_model
    from transformers import AutoTokenizer, Qwen2ForCausalLM

    model = Qwen2ForCausalLM.from_pretrained(learned / "hf")
    tokenizer = AutoTokenizer.from_pretrained(learned / "hf")
    assert make_tiny_model.greedy_accuracy(model, tokenizer, pairs(base / "heldout.jsonl")) > 0.9


def test_an_export_has_a_card_and_can_be_shared(
    learned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (learned / "hf/README.md").read_text(encoding="utf-8")
    last = rows(learned / "evaluations.jsonl")[-1]
    assert f"after {last['step']} steps: {last['heldout/pass_at_1']:.4f}" in card
    assert "| megatron-core | " in card and str(learned.parent) not in card
    assert cli.main(["push", str(learned), "me/sums", "--dry-run"]) == 0
    assert "dry run: nothing was sent" in capsys.readouterr().out


def test_dynamic_sampling_replaces_groups_of_one_class(base: Path, tmp_path: Path) -> None:
    """Small decoding batches, so that there is something to verify while the
    next one is decoded.
    """
    words = ["trainer.steps=1", "data.heldout=", "trainer.export=false", "rollout.batch_size=32"]
    words += ["rollout.num_prompts=32", "batch.minibatch_prompts=16"]
    refill = "rollout.refill_rounds=3"
    runs = {"off": (1, []), "on": (2, [refill]), "again": (2, [refill])}
    for name, (processes, more) in runs.items():
        done = train(base, tmp_path / name, *words, *more, processes=processes)
        assert done.returncode == 0, done.stderr
    off, on, again = (rows(tmp_path / name / "metrics.jsonl") for name in runs)
    for without, refilled in zip(off, on, strict=True):
        assert without["refilled_share"] == 0 and without["one_class_share"] > 0.1
        # What is still of one class after three rounds is about the fourth power of its share.
        assert refilled["refilled_share"] > 0.1
        assert refilled["one_class_share"] < 0.5 * without["one_class_share"]
        assert refilled["checked_early_share"] > 0

    # The same seed, the same run.
    assert [row["loss"] for row in on] == [row["loss"] for row in again]
    kept = rows(tmp_path / "on/rollouts/step-00001.parquet")
    assert len(kept) == 32 * 8 and max(row["refills"] for row in kept) <= 3


def test_a_verifier_that_fails_too_often_stops_every_process(base: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("def judge(text, answers, metadata):\n    return {}[text]\n")
    done = train(base, tmp_path / "run", f"labels.verifier={own}:judge", *SMALL, "trainer.steps=1")
    assert done.returncode == 1
    # The other rollouts of the 64, if any, were cut and not checked.
    reason = (
        r"(\d\d) of \1 checks failed \(\1 crashed\), more than labels.max_failed_share = 0.2; "
        "most often: KeyError"
    )
    assert re.search(reason, done.stderr)
    # One sentence, without the error's class: the only traceback is torchrun's own.
    assert "TooManyFailedChecks" not in done.stderr


LAYOUTS = {
    "tp2-sp": (2, ["parallel.tp=2", "parallel.sp=true"]),
    "pp2-two-passes": (2, ["parallel.pp=2", "batch.placement=split"]),
    "one-process": (1, ["batch.max_tokens=512"]),
    "cp2": (2, ["parallel.cp=2"]),
}


@pytest.mark.parametrize("layout", core(list(LAYOUTS), ["pp2-two-passes", "one-process"]))
def test_replay_on_another_layout_gives_the_same_losses(
    learned: Path, base: Path, tmp_path: Path, layout: str
) -> None:
    processes, words = LAYOUTS[layout]
    replay = [
        f"rollout.replay={learned}",
        "trainer.steps=2",
        "optimizer.lr=1e-4",
        "data.heldout=",
        "trainer.export=false",
    ]
    done = train(base, tmp_path / "run", *replay, *words, processes=processes)
    assert done.returncode == 0, done.stderr

    # The original run has more steps.
    replayed = rows(tmp_path / "run/metrics.jsonl")
    original = rows(learned / "metrics.jsonl")[: len(replayed)]
    for row, original_row in zip(replayed, original, strict=True):
        for name in ("loss", "grad_norm", "score_positive_mean", "entropy"):
            # Another layout sums in another order, and Adam amplifies the difference.
            close = pytest.approx(original_row[name], rel=2e-3, abs=1e-5)
            assert row[name] == close, f"{name} of step {row['step']}"


def test_updates_that_are_not_finite_stop_the_run(
    learned: Path, base: Path, tmp_path: Path
) -> None:
    """A learning rate of 1e30 ruins the weights with the first update;
    all later ones are skipped.
    """
    words = [f"rollout.replay={learned}", "data.heldout=", "optimizer.lr=1e30", "trainer.steps=12"]
    done = train(base, tmp_path / "run", *words, processes=1)
    assert done.returncode == 1
    assert "3 updates in a row had a loss or gradient that was not finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list((tmp_path / "run/dumps").iterdir())) == 3


def test_a_run_directory_without_checkpoints_is_not_overwritten(
    learned: Path, base: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(learned, run_dir, ignore=shutil.ignore_patterns("checkpoints", "hf", "profile"))
    before = (run_dir / "metrics.jsonl").read_bytes()
    done = train(base, run_dir, processes=1)
    assert done.returncode == 2
    assert f"{run_dir} holds a run already" in done.stderr and "Traceback" not in done.stderr
    assert (run_dir / "metrics.jsonl").read_bytes() == before


def test_ctrl_c_ends_cleanly(base: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # A fork heeds SIGINT, also where a shell that runs the tests in the background ignores it.
    process = zygote.Popen(
        command(base, run_dir, "trainer.steps=1000", *SMALL, processes=1),
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 400
        while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()

    assert process.returncode == 130
    assert f"interrupted; metrics and rollouts so far are in {run_dir}" in errors
    assert "Traceback" not in errors
    steps = len(rows(run_dir / "metrics.jsonl"))
    assert len(list((run_dir / "rollouts").glob("step-*.parquet"))) >= steps >= 1


def test_a_truncated_weights_file_is_refused_in_one_sentence(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    with (broken / "model.safetensors").open("r+b") as weights:
        weights.truncate(1000)

    done = train(broken, tmp_path / "run", processes=1)
    assert done.returncode == 2
    assert "truncated or corrupt" in done.stderr and "Traceback" not in done.stderr
