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

import numpy
import torch.distributed as dist

from megatron_real.config import Config, Given, TrainerConfig
from megatron_real.labels import Labeller
from megatron_real.parallel.groups import join_world
from megatron_real.records import Sampling
from megatron_real.rollout.engines.engine import EngineFailed, completed
from megatron_real.rollout.stage import RolloutStage
from megatron_real.rollout.vllm_server.server import Server, wait_until_healthy
from tests.distributed import sync_jobs
from tests.distributed.sync_jobs import Pair, prompts
from tests.integration.vllm_job import NAMES, parity
from tests.zygote import REAL_SERVERS

SECRET = "canary-of-the-server-test"  # an argument of the server that was given as ${oc.env:...}
SAMPLING = Sampling(3, sync_jobs.TEMPERATURE, 16)


def damages(pair: Pair) -> dict[str, str]:
    """One element lost on all ranks' way, on the last rank's alone, or a whole tensor lost."""
    found, load, name = {}, pair.engine.prepare_for_inference, NAMES["rows"]
    last = dist.get_world_size() - 1
    for case, damage, rank in (
        ("element", sync_jobs.one_element(name), None),
        ("last", sync_jobs.one_element(name), last),
        ("dropped", lambda stream: sync_jobs.without(stream, name), None),
    ):
        pair.move()
        pair.engine.prepare_for_inference = sync_jobs.damaged_on_the_way(pair, damage, rank=rank)
        found[case] = pair.synced()
        pair.engine.prepare_for_inference = load
    found["missing"] = pair.synced(sync_jobs.without(pair.policy.stream(), name))
    found["good"] = pair.synced()
    return found


def key(pair: Pair) -> dict[str, int]:
    """What each path answers to someone without the key, and with another."""
    found = {}
    for path in ("/health", "/v1/completions", "/collective_rpc", "/reset_prefix_cache", "/pause"):
        for case, headers in (("none", {}), ("other", {"Authorization": "Bearer other"})):
            connection = http.client.HTTPConnection(*pair.engine.server.address, timeout=120)
            connection.request("GET" if path == "/health" else "POST", path, "{}", headers)
            found[f"{path} {case}"] = connection.getresponse().status
            connection.close()
    return found


def early(pair: Pair) -> str:
    """What a server answers with that has no weights yet."""
    try:
        completed(pair.engine, prompts(1), SAMPLING, seeds=[1])
    except EngineFailed as error:
        return str(error)
    return ""


def refused(pair: Pair) -> str:
    """What someone is told who has another key, without a long wait."""
    try:
        wait_until_healthy(Server(pair.engine.server.url, "other"), 60.0, lambda _: None)
    except EngineFailed as error:
        return str(error)
    return ""


def leaks(pair: Pair) -> list[str]:
    """Files of the run, and command lines of this machine, that have the key or
    the other secret in them.
    """
    files = [
        *Path(pair.engine._config.trainer.run_dir).rglob("*.*"),
        *Path("/proc").glob("[0-9]*/cmdline"),
    ]
    found = []
    for file in files:
        with contextlib.suppress(OSError):  # a process has ended meanwhile
            content = file.read_bytes() if file.is_file() else b""
            if pair.engine._key.encode() in content or SECRET.encode() in content:
                found.append(str(file))
    return found


def one_fails(pair: Pair) -> str:
    """What every rank is told when the last rank's server does not answer for its checksums."""
    server, call = pair.engine.server, pair.engine.server.call

    def failing(method: str, *args: Any, **kwargs: Any) -> list[Any]:
        if method == "checksums" and dist.get_rank() == dist.get_world_size() - 1:
            raise EngineFailed("it fell over")
        return call(method, *args, **kwargs)

    server.call = failing
    try:
        return pair.synced()
    except EngineFailed as error:
        return str(error)
    finally:
        server.call = call


