"""What tests/integration/test_server.py runs on each rank: vLLM servers beside a real policy.

torchrun --nproc-per-node 2 -m tests.integration.vllm_server_job MODEL ROLLOUT_TP NUM_SERVERS
OUT.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
import torch.distributed as dist

from megatron_real.config import Given, TrainerConfig
from megatron_real.labels import Labeller
from megatron_real.parallel.groups import join_world
from megatron_real.records import Sampling
from megatron_real.rollout.engines.engine import EngineFailed, completed
from megatron_real.rollout.stage import RolloutStage
from megatron_real.rollout.vllm_server.server import Server, wait_until_healthy
from tests.distributed import sync_jobs
from tests.distributed.sync_jobs import Pair, prompts
from tests.integration.vllm_job import NAMES, NEW_SERVER, SECRET, parity
from tests.zygote import REAL_SERVERS

SAMPLING = Sampling(3, sync_jobs.TEMPERATURE, 16)


def damages(pair: Pair) -> dict[str, str]:
    """The error of a sync where one element is damaged on all ranks' way or on the last rank's
    alone, or where a whole tensor is lost.
    """
    errors = {}
    name = NAMES["rows"]
    load = pair.engine.prepare_for_inference
    last = dist.get_world_size() - 1
    for case, damage, rank in (
        ("element", sync_jobs.one_element(name), None),
        ("last", sync_jobs.one_element(name), last),
        ("dropped", lambda stream: sync_jobs.without(stream, name), None),
    ):
        pair.move()
        pair.engine.prepare_for_inference = sync_jobs.damaged_on_the_way(pair, damage, rank=rank)
        errors[case] = pair.synced()
        pair.engine.prepare_for_inference = load
    errors["missing"] = pair.synced(sync_jobs.without(pair.policy.stream(), name))
    errors["good"] = pair.synced()
    return errors


def key(pair: Pair) -> dict[str, int]:
    """Returns each path's HTTP status for a request without a key, and for one with another key."""
    statuses = {}
    host, port = pair.engine.server.address
    for path in ("/health", "/v1/completions", "/collective_rpc", "/reset_prefix_cache", "/pause"):
        method = "POST"
        if path == "/health":
            method = "GET"
        for case, headers in (("none", {}), ("other", {"Authorization": "Bearer other"})):
            connection = http.client.HTTPConnection(host, port, timeout=120)
            connection.request(method, path, "{}", headers)
            statuses[f"{path} {case}"] = connection.getresponse().status
            connection.close()
    return statuses


def early(pair: Pair) -> str:
    """Returns the error of a request to a server that has no weights yet."""
    try:
        completed(pair.engine, prompts(1), SAMPLING, seeds=[1])
    except EngineFailed as error:
        return str(error)
    return ""


def refused(pair: Pair) -> str:
    """Returns the error of waiting with another key, which comes without a long wait."""
    try:
        wait_until_healthy(Server(pair.engine.server.url, "other"), 60.0, lambda _: None)
    except EngineFailed as error:
        return str(error)
    return ""


def leaks(pair: Pair) -> list[str]:
    """Files of the run, and command lines, that have the key or the other secret in them.

    A server that is a fork shows the zygote's command line; its own is what it was started with.
    """
    leaking = []
    started = pair.engine.started
    assert started is not None, "each rank has a server of its own"
    words = " ".join(started._process.args)
    assert "--middleware" in words, "these are vLLM's arguments"
    if pair.engine._key in words or SECRET in words:
        leaking.append(words)

    files = [
        *Path(pair.engine._config.trainer.run_dir).rglob("*.*"),
        *Path("/proc").glob("[0-9]*/cmdline"),
    ]
    for file in files:
        with contextlib.suppress(OSError):  # a process has ended meanwhile
            if not file.is_file():
                continue
            content = file.read_bytes()
            if pair.engine._key.encode() in content or SECRET.encode() in content:
                leaking.append(str(file))
    return leaking


def one_fails(pair: Pair) -> str:
    """Returns the error where the last rank's server does not answer for its checksums."""
    server = pair.engine.server
    call = server.call

    def failing(method: str, *args: Any, **kwargs: Any) -> list[Any]:
        if method == "checksums" and dist.get_rank() == dist.get_world_size() - 1:
            raise EngineFailed("it fell over")
        return call(method, *args, **kwargs)

    with mock.patch.object(server, "call", failing):
        try:
            return pair.synced()
        except EngineFailed as error:
            return str(error)


def patience(pair: Pair) -> str:
    """The error of a request whose time is over: long answers, and a hundredth of the time that
    they take.
    """
    engine = pair.engine
    rollout = dataclasses.replace(engine._config.rollout, request_timeout_seconds=1e-3)
    impatient = dataclasses.replace(engine._config, rollout=rollout)
    with mock.patch.object(engine, "_config", impatient):
        try:
            completed(engine, prompts(4), Sampling(3, sync_jobs.TEMPERATURE, 200), seeds=range(4))
        except EngineFailed as error:
            return str(error)
    return ""


