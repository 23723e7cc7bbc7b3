"""What tests/integration/test_vllm.py runs on each rank: real vLLM beside a real policy.

torchrun --nproc-per-node 2 -m tests.integration.vllm_job MODEL ROLLOUT_TP OUT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_real.parallel.groups import join_world
from megatron_real.records import Sampling
from tests.distributed import sync_jobs
from tests.distributed.sync_jobs import Pair, prompts

NEW_SERVER = "MEGATRON_REAL_TESTS_NEW_SERVER"
"""Environment variable that has the first server of vllm_server_job.py be a new process
instead of a fork.
"""
SECRET = "canary-of-the-server-test"
"""An argument of that job's servers, which was given as ${oc.env:...}."""
NAMES = {
    "rows": "model.layers.1.self_attn.k_proj.weight",
    "columns": "model.layers.0.mlp.down_proj.weight",
    "joined": "model.layers.1.mlp.up_proj.weight",
    "bias": "model.layers.0.self_attn.v_proj.bias",
}


def parity(pair: Pair) -> dict[str, Any]:
    """Returns the largest difference to the engine's log-probs after each of three syncs.

    The weights move between the syncs. `stale` is the control: the difference after a move without
    a sync. Some prompts are longer than a block of the prefix cache.
    """
    synced = []
    stale = []
    errors = []
    asked = [*prompts(2), *prompts(2, tokens=200)]
    for _ in range(3):
        pair.move()
        errors.append(pair.synced())
        synced.append(pair.largest(pair.rollouts(asked)))
        pair.move()
        stale.append(pair.largest(pair.rollouts(asked)))
    errors.append(pair.synced())
    return {"synced": synced, "stale": stale, "errors": errors}


def forgotten(pair: Pair) -> dict[str, float]:
    """The largest difference where a sync forgets to drop the prefix cache, or to pack the weights
    again; `none` is after a sync that forgets nothing.
    """
    from megatron_real.rollout.engines import vllm as vllm_engine

    asked = prompts(2, tokens=200)
    differences = {}

    pair.rollouts(asked)
    pair.move()
    with mock.patch.object(pair.engine.llm, "reset_prefix_cache", lambda: True):
        pair.sync.run(pair.policy.stream())
        differences["prefix-cache"] = pair.largest(pair.rollouts(asked))

    pair.move()
    with mock.patch.object(vllm_engine, "pack", lambda _: None):
        pair.sync.run(pair.policy.stream())
        differences["packed"] = pair.largest(pair.rollouts(asked))

    pair.sync.run(pair.policy.stream())
    differences["none"] = pair.largest(pair.rollouts(asked))
    return differences


def damages(pair: Pair) -> dict[str, str]:
    """The error of a sync where one element, one rank's part, or a whole tensor is damaged or lost
    between the trainer and the engine's memory.
    """
    errors = {}
    load = pair.engine.prepare_for_inference
    for where, name in NAMES.items():
        for case, damage, rank in (
            ("element", sync_jobs.one_element(name), None),
            ("shard", sync_jobs.one_element(name), 1),
            ("dropped", lambda stream, name=name: sync_jobs.without(stream, name), None),
        ):
            pair.move()
            pair.engine.prepare_for_inference = sync_jobs.damaged_on_the_way(
                pair, damage, rank=rank
            )
            errors[f"{where}-{case}"] = pair.synced()
            pair.engine.prepare_for_inference = load
        errors[f"{where}-missing"] = pair.synced(sync_jobs.without(pair.policy.stream(), name))
    errors["good"] = pair.synced()
    return errors


def spread(pair: Pair) -> dict[str, Any]:
    """Compares the answers of all engines of a stage with those that one engine gives to all
    prompts.
    """
    from megatron_real.labels import Labeller
    from megatron_real.rollout.engines.engine import completed
    from megatron_real.rollout.spread import prompt_seed
    from megatron_real.rollout.stage import RolloutStage

    asked = prompts(7)
    sampling = Sampling(3, sync_jobs.TEMPERATURE, 16, top_p=0.95)
    with Labeller("exact", workers=1, timeout_seconds=60, memory_mib=512) as labeller:
        stage = RolloutStage(
            pair.engine, labeller, rank=dist.get_rank(), world=dist.get_world_size()
        )
        share = stage.generate(asked, sampling, seed=3)
        rollouts = stage.label(asked, share)
        everything = range(len(rollouts))
        rollouts = stage.exchange.bring(rollouts, [everything] * stage.world, text=True)

    seeds = [prompt_seed(3, 0, (i, 0), prompt) for i, prompt in enumerate(asked)]
    alone = completed(pair.engine, asked, sampling, seeds=seeds)
    different = []
    for completions in alone:
        texts = {c.token_ids.tobytes() for c in completions if c is not None}
        different.append(len(texts) > 1)
    return {
        "places": [drawn.place for drawn in share.drawn],
        "equal": all(r.completion == alone[r.group][r.sample] for r in rollouts),
        "different_samples": all(different),
        "answers": [r.completion.token_ids.tolist() for r in rollouts],
    }


def main() -> None:
    path = Path(sys.argv[1])
    tp = int(sys.argv[2])
    out = Path(sys.argv[3])
    join_world(timeout_minutes=20)
    pair = Pair(sync_jobs.config_of(path, rollout={"engine": "vllm", "tp": tp}))

    results: dict[str, Any] = {"first": pair.synced(), "held": sorted(pair.engine.held())}
    results |= {job.__name__: job(pair) for job in (spread, parity, forgotten, damages)}
    out.with_suffix(f".{dist.get_rank()}").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
