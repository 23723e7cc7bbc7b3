"""`megatron-real plan CONFIG --gpus N --gpu h100-80g`: tables, or JSON.

Exit codes: 0 the layout fits, 1 it does not, 2 the input was refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_real import config as configuration
from megatron_real.commands.terminal import refuse, table
from megatron_real.compare.sweep import is_sweep, load_sweep
from megatron_real.config import ParallelConfig
from megatron_real.config.engines import ENGINES, candidates
from megatron_real.plan.devices import DEVICES, Device
from megatron_real.plan.layouts import RESERVE_SHARE, Estimate, ranked, told_apart
from megatron_real.plan.measured import Rates, measured, measured_device
from megatron_real.plan.memory import MODELLED
from megatron_real.plan.speed import Cluster, Run
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.disk_needs import DiskNeeds, disk_needs
from megatron_real.weights.conversion import check_model
from megatron_real.weights.published import PUBLISHED, published_model

SUMMARY = "estimate memory, time and cost of a run, and rank its layouts"
EXAMPLES = """\
examples:
  megatron-real plan --model r1-distill-qwen-7b
  megatron-real plan --model r1-distill-qwen-32b --gpus 16,32,64 rollout.tp=4
  megatron-real plan my.yaml --gpus 8 --from runs/first
  megatron-real plan examples/configs/compare/paper_1.5b.yaml --model r1-distill-qwen-1.5b
  megatron-real plan my.yaml --gpus 32 --gpu h200-141g parallel.tp=4

