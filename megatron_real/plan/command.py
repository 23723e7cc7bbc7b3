"""`megatron-real plan CONFIG --gpus N --gpu h100-80g`: tables, or JSON.

Exit codes: 0 the layout fits, 1 it does not, 2 the input was refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from megatron_real import config as configuration
from megatron_real.plan.devices import DEVICES, SOURCES
from megatron_real.plan.layouts import RESERVE_SHARE, Estimate, ranked
from megatron_real.plan.memory import MODELLED
from megatron_real.plan.speed import Cluster, Run
from megatron_real.weights.architecture import Architecture


def add_command(commands: Any) -> None:
    """Adds `plan` to the command line's parsers."""
    parser = commands.add_parser("plan", help="memory, time and cost before a run", description=__doc__)
    parser.add_argument("config", help="YAML file; of the model only its config.json is read")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs that train")
    parser.add_argument("--gpu", choices=sorted(DEVICES), default="h100-80g", help="kind of GPU")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts in the ranking")
    parser.add_argument("--price", type=float, metavar="USD", help="of one GPU for one hour; default: a list price")
    parser.add_argument("--mean-response", type=float, metavar="TOKENS", help="default: half of the longest response")
    parser.add_argument("--train-utilization", type=float, metavar="SHARE", help="of peak FLOP/s; default: published")
    parser.add_argument("--decode-utilization", type=float, metavar="SHARE", help="of memory bandwidth; likewise")
    parser.add_argument("--json", action="store_true", help="the same as JSON, in bytes and seconds")


def run(chosen: argparse.Namespace) -> int:
    """Runs `plan`; returns the exit code."""
    try:
        made = Estimate(_read(chosen))
    except ValueError as error:
        print(f"megatron-real: {error}", file=sys.stderr)
        return 2
    best = ranked(made.run)[: chosen.top]
    print(json.dumps(_json(made, best), indent=2) if chosen.json else "\n\n".join(_text(made, best)))
    return 0 if made.fits else 1


def _read(chosen: argparse.Namespace) -> Run:
    for name in ("gpus", "top", "price", "mean_response", "train_utilization", "decode_utilization"):
        value, limit = getattr(chosen, name), 1 if name.endswith("utilization") else float("inf")
        if value is not None and not 0 < value <= limit:
            wanted = "above 0 and at most 1" if limit == 1 else "above 0"
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {wanted}")
    config = configuration.load(chosen.config, chosen.overrides)
    if config.rollout.engine != "vllm-server":
        # Nobody plans GPUs for the embedded engine, and vLLM's layout is checked by the same rules as in a run.
        config = configuration.load(chosen.config, [*chosen.overrides, "rollout.engine=vllm"])
    dp = configuration.check_world(config, chosen.gpus)
    if dp > (sequences := config.batch.minibatch_prompts * config.rollout.group_size):
        raise ValueError(
            f"{dp} data-parallel ranks share the {sequences} rollouts of an update (batch.minibatch_prompts x "
            "rollout.group_size), so some would idle; take fewer GPUs, or raise parallel.tp, pp or cp"
        )
    device = DEVICES[chosen.gpu]
    device = dataclasses.replace(device, usd_per_hour=device.usd_per_hour if chosen.price is None else chosen.price)
    known = (chosen.train_utilization, chosen.decode_utilization, chosen.mean_response)
    return Run(Architecture.read(config.model.path), config, Cluster(device, chosen.gpus, *known))


def _json(made: Estimate, best: Iterable[Estimate]) -> dict[str, Any]:
    return {
        "gpu": made.run.cluster.device.name,
        "gpus": made.run.cluster.gpus,
        "server_gpus": made.run.server_gpus,
        "budget_bytes": made.budget,
        "step": _step(made.run),
        "layout": _layout(made),
        "memory": [{**dataclasses.asdict(stage), "peaks": stage.peaks} for stage in made.stages],
        "server_memory": made.server,
        "best": [_layout(estimate) for estimate in best],
        "not_modelled": _unmodelled(made.run),
        "sources": SOURCES,
    }


def _layout(made: Estimate) -> dict[str, Any]:
    config = made.run.config
    return {
        "name": made.name,
        "parallel": dataclasses.asdict(config.parallel),
        "dp": made.run.dp,
        "recompute": config.model.recompute,
        "rollout_tp": config.rollout.tp,
        "fits": made.fits,
        "peak_bytes": made.peak,
        "seconds": {**dataclasses.asdict(made.seconds), "step": made.seconds.total},
        "hours": made.hours,
        "gpu_hours": made.gpu_hours,
        "usd": made.usd,
    }