def slowed(pair: Pair) -> dict[str, Any]:
    """The last rank's server gives no answer before the other has given all of its own; and the
    same draw where each server keeps to its share.
    """
    engine, complete = pair.engine, pair.engine._complete
    asked = prompts(12)
    others_ended = Path(engine._config.trainer.run_dir) / "others_ended"
    slow = dist.get_rank() == dist.get_world_size() - 1
    results: dict[str, Any] = {}
    answers = []
    with Labeller("exact", workers=1, timeout_seconds=60, memory_mib=512) as labeller:
        for take_over in (False, True):
            stage = RolloutStage(
                engine,
                labeller,
                rank=dist.get_rank(),
                world=dist.get_world_size(),
                take_over=take_over,
            )
            if take_over and slow:
                engine._complete = partial(once_there, others_ended, complete)
            share = stage.generate(asked, SAMPLING, seed=3)
            engine._complete = complete
            if take_over and not slow:
                others_ended.touch()
            rollouts = stage.label(asked, share)
            results[f"held {take_over}"] = sum(r.holder == stage.rank for r in rollouts)
            results[f"taken over {take_over}"] = stage.take_work()["taken_over"]
            everything = [range(len(rollouts))] * stage.world
            answers.append(stage.exchange.bring(rollouts, everything, text=True))
    pairs = list(zip(*answers, strict=True))
    return results | {
        "same tokens": all(
            numpy.array_equal(a.completion.token_ids, b.completion.token_ids) for a, b in pairs
        ),
        "largest": max(
            float(abs(a.completion.logprobs - b.completion.logprobs).max()) for a, b in pairs
        ),
    }


def once_there(file: Path, complete: Callable[..., Any], *args: Any) -> Any:
    """What `complete` returns, called once the file is there."""
    while not file.exists():
        time.sleep(0.01)
    return complete(*args)


def killed(pair: Pair) -> dict[str, Any]:
    """The last rank's server is killed while it answers; returns what becomes of its answers,
    and the next sync's error.
    """
    engine = pair.engine
    generate = engine.generate
    pid = pid_of_server(pair)

    def dying(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, completion in enumerate(generate(*args, **kwargs)):
            if number == 0 and dist.get_rank() == dist.get_world_size() - 1:
                os.killpg(pid, signal.SIGKILL)
            yield completion

    asked = prompts(12)
    engine.generate = dying
    with Labeller(
        "exact", workers=1, timeout_seconds=60, memory_mib=512, max_failed_share=1.0
    ) as labeller:
        stage = RolloutStage(engine, labeller, rank=dist.get_rank(), world=dist.get_world_size())
        share = stage.generate(asked, SAMPLING, seed=3)
        engine.generate = generate
        rollouts = stage.label(asked, share)
        rollouts = stage.exchange.bring(rollouts, [range(len(rollouts))] * stage.world, text=True)

    verdicts = [drawn.verdict.result() for drawn in share.drawn]
    results = {
        "lost": [verdict.reason for verdict in verdicts if verdict.status == "lost"],
        "statuses": sorted({r.verdict.status for r in rollouts}),
        "rollouts": len(rollouts),
        "largest": pair.largest([r for r in rollouts if r.completion.num_trained]),
    }
    pair.move()
    return results | {
        "again": pair.synced(),
        "afterwards": pair.largest(pair.rollouts(prompts(2))),
        "pids": [pid, pid_of_server(pair)],
    }


def pid_of_server(pair: Pair) -> int:
    """Returns the process of this rank's server; 0 where another rank has started it."""
    started = pair.engine.started
    if started is None:
        return 0
    return int(started.pid)


def main() -> None:
    path = Path(sys.argv[1])
    tp = int(sys.argv[2])
    num_servers = int(sys.argv[3])
    out = Path(sys.argv[4])
    join_world(timeout_minutes=20)

    rollout = {"engine": "vllm-server", "tp": tp, "num_servers": num_servers, "max_sequences": 4}
    config = sync_jobs.config_of(path, rollout=rollout, sync={"timeout_seconds": 200.0})
    config = dataclasses.replace(
        config,
        trainer=TrainerConfig(run_dir=str(out.parent)),
        rollout=dataclasses.replace(config.rollout, vllm={"hf_token": SECRET}),
        given={"rollout.vllm.hf_token": Given(text="${oc.env:TOKEN}", value=SECRET)},
    )
    if dist.get_rank() == 0 and NEW_SERVER in os.environ:
        os.environ[REAL_SERVERS] = "1"
    pair = Pair(config)

    # Before the first sync the servers have no weights.
    results: dict[str, Any] = {
        "early": early(pair),
        "first": pair.synced(),
        "held": sorted(pair.engine.held()),
    }
    jobs: tuple[Callable[[Pair], Any], ...] = (parity, damages)
    if num_servers > 1:
        jobs = (key, refused, leaks, parity, damages, one_fails, patience, slowed, killed)
    results |= {job.__name__: job(pair) for job in jobs}
    out.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