exit codes: 0 the layout fits, 1 it does not, 2 the input was refused
"""

# What is planned in place of an engine whose memory has no fixed size: the first in the training processes that has.
PLANNED = next(
    name for name, engine in ENGINES.items() if engine.sized_kv_cache and not engine.own_processes
)


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "config",
        nargs="?",
        help="YAML file of a run or a sweep; of the model config.json is read, and headers of weights",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file"
    )
    parser.add_argument(
        "--model", choices=PUBLISHED, metavar="NAME", help=f"one of {', '.join(PUBLISHED)}"
    )
    parser.add_argument(
        "--rates", metavar="FILE", help="JSON of tools/gpu_day.py, for what it measured of this GPU"
    )
    parser.add_argument(
        "--from",
        dest="measured",
        metavar="RUN_DIR",
        help="take rates and lengths that this run measured",
    )
    parser.add_argument(
        "--gpus",
        type=_gpu_counts,
        default=[8],
        metavar="N[,N...]",
        help="GPUs that train; several are compared in one table; default: 8",
    )
    parser.add_argument("--gpu", choices=sorted(DEVICES), default="h100-80g", help="kind of GPU")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layouts in the ranking")
    parser.add_argument(
        "--price", type=float, metavar="USD", help="of one GPU for one hour; default: a list price"
    )
    parser.add_argument(
        "--mean-response",
        type=float,
        metavar="TOKENS",
        help="default: half of the longest response",
    )
    parser.add_argument(
        "--train-utilization",
        type=float,
        metavar="SHARE",
        help="of peak FLOP/s; default: published",
    )
    parser.add_argument(
        "--decode-utilization", type=float, metavar="SHARE", help="of memory bandwidth; likewise"
    )
    parser.add_argument(
        "--json", action="store_true", help="the same as JSON, in bytes and seconds"
    )


def run(options: argparse.Namespace) -> int:
    """Runs `plan`; returns the exit code."""
    try:
        source = _Source.of(options)
        device = _device(options)
        if is_sweep(source.config):
            return _variants(source, device, options)
        if len(options.gpus) > 1:
            return _sweep(source, device, options)
        estimate, note = source.estimate(device, options.gpus[0])
        best = ranked(estimate.run)
        if note and best:
            estimate = best[0]
    except ValueError as error:
        return refuse(error)

    best = best[: options.top]
    if options.json:
        print(json.dumps(_json(estimate, best), indent=2))
    else:
        paragraphs = _text(estimate, best)
        if note:
            paragraphs.insert(0, f"{note}; the fastest layout that fits is planned")
        if not best:
            paragraphs.insert(-1, _nearest(estimate.run))
        print("\n\n".join(map(_wrapped, paragraphs)))
    return 0 if estimate.fits else 1


@dataclass(frozen=True)
class _Source:
    """What is planned, before the number of GPUs."""

    config: str | Path
    """YAML file, or directory of a model's config.json."""
    words: tuple[str, ...]
    """Settings that replace those of the file."""
    rates: Rates
    """What the user or an earlier run knows better than the tables."""
    free_layout: bool
    """Nobody has asked for a layout: the fastest may take its place."""

    @classmethod
    def of(cls, options: argparse.Namespace) -> _Source:
        """Reads the command line.

        Raises:
            ValueError: nothing says what is planned, or a value is out of its range.
        """
        _check_ranges(options)
        words = tuple(options.overrides)
        config, model = options.config, options.model
        if config is not None and "=" in config and not Path(config).exists():
            config, words = None, (config, *words)
        if config in PUBLISHED:
            config, model = None, config

        rates = Rates(options.train_utilization, options.decode_utilization, options.mean_response)
        if options.measured is not None:
            run = RunDirectory(options.measured)
            rates = measured(run, rates)
            if config is None and model is None:
                config = str(run.config)
        if config is None and model is None:
            raise ValueError(
                "nothing says what is planned; give a YAML file, or --model and one of "
                f"{', '.join(PUBLISHED)}"
            )
        bare = config is None
        if model is not None:
            shapes = published_model(model)
            config = config or shapes
            words = (f"model.path={shapes}", *words)
        asked = any(word.startswith("parallel.") for word in words)
        return cls(config, words, rates, free_layout=bare and not asked)

    def estimate(self, device: Device, gpus: int) -> tuple[Estimate, str]:
        """The plan under the configured layout, and why another one should take its place; "" where none should.

        Raises:
            ValueError: the configuration cannot be planned, or a layout that was asked for does not fit the GPUs.
        """
        config = configuration.load(self.config, self.words)
        engines = candidates(config.rollout.engine).values()
        if not all(engine.sized_kv_cache for engine in engines):
            # Nobody plans GPUs for the embedded engine; vLLM's layout is checked by the same rules as in a run.
            words = [*self.words, f"rollout.engine={PLANNED}"]
            config = configuration.load(self.config, words)

        note = ""
        if self.free_layout:
            note = "no layout is configured"
        try:
            dp = configuration.check_world(config, gpus)
        except ValueError:
            if any(word.startswith(("parallel.", "rollout.")) for word in self.words):
                raise
            # A file's layout is for another number of GPUs.
            note = f"the configured layout does not divide {gpus} GPUs"
            one_gpu = dataclasses.replace(config.rollout, tp=1)
            config = dataclasses.replace(config, parallel=ParallelConfig(), rollout=one_gpu)
            dp = configuration.check_world(config, gpus)
        if few := configuration.too_few_sequences(config, dp):
            raise ValueError(few)
        architecture = check_model(config.model.path, required=False)
        cluster = Cluster(
            device, gpus, self.rates.train, self.rates.decode, self.rates.mean_response
        )
        return Estimate(Run(architecture, config, cluster)), note


def _wrapped(paragraph: str) -> str:
    """A paragraph whose sentences fit a terminal of 80 columns; tables are as they are."""
    return "\n".join(
        textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        if len(line) > _WIDTH
        else line
        for line in paragraph.splitlines()
    )


_WIDTH = 80


def _check_ranges(options: argparse.Namespace) -> None:
    for name in ("top", "price", "mean_response", "train_utilization", "decode_utilization"):
        value, limit = getattr(options, name), 1 if name.endswith("utilization") else float("inf")
        if value is not None and not 0 < value <= limit:
            wanted = "above 0 and at most 1" if limit == 1 else "above 0"
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {wanted}")
    for gpus in options.gpus:
        if gpus < 1:
            raise ValueError(f"--gpus is {gpus}; it must be above 0")


def _device(options: argparse.Namespace) -> Device:
    device = DEVICES[options.gpu]
    if options.rates:
        device = measured_device(options.rates, device)
    if options.price is None:
        return device
    return dataclasses.replace(device, usd_per_hour=options.price)


def _gpu_counts(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not understood; write 8, or 8,16,32 to compare"
        ) from None


