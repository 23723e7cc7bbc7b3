"""Rollouts by vLLM servers that the run starts: two ranks with a server each,
and with one that they share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import zygote
from tests.distributed import sync_jobs
from tests.integration.conftest import LEARNING, ROOT, command, launcher, rows, train
from tests.integration.test_train import heldout
from tests.integration.test_vllm import _missing
from tests.integration.vllm_job import NAMES, NEW_SERVER, SECRET

pytestmark = [
    pytest.mark.skipif(bool(_missing()), reason=_missing()),
    pytest.mark.xdist_group("vllm"),
]

# (TP of a server, servers, whether the first one is a new process instead of a fork)
CASES = [
    pytest.param((1, 2, False), id="a server for each rank"),
    pytest.param((1, 2, True), id="a new server", marks=pytest.mark.grid),
    pytest.param((2, 1, False), id="tp2", marks=pytest.mark.grid),
]


@dataclass(frozen=True)
class Results:
    """What tests/integration/vllm_server_job.py measured in one case."""

    tp: int
    num_servers: int
    ranks: list[dict[str, Any]]


@pytest.fixture(scope="session", params=CASES)
def results(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    """The results of both ranks."""
    tp, num_servers, is_new = request.param
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "max_position_embeddings": 512,
    }
    path = sync_jobs.complete(tiny_model("qwen2", dtype="float32", **sizes))
    out = tmp_path_factory.mktemp("server") / "results.json"
    job = [sys.executable, "-W", "ignore", *launcher(2)]
    job += ["-m", "tests.integration.vllm_server_job"]
    job += [str(path), str(tp), str(num_servers), str(out)]
    environment = dict(os.environ)
    if is_new:
        environment[NEW_SERVER] = "1"
    done = zygote.run(job, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(2)]
    return Results(tp, num_servers, ranks)


def test_log_probs_agree_after_every_sync(results: Results) -> None:
    for rank in results.ranks:
        parity = rank["parity"]
        assert rank["first"] == "" and parity["errors"] == [""] * 4
        assert max(parity["synced"]) <= 1e-4
        assert min(parity["stale"]) > 0.05, "the weights moved, and without a sync it shows"


def test_damage_is_named(results: Results) -> None:
    name = NAMES["rows"]
    # With tensor parallelism the last element is in the last worker's part alone.
    on_workers = "on worker 1"
    if results.tp == 1:
        on_workers = "on workers 0, 1"

    for rank in results.ranks:
        damages = rank["damages"]
        assert damages["good"] == ""
        assert f"{name} {on_workers}" in damages["element"]
        assert f"{name} on workers 0, 1" in damages["dropped"]
        assert f"the engine got nothing for {name}" in damages["missing"]
        if results.tp == 1:
            sentence = "1 tensors in the engine are not what the trainer sent"
            assert f"{sentence}: {name} on worker 1" in damages["last"]


def two_servers(results: Results) -> list[dict[str, Any]]:
    """The ranks' results, for what only the case of two servers measures."""
    if results.num_servers != 2:
        pytest.skip("once is enough")
    return results.ranks


def test_nothing_answers_without_the_key(results: Results) -> None:
    for rank in two_servers(results):
        assert len(rank["key"]) == 10 and set(rank["key"].values()) == {401}
        assert rank["leaks"] == []
        assert "does not take the key in VLLM_API_KEY" in rank["refused"]


def test_nothing_is_answered_without_weights(results: Results) -> None:
    """A server begins with random weights; so does one that has been started again."""
    for rank in results.ranks:
        assert "503: no trainer has sent it weights" in rank["early"]


def test_a_servers_failure_is_raised_on_every_rank(results: Results) -> None:
    """Otherwise the other ranks would wait for the one that has left."""
    assert [rank["one_fails"] for rank in two_servers(results)] == ["it fell over"] * 2


def test_a_request_has_its_time(results: Results) -> None:
    for rank in two_servers(results):
        assert "no answer in 0.001 s" in rank["patience"]


def test_what_waits_for_a_slow_server_is_answered_by_the_other(results: Results) -> None:
    """Each server decodes 4 of its 18 answers at a time, so it begins with 2 prompts of 3."""
    quick, slow = (rank["slowed"] for rank in two_servers(results))
    for server in (quick, slow):
        assert server["held False"] == 18 and server["taken over False"] == 0
        assert server["same tokens"] and server["largest"] <= 1e-5
    assert (quick["held True"], slow["held True"]) == (36 - 6, 6)
    assert (quick["taken over True"], slow["taken over True"]) == (18 - 6, 0)