def patience(pair: Pair) -> str:
    """What a request is answered with whose time is over: long answers,
    and a hundredth of what they take.
    """
    engine, config = pair.engine, pair.engine._config
    rollout = dataclasses.replace(config.rollout, request_timeout_seconds=1e-3)
    engine._config = dataclasses.replace(config, rollout=rollout)
    try:
        completed(engine, prompts(4), Sampling(3, sync_jobs.TEMPERATURE, 200), seeds=range(4))
    except EngineFailed as error:
        return str(error)
    finally:
        engine._config = config
    return ""


def slowed(pair: Pair) -> dict[str, Any]:
    """The last rank's server gives no answer before the other has given all of its own; and the
    same draw where each server keeps to its share.
    """
    engine, complete = pair.engine, pair.engine._complete
    asked = prompts(12)
    others_ended = Path(engine._config.trainer.run_dir) / "others_ended"
    slow = dist.get_rank() == dist.get_world_size() - 1
    found: dict[str, Any] = {}
    answers = []
    with Labeller("exact", workers=1, timeout_seconds=10, memory_mib=512) as labeller:
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
            found[f"held {take_over}"] = sum(r.holder == stage.rank for r in rollouts)
            found[f"taken over {take_over}"] = stage.take_work()["taken_over"]
            everything = [range(len(rollouts))] * stage.world
            answers.append(stage.exchange.bring(rollouts, everything, text=True))
    pairs = list(zip(*answers, strict=True))
    return found | {
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
    """A server that is killed while it answers, in the last rank's hands: its answers,
    and the next sync.
    """
    engine, generate = pair.engine, pair.engine.generate
    pid = engine.started.pid if engine.started else 0

    def dying(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, found in enumerate(generate(*args, **kwargs)):
            if number == 0 and dist.get_rank() == dist.get_world_size() - 1:
                os.killpg(pid, signal.SIGKILL)
            yield found

    asked, engine.generate = prompts(12), dying
    with Labeller(
        "exact", workers=1, timeout_seconds=10, memory_mib=512, max_failed_share=1.0
    ) as labeller:
        stage = RolloutStage(engine, labeller, rank=dist.get_rank(), world=dist.get_world_size())
        share = stage.generate(asked, SAMPLING, seed=3)
        engine.generate = generate
        rollouts = stage.label(asked, share)
        rollouts = stage.exchange.bring(rollouts, [range(len(rollouts))] * stage.world, text=True)
    found = {
        "lost": [
            d.verdict.result().reason for d in share.drawn if d.verdict.result().status == "lost"
        ],
        "statuses": sorted({r.verdict.status for r in rollouts}),
        "rollouts": len(rollouts),
        "largest": pair.largest([r for r in rollouts if r.completion.num_trained]),
    }
    pair.move()
    return found | {
        "again": pair.synced(),
        "afterwards": pair.largest(pair.rollouts(prompts(2))),
        "pids": [pid, engine.started.pid if engine.started else 0],
    }


def main() -> None:
    path, tp, servers, out = (
        Path(sys.argv[1]),
        int(sys.argv[2]),
        int(sys.argv[3]),
        Path(sys.argv[4]),
    )
    join_world(timeout_minutes=20)
    chosen = {"engine": "vllm-server", "tp": tp, "num_servers": servers, "max_sequences": 4}
    config: Config = sync_jobs.config_of(path, rollout=chosen, sync={"timeout_seconds": 200.0})
    config = dataclasses.replace(
        config,
        trainer=TrainerConfig(run_dir=str(out.parent)),
        rollout=dataclasses.replace(config.rollout, vllm={"hf_token": SECRET}),
        given={"rollout.vllm.hf_token": Given(text="${oc.env:TOKEN}", value=SECRET)},
    )
    if dist.get_rank() == 0:  # its server is a new process, whose command line `leaks` can look at
        os.environ[REAL_SERVERS] = "1"
    pair = Pair(config)
    found: dict[str, Any] = {
        "early": early(pair),
        "first": pair.synced(),
        "held": sorted(pair.engine.held()),
    }
    jobs = (
        (key, refused, leaks, parity, damages, one_fails, patience, slowed, killed)
        if servers > 1
        else (parity, damages)
    )
    found |= {job.__name__: job(pair) for job in jobs}
    out.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    main()