def _sweep(source: _Source, device: Device, options: argparse.Namespace) -> int:
    """The fastest layout for each number of GPUs, in one table."""
    best: dict[int, Estimate | None] = {}
    for gpus in options.gpus:
        estimate, _ = source.estimate(device, gpus)
        best[gpus] = next(iter(ranked(estimate.run)), None)
    if options.json:
        rows = [{"gpus": n, "layout": _layout(e) if e else None} for n, e in best.items()]
        print(json.dumps({"gpu": device.name, "sweep": rows}, indent=2))
    else:
        print(f"The fastest layout that fits, for each number of {device.name} GPUs that train:\n")
        print(table([_SWEEP, *(_swept(gpus, made) for gpus, made in best.items())]))
    return 0 if any(best.values()) else 1


_SWEEP = ["GPUs and layout", "recompute", "step s", "hours", "GPU-hours", "USD", "GiB"]


def _swept(gpus: int, made: Estimate | None) -> list[str]:
    if made is None:
        return [f"{gpus}: none fits", *("-" for _ in _SWEEP[1:])]
    costs = [f"{made.hours:,.0f}", f"{made.gpu_hours:,.0f}", f"{made.usd:,.0f}"]
    recompute = made.run.config.model.recompute
    step = f"{told_apart(made.seconds.total):g}"
    return [f"{gpus}: {made.name}", recompute, step, *costs, f"{made.peak / 2**30:.0f}"]


def _variants(source: _Source, device: Device, options: argparse.Namespace) -> int:
    """Hours and cost of a sweep's runs, by variant, and of all of them."""
    if len(options.gpus) > 1:
        raise ValueError(
            f"--gpus is {options.gpus}; a sweep is planned for one number of GPUs of each run"
        )
    sweep = load_sweep(source.config, source.words, num_ranks=None, to_run=False)
    count = len(sweep.seeds)
    planned: dict[str, Estimate] = {}
    for run in sweep.runs[: len(sweep.variants)]:  # the first seed of each
        of_variant = dataclasses.replace(source, config=run.base, words=run.words)
        estimate, note = of_variant.estimate(device, options.gpus[0])
        best = ranked(estimate.run) if note else []
        planned[run.variant] = best[0] if best else estimate

    gpu_hours = count * sum(estimate.gpu_hours for estimate in planned.values())
    usd = count * sum(estimate.usd for estimate in planned.values())
    if options.json:
        variants = {name: _layout(estimate) for name, estimate in planned.items()}
        total = {"runs": len(sweep.runs), "gpu_hours": gpu_hours, "usd": usd}
        print(json.dumps({"gpu": device.name, "variants": variants, "total": total}, indent=2))
    else:
        rows = [_VARIANTS, *(_of_variant(name, made, count) for name, made in planned.items())]
        rows.append(["all", "", str(len(sweep.runs)), "", f"{gpu_hours:,.0f}", f"{usd:,.0f}"])
        runs = f"{len(sweep.runs)} runs of {sweep.budget:,} rollouts"
        print(f"{runs}, each on {options.gpus[0]} x {device.name}:\n")
        print(table(rows))
        print("\n" + _wrapped("Evaluations, checkpoints and start-up are not counted."))
    return 0 if all(estimate.fits for estimate in planned.values()) else 1


_VARIANTS = ["variant", "layout", "runs", "hours each", "GPU-hours", "USD"]


def _of_variant(name: str, made: Estimate, count: int) -> list[str]:
    layout = made.name if made.fits else "does not fit"
    costs = [f"{made.hours:,.1f}", f"{count * made.gpu_hours:,.0f}", f"{count * made.usd:,.0f}"]
    return [name, layout, str(count), *costs]


def _nearest(run: Run) -> str:
    """What would work where no layout fits: more of the same GPUs, or as many of larger ones."""
    options = []
    for gpus in (2, 3, 4, 8, 16, 32, 64):
        more = dataclasses.replace(run, cluster=dataclasses.replace(run.cluster, gpus=gpus))
        if gpus > run.cluster.gpus and (found := ranked(more)):
            options.append(f"{gpus} x {run.cluster.device.name} ({found[0].name})")
            break
    for device in sorted(DEVICES.values(), key=lambda device: device.memory_gib):
        larger = dataclasses.replace(run, cluster=dataclasses.replace(run.cluster, device=device))
        if device.memory_gib > run.cluster.device.memory_gib and (found := ranked(larger)):
            options.append(f"{run.cluster.gpus} x {device.name} ({found[0].name})")
            break
    return f"The nearest that works: {' or '.join(options)}." if options else "Nothing near works."


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
        "disk": _disk(made.run),
        "not_modelled": _unmodelled(made.run),
        "sources": made.run.cluster.device.sources,
    }