def test_a_killed_server_is_survived(results: Results) -> None:
    alive, killed = (rank["killed"] for rank in two_servers(results))
    assert not alive["lost"] and len(killed["lost"]) >= 6 and "failed" in killed["lost"][0]
    for outcome in (alive, killed):
        assert outcome["rollouts"] == 12 * 3 and "lost" not in outcome["statuses"]
        assert outcome["largest"] <= 1e-4, "those drawn again are the same policy's"
        assert outcome["again"] == "" and outcome["afterwards"] <= 1e-4
    assert alive["pids"][0] == alive["pids"][1] and killed["pids"][0] != killed["pids"][1]


def ends(group: int) -> bool:
    """Whether a process group is gone soon: a guard leaves its server some
    seconds to end by itself.
    """
    for _ in range(1200):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_servers_end_with_the_run(results: Results) -> None:
    for rank in two_servers(results):
        for pid in rank["killed"]["pids"]:
            assert ends(pid)


def test_servers_end_with_a_run_that_is_killed() -> None:
    """The guard alone: its input closes when the process that holds the other end is killed."""
    guard = ROOT / "megatron_real/rollout/vllm_server/guard.py"
    sleeper = (
        "import subprocess, time; subprocess.Popen(['sleep', '600']); print('up', flush=True); "
        "time.sleep(600)"
    )
    starter = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen("
        f"[sys.executable, {str(guard)!r}, sys.executable, '-c', {sleeper!r}], "
        "stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with zygote.Popen([sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        # The two lines come in any order.
        lines = {run.stdout.readline() for _ in range(2)} - {"up\n"}
        group = int(lines.pop())
        os.killpg(group, 0)
        run.kill()
    assert ends(group)


def run(
    base: Path, run_dir: Path, *words: str, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    server = [
        "rollout.engine=vllm-server",
        "rollout.kv_cache_mib=64",
        "rollout.sync.probe_bound=1e-3",
    ]
    return train(base, run_dir, *server, *words, processes=processes)


def test_held_out_accuracy_rises(base: Path, tmp_path: Path) -> None:
    """Two ranks, one server."""
    done = run(base, tmp_path / "run", *LEARNING, "rollout.sync.checksum_every=1")
    assert done.returncode == 0, done.stderr
    first, *_, last = heldout(tmp_path / "run")
    assert first < 0.5 and last > first + 0.2
    for row in rows(tmp_path / "run/metrics.jsonl"):
        assert row["mismatch_max_abs"] < 1e-4 and row["mismatch_share"] == 0


def test_a_new_server_reads_its_arguments_and_reports_the_wrong_one_in_one_sentence(
    base: Path, tmp_path: Path
) -> None:
    """A server as a user's run starts it, a new process: it imports vLLM, and knows every argument
    but one. The secret one comes by its environment.
    """
    words = [
        "rollout.engine=vllm-server",
        "rollout.vllm.enforce_eagre=true",
        "rollout.vllm.hf_token=${oc.env:HF_SECRET}",
    ]
    done = zygote.run(
        command(base, tmp_path / "run", *words, processes=1),
        cwd=ROOT,
        env={**os.environ, zygote.REAL_SERVERS: "1", "HF_SECRET": SECRET},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 2
    assert "error: unrecognized arguments: --enforce-eagre'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    log = (tmp_path / "run/servers/server-0.log").read_text()
    assert SECRET not in log + done.stdout + done.stderr


def test_rollouts_of_the_next_step_are_generated_ahead(base: Path, tmp_path: Path) -> None:
    """pi_old is of the weights that generated: it would differ from the engine's log-probs by far
    more otherwise.

    The run stops after two steps and goes on; its third step has nothing ahead.
    """
    words = ["rollout.max_lag=1", "optimizer.lr=1e-3", "checkpoint.every=2", "evaluation.every=1"]
    words += ["rollout.num_prompts=16", "batch.minibatch_prompts=8", "evaluation.max_problems=16"]
    for steps in (2, 4):
        done = run(base, tmp_path / "run", *words, f"trainer.steps={steps}", processes=1)
        assert done.returncode == 0, done.stderr
    assert "this life's first ones are of the present weights" in done.stdout

    metrics = rows(tmp_path / "run/metrics.jsonl")
    assert [row["lag"] for row in metrics] == [0, 1, 0, 1]
    for row in metrics:
        assert row["mismatch_max_abs"] < 1e-4