def _step(run: Run) -> dict[str, float]:
    """The numbers of a step that follow from the configuration, for the reader to check."""
    return {
        "rollouts": run.rollouts,
        "updates": run.updates,
        "rollouts an update": run.rollouts // run.updates,
        "tokens a rollout": run.mean_tokens,
        "micro-batches an update and rank": run.micro_batches,
        "padded vocabulary": run.architecture.padded_vocab(run.config.parallel.tp),
    }


def _unmodelled(run: Run) -> list[str]:
    return sorted(f"megatron.{name}" for name in set(run.config.megatron) - MODELLED)


def _text(made: Estimate, best: Sequence[Estimate]) -> list[str]:
    """The plan's paragraphs."""
    run, device, seconds = made.run, made.run.cluster.device, made.seconds
    stages = dataclasses.asdict(seconds)
    if ahead := stages.pop("ahead"):
        stages["rollout while the policy trains"] = -ahead
    stages["step"] = seconds.total
    serving = f" and {run.server_gpus} that serve" if run.server_gpus else ""
    unmodelled = [f"{name} is not in this model of memory and time" for name in _unmodelled(run)]
    return [
        f"{run.config.model.path}, {run.architecture.num_parameters / 1e9:.2f}B parameters, on {run.cluster.gpus} x "
        f"{device.name}{serving}: {made.name}, recompute {run.config.model.recompute}\n"
        + ", ".join(f"{name} {value:,.0f}" for name, value in _step(run).items()),
        _table(_memory(made)),
        f"{'fits' if made.fits else 'DOES NOT FIT'}: {_gib(made.peak)} GiB at the peak, {_gib(made.budget)} of "
        f"{device.memory_gib} GiB may be used ({RESERVE_SHARE:.0%} stay for CUDA, NCCL and fragmentation)"
        + _server(made),
        _table([["seconds of", "", ""], *([n, f"{s:.1f}", f"{s / seconds.total:.0%}"] for n, s in stages.items())]),
        f"{run.config.trainer.steps} steps: {made.hours:,.1f} hours, {made.gpu_hours:,.0f} GPU-hours, "
        f"${made.usd:,.0f} at ${device.usd_per_hour:g} per GPU and hour; evaluations, checkpoints and start-up are not "
        "counted",
        _table([_RANKING, *map(_ranked, best)])
        if best
        else "No layout fits: take more or larger GPUs, or lower batch.max_tokens or rollout.kv_cache_mib.",
        "\n".join([*unmodelled, "Rates, none of them measured here:", *(f"  {source}" for source in SOURCES)]),
    ]


def _server(made: Estimate) -> str:
    parts = ", ".join(f"{part} {_gib(size)}" for part, size in made.server.items())
    return f"\na GPU that serves: {_gib(sum(made.server.values()))} GiB ({parts})" if parts else ""


_RANKING = ["fastest layouts that fit", "recompute", "rollout.tp", "step s", "rollout s", "peak GiB"]


def _ranked(made: Estimate) -> list[str]:
    config, seconds = made.run.config, made.seconds
    times = (f"{seconds.total:.1f}", f"{seconds.rollout:.1f}")
    return [made.name, config.model.recompute, str(config.rollout.tp), *times, _gib(made.peak)]


def _memory(made: Estimate) -> list[list[str]]:
    stages = made.stages
    sizes = {
        "weights": [s.resident.weights for s in stages],
        "gradients": [s.resident.gradients for s in stages],
        "optimizer": [s.resident.optimizer for s in stages],
        "update: saved activations": [s.update.saved for s in stages],
        "update: log-prob head": [s.update.head for s in stages],
        "update: layer at work": [s.update.layer for s in stages],
        "old log-probs": [s.old_logprobs.total for s in stages],
        **{f"engine: {part}": [s.engine[part] for s in stages] for part in stages[0].engine},
        "sync: tensor, bucket": [s.sync for s in stages],
        **{f"peak of {part}": [s.peaks[part] for s in stages] for part in stages[0].peaks},
    }
    return [
        ["GiB on a rank of stage", *(str(s.stage) for s in stages)],
        ["layers", *(str(s.layers) for s in stages)],
        ["parameters (billions)", *(f"{s.resident.parameters / 1e9:.3f}" for s in stages)],
        *([name, *map(_gib, row)] for name, row in sizes.items()),
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the first flush left."""
    first, *others = zip(*rows, strict=True)
    width = max(map(len, first))
    columns = [[cell.ljust(width) for cell in first]]
    columns += [[cell.rjust(max(map(len, column))) for cell in column] for column in others]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