def _needs(run: Run) -> DiskNeeds:
    mean_response = run.cluster.mean_response
    return disk_needs(run.config, run.architecture, mean_response=mean_response)


def _disk(run: Run) -> dict[str, int]:
    needs = _needs(run)
    return {**dataclasses.asdict(needs), "total": needs.total}


def _disk_in_words(run: Run) -> str:
    needs = _needs(run)
    newest, every = run.config.rollout.keep_steps, run.config.rollout.keep_every
    rollouts = f"rollouts of the last {newest} steps" if newest else "rollouts of all steps"
    if every:
        rollouts += f" and of every {every}th"
    return (
        f"disk: up to {_gib(needs.total)} GiB: {needs.num_checkpoints} checkpoints of {_gib(needs.checkpoint)}, "
        f"{rollouts} {_gib(needs.rollouts)} (rollout.keep_steps), exported weights {_gib(needs.export)}"
    )


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
    if not seconds.reference:
        del stages["reference"]
    ahead = stages.pop("ahead")
    if ahead:  # only what is not hidden takes time
        stages["rollout"] -= ahead
    stages["step"] = seconds.total
    hidden = f"\n{ahead:.1f} s of the rollout are hidden behind training" if ahead else ""
    serving = f" and {run.server_gpus} that serve" if run.server_gpus else ""
    unmodelled = [f"{name} is not in this model of memory and time" for name in _unmodelled(run)]
    return [
        f"{_model_name(run)}, {run.architecture.num_parameters / 1e9:.2f}B parameters, on {run.cluster.gpus} x "
        f"{device.name}{serving}: {made.name}, recompute {run.config.model.recompute}\n"
        + ", ".join(f"{name} {value:,.0f}" for name, value in _step(run).items()),
        table(_memory(made)),
        f"{'fits' if made.fits else 'DOES NOT FIT'}: {_gib(made.peak)} GiB at the peak, {_gib(made.budget)} of "
        f"{device.memory_gib} GiB may be used ({RESERVE_SHARE:.0%} stay for CUDA, NCCL and fragmentation)"
        + _server(made),
        table(
            [
                ["part of a step", "seconds", "share"],
                *([n, f"{s:.1f}", f"{s / seconds.total:.0%}"] for n, s in stages.items()),
            ]
        )
        + hidden,
        f"{run.config.trainer.steps} steps: {made.hours:,.1f} hours, {made.gpu_hours:,.0f} GPU-hours, "
        f"${made.usd:,.0f} at ${device.usd_per_hour:g} per GPU and hour; evaluations, checkpoints and start-up are not "
        "counted",
        _disk_in_words(run),
        table([_RANKING, *map(_ranked, best)])
        if best
        else "No layout fits: take more or larger GPUs, or lower batch.max_tokens or rollout.kv_cache_mib.",
        "\n".join(
            [
                *unmodelled,
                "Rates:" if device.measured else "Rates, none of them measured here:",
                *(f"  {source}" for source in device.sources),
            ]
        ),
    ]


def _model_name(run: Run) -> str:
    path = Path(run.config.model.path)
    return path.name if path.name in PUBLISHED else str(path)


def _server(made: Estimate) -> str:
    parts = ", ".join(f"{part} {_gib(size)}" for part, size in made.server.items())
    return f"\na GPU that serves: {_gib(sum(made.server.values()))} GiB ({parts})" if parts else ""


_RANKING = [
    "fastest layouts that fit",
    "recompute",
    "engine tp",
    "step s",
    "rollout s",
    "peak GiB",
]


def _ranked(made: Estimate) -> list[str]:
    config, seconds = made.run.config, made.seconds
    times = (f"{told_apart(seconds.total):g}", f"{told_apart(seconds.rollout):g}")
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
        ["GiB on one rank", *(f"stage {s.stage}" for s in stages)],
        ["layers", *(str(s.layers) for s in stages)],
        ["parameters (billions)", *(f"{s.resident.parameters / 1e9:.3f}" for s in stages)],
        *([name, *map(_gib, row)] for name, row in sizes.items()),
    ]


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
