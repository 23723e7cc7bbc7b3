"""`megatron-real plan CONFIG --gpus N --gpu h100-80g`: tables, or JSON.

Exit codes: 0 the layout fits, 1 it does not, 2 the input was refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_real import config as configuration
from megatron_real.commands.arguments import add_gpu, add_overrides
from megatron_real.commands.terminal import input_checks, table
from megatron_real.compare.sweep import is_sweep, load_sweep
from megatron_real.config import ParallelConfig
from megatron_real.config.engines import ENGINES, candidates
from megatron_real.conversion.convert import check_model
from megatron_real.plan.devices import DEVICES, Device
from megatron_real.plan.layouts import RESERVE_SHARE, Estimate, ranked, told_apart
from megatron_real.plan.measured import Rates, measured, measured_device
from megatron_real.plan.memory import MODELLED
from megatron_real.plan.speed import Cluster, PlannedRun
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.disk_needs import DiskNeeds, disk_needs
from megatron_real.weights.published import PUBLISHED, published_model

SUMMARY = "estimate memory, time and cost of a run, and rank its layouts"
EXAMPLES = """\
examples:
  megatron-real plan --model r1-distill-qwen-7b
  megatron-real plan --model r1-distill-qwen-32b --gpus 16,32,64
  megatron-real plan my.yaml --gpus 8 --from runs/first
  megatron-real plan examples/configs/compare/paper_1.5b.yaml \\
      --model r1-distill-qwen-1.5b
  megatron-real plan my.yaml --gpus 32 --gpu h200-141g parallel.tp=4

exit codes: 0 the layout fits, 1 it does not, 2 the input was refused
"""

# What is planned in place of an engine whose memory has no fixed size: the first one in the
# training processes that has.
PLANNED = next(
    name for name, engine in ENGINES.items() if engine.sized_kv_cache and not engine.own_processes
)

_GAIN = 0.9
"""A step with a larger KV cache is mentioned where it takes at most this share of the seconds."""

_WIDTH = 80
"""Columns of a terminal that sentences are folded to."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    # What is planned.
    parser.add_argument(
        "config",
        nargs="?",
        help="YAML file of a run or a sweep; of the model config.json is read, and headers of "
        "weights",
    )
    add_overrides(parser)
    parser.add_argument(
        "--model", choices=PUBLISHED, metavar="NAME", help=f"one of {', '.join(PUBLISHED)}"
    )

    # What is known better than the tables of devices say.
    parser.add_argument(
        "--rates", metavar="FILE", help="JSON of tools/gpu_day.py, for what it measured of this GPU"
    )
    parser.add_argument(
        "--from",
        dest="measured",
        metavar="RUN_DIR",
        help="take rates and lengths that this run measured",
    )

    # On which GPUs.
    parser.add_argument(
        "--gpus",
        type=_gpu_counts,
        default=[8],
        metavar="N[,N...]",
        help="GPUs that train; several are compared in one table; default: 8",
    )
    add_gpu(parser)

    # What is shown, and what stands in for the defaults.
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
    with input_checks():
        source = _Source.of(options)
        device = DEVICES[options.gpu]
        if options.rates:
            device = measured_device(options.rates, device)
        if options.price is not None:
            device = dataclasses.replace(device, usd_per_hour=options.price)

        if is_sweep(source.config):
            return _plan_sweep(source, device, options)
        if len(options.gpus) > 1:
            return _compare_gpu_counts(source, device, options)

        estimate, note = source.estimate(device, options.gpus[0])
        configured = estimate.run.config.rollout.tp
        # Over all layouts, whatever the configured one is: the table below shows where it stands.
        best = ranked(estimate.run)
        # With a note, the configured layout is one that nobody has asked for on so many GPUs.
        if note and best:
            estimate = best[0]

    engines = ""
    if best:
        engines = _other_engines(configured, {estimate.run.cluster.gpus: best[0]})

    best = best[: options.top]
    if options.json:
        print(json.dumps(_json(estimate, best), indent=2))
    else:
        paragraphs = _text(estimate, best)
        if note:
            paragraphs.insert(0, f"{note}; the fastest layout that fits is planned")
        if not best:
            paragraphs.insert(-1, _nearest(estimate.run))
        # Before the last paragraph, which is that of the sources.
        paragraphs[-1:-1] = filter(None, [engines, _larger_cache(estimate)])
        print("\n\n".join(map(_wrapped, paragraphs)))

    # The planned layout decides, and not the best: it is the one that the run would have.
    if estimate.fits:
        return 0
    return 1


@dataclass(frozen=True)
class _Source:
    """What is planned, before the number of GPUs."""

    config: str | Path
    """YAML file, or directory of a model's config.json."""
    overrides: tuple[str, ...]
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
        # argparse knows types and no bounds.
        for name in ("top", "price", "mean_response", "train_utilization", "decode_utilization"):
            value = getattr(options, name)
            largest = math.inf
            limits = "above 0"
            if name.endswith("utilization"):
                largest = 1
                limits = "above 0 and at most 1"
            if value is not None and not 0 < value <= largest:
                raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {limits}")
        for gpus in options.gpus:
            if gpus < 1:
                raise ValueError(f"--gpus is {gpus}; it must be above 0")

        config = options.config
        model = options.model
        overrides = tuple(options.overrides)
        # The first word may be a setting or a published model, since the file may be left out.
        if config is not None and "=" in config and not Path(config).exists():
            overrides = (config, *overrides)
            config = None
        if config in PUBLISHED:
            model = config
            config = None

        rates = Rates(options.train_utilization, options.decode_utilization, options.mean_response)
        if options.measured is not None:
            run = RunDirectory(options.measured)
            # What the user gives goes before what the run measured.
            rates = measured(run, rates)
            if config is None and model is None:
                config = str(run.config)
        if config is None and model is None:
            raise ValueError(
                "nothing says what is planned; give a YAML file, or --model and one of "
                f"{', '.join(PUBLISHED)}"
            )

        # A file means its layout, written out or left at 1; the shapes of a published model mean
        # none.
        has_file = config is not None
        if model is not None:
            shapes = published_model(model)
            config = config or shapes
            overrides = (f"model.path={shapes}", *overrides)

        asked = any(word.startswith("parallel.") for word in overrides)
        return cls(config, overrides, rates, free_layout=not has_file and not asked)

    def estimate(self, device: Device, gpus: int) -> tuple[Estimate, str]:
        """Returns the plan under the configured layout.

        Returns:
            The plan; and why another layout should take its place, "" where none should.

        Raises:
            ValueError: the configuration cannot be planned, or a layout that was asked for does
                not fit the GPUs.
        """
        config = configuration.load(self.config, self.overrides)
        engines = candidates(config.rollout.engine).values()
        if not all(engine.sized_kv_cache for engine in engines):
            # Nobody plans GPUs for the embedded engine; vLLM's layout is checked by the same rules
            # as in a run.
            overrides = [*self.overrides, f"rollout.engine={PLANNED}"]
            config = configuration.load(self.config, overrides)

        note = ""
        if self.free_layout:
            note = "no layout is configured"
        try:
            dp = configuration.check_world(config, gpus)
        except ValueError:
            if any(word.startswith(("parallel.", "rollout.")) for word in self.overrides):
                raise
            # A file's layout is for another number of GPUs.
            note = f"the configured layout does not divide {gpus} GPUs"
            one_gpu = dataclasses.replace(config.rollout, tp=1)
            config = dataclasses.replace(config, parallel=ParallelConfig(), rollout=one_gpu)
            dp = configuration.check_world(config, gpus)

        too_few = configuration.too_few_sequences(config, dp)
        if too_few:
            raise ValueError(too_few)

        architecture = check_model(config.model.path, required=False)
        cluster = Cluster(
            device, gpus, self.rates.train, self.rates.decode, self.rates.mean_response
        )
        return Estimate(PlannedRun(architecture, config, cluster)), note


def _wrapped(paragraph: str) -> str:
    """Returns a paragraph whose sentences fit a terminal of 80 columns; tables are as they are."""
    lines = []
    for line in paragraph.splitlines():
        if len(line) > _WIDTH:
            line = textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        lines.append(line)
    return "\n".join(lines)


def _gpu_counts(text: str) -> list[int]:
    """Returns the numbers of `8,16,32`, as argparse's type of --gpus."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not understood; write 8, or 8,16,32 to compare"
        ) from None


def _compare_gpu_counts(source: _Source, device: Device, options: argparse.Namespace) -> int:
    """Prints the fastest layout for each number of GPUs, in one table; returns the exit code."""
    best: dict[int, Estimate | None] = {}
    for gpus in options.gpus:
        # Its own layout is not shown here: the estimate carries the run whose layouts are ranked.
        estimate, _ = source.estimate(device, gpus)
        configured = estimate.run.config.rollout.tp
        best[gpus] = next(iter(ranked(estimate.run)), None)

    if options.json:
        objects = []
        for gpus, fastest in best.items():
            layout = None
            if fastest is not None:
                layout = _layout(fastest)
            objects.append({"gpus": gpus, "layout": layout})
        print(json.dumps({"gpu": device.name, "sweep": objects}, indent=2))
    else:
        rows = [["GPUs and layout", "recompute", "step s", "hours", "GPU-hours", "USD"]]
        for gpus, fastest in best.items():
            if fastest is None:
                rows.append([f"{gpus}: none fits", *("-" for _ in rows[0][1:])])
                continue
            rows.append(
                [
                    f"{gpus}: {fastest.name}",
                    fastest.run.config.model.recompute,
                    f"{told_apart(fastest.seconds.total):g}",
                    f"{fastest.hours:,.0f}",
                    f"{fastest.gpu_hours:,.0f}",
                    f"{fastest.usd:,.0f}",
                ]
            )

        print(f"The fastest layout that fits, for each number of {device.name} GPUs that train:\n")
        print(table(rows))

        fitting = {gpus: fastest for gpus, fastest in best.items() if fastest is not None}
        engines = _other_engines(configured, fitting)
        if engines:
            print("\n" + _wrapped(engines))

    if any(best.values()):
        return 0
    return 1


def _plan_sweep(source: _Source, device: Device, options: argparse.Namespace) -> int:
    """Prints hours and cost of a sweep's runs, by variant and in all; returns the exit code."""
    if len(options.gpus) > 1:
        raise ValueError(
            f"--gpus is {options.gpus}; a sweep is planned for one number of GPUs of each run"
        )

    # num_ranks is None: the layouts of the file may be for other GPUs, and `estimate` settles that.
    sweep = load_sweep(source.config, source.overrides, num_ranks=None, to_run=False)
    num_seeds = len(sweep.seeds)

    estimates: dict[str, Estimate] = {}
    # All seeds of a variant need the same.
    for run in sweep.runs[: len(sweep.variants)]:  # the first seed of each
        of_variant = dataclasses.replace(source, config=run.base, overrides=run.overrides)
        estimate, note = of_variant.estimate(device, options.gpus[0])
        # As in a plan of one run, where a note lets the fastest layout take the
        # place of the file's.
        if note:
            estimate = next(iter(ranked(estimate.run)), estimate)
        estimates[run.variant] = estimate

    gpu_hours = num_seeds * sum(estimate.gpu_hours for estimate in estimates.values())
    usd = num_seeds * sum(estimate.usd for estimate in estimates.values())

    if options.json:
        variants = {name: _layout(estimate) for name, estimate in estimates.items()}
        total = {"runs": len(sweep.runs), "gpu_hours": gpu_hours, "usd": usd}
        print(json.dumps({"gpu": device.name, "variants": variants, "total": total}, indent=2))
    else:
        rows = [["variant", "layout", "runs", "hours each", "GPU-hours", "USD"]]
        for name, estimate in estimates.items():
            layout = "does not fit"
            if estimate.fits:
                layout = estimate.name
            rows.append(
                [
                    name,
                    layout,
                    str(num_seeds),
                    f"{estimate.hours:,.1f}",
                    f"{num_seeds * estimate.gpu_hours:,.0f}",
                    f"{num_seeds * estimate.usd:,.0f}",
                ]
            )

        rows.append(["all", "", str(len(sweep.runs)), "", f"{gpu_hours:,.0f}", f"{usd:,.0f}"])
        runs = f"{len(sweep.runs)} runs of {sweep.budget:,} rollouts"
        print(f"{runs}, each on {options.gpus[0]} x {device.name}:\n")
        print(table(rows))
        print("\n" + _wrapped("Evaluations, checkpoints and start-up are not counted."))

    if all(estimate.fits for estimate in estimates.values()):
        return 0
    return 1


def _other_engines(configured: int, best: Mapping[int, Estimate]) -> str:
    """Returns which engines were taken where none of the configured size fits, "" where one does.

    Args:
        configured: rollout.tp of the configuration.
        best: the fastest layout for each number of GPUs.
    """
    counts: dict[int, list[str]] = {}
    for gpus, fastest in best.items():
        tp = fastest.run.config.rollout.tp
        # Engines on one GPU need no setting.
        if tp not in (1, configured):
            counts.setdefault(tp, []).append(str(gpus))
    if not counts:
        return ""

    taken = [f"rollout.tp={tp} on {', '.join(gpus)} GPUs" for tp, gpus in sorted(counts.items())]
    return (
        f"No layout fits with engines of rollout.tp={configured}; taken are {'; '.join(taken)}. "
        "Set it in the run's configuration too."
    )


def _larger_cache(estimate: Estimate) -> str:
    """Returns what a larger KV cache would gain, "" where it gains less than the plan can tell.

    The default of rollout.kv_cache_mib suits any GPU, so a plan with it waits for rollouts that
    the memory left free would generate beside each other.
    """
    run = estimate.run
    if not estimate.fits or run.config.rollout.replay:
        return ""
    # The fullest stage decides: rollout.kv_cache_mib is the same on every rank.
    in_use = max(stage.peaks["rollout"] for stage in estimate.stages)
    if run.server_gpus:
        in_use = sum(estimate.server.values())
    # Bytes to MiB.
    free_mib = (estimate.budget - in_use) >> 20
    # Whole GiB, as a person would write it.
    kv_cache_mib = (run.config.rollout.kv_cache_mib + free_mib) // 1024 * 1024

    rollout = dataclasses.replace(run.config.rollout, kv_cache_mib=kv_cache_mib)
    config = dataclasses.replace(run.config, rollout=rollout)
    larger = Estimate(dataclasses.replace(run, config=config))

    before = estimate.seconds.total
    after = larger.seconds.total
    if not larger.fits or after > _GAIN * before:
        return ""

    return (
        f"{free_mib / 1024:.0f} GiB stay free while the engine decodes: with "
        f"rollout.kv_cache_mib={kv_cache_mib} a step takes {told_apart(after):g} s instead of "
        f"{told_apart(before):g} s."
    )


def _nearest(run: PlannedRun) -> str:
    """Returns what would work where no layout fits: more of the same GPUs, or larger ones."""
    cluster = run.cluster
    options = []
    # Numbers that clusters have, up to eight nodes.
    for gpus in (2, 3, 4, 8, 16, 32, 64):
        if gpus <= cluster.gpus:
            continue
        layouts = ranked(dataclasses.replace(run, cluster=dataclasses.replace(cluster, gpus=gpus)))
        if layouts:
            options.append(f"{gpus} x {cluster.device.name} ({_with_engines(layouts[0])})")
            break

    # By memory: the first on which it fits is the smallest one.
    for device in sorted(DEVICES.values(), key=lambda device: device.memory_gib):
        if device.memory_gib <= cluster.device.memory_gib:
            continue
        larger = dataclasses.replace(cluster, device=device)
        layouts = ranked(dataclasses.replace(run, cluster=larger))
        if layouts:
            options.append(f"{cluster.gpus} x {device.name} ({_with_engines(layouts[0])})")
            break

    if not options:
        return "Nothing near works."
    return f"The nearest that works: {' or '.join(options)}."


def _with_engines(estimate: Estimate) -> str:
    """Returns a layout's name, and the size of its engines where it is not the default."""
    tp = estimate.run.config.rollout.tp
    if tp == 1:
        return estimate.name
    return f"{estimate.name}, rollout.tp={tp}"


def _json(estimate: Estimate, best: Iterable[Estimate]) -> dict[str, Any]:
    """Returns the whole plan for --json."""
    run = estimate.run
    needs = _disk_needs(run)

    return {
        "gpu": run.cluster.device.name,
        "gpus": run.cluster.gpus,
        "server_gpus": run.server_gpus,
        "budget_bytes": estimate.budget,
        "step": _step(run),
        "layout": _layout(estimate),
        "memory": [
            # asdict knows fields alone, and `peaks` is a property. So is `total` below.
            {**dataclasses.asdict(stage), "peaks": stage.peaks}
            for stage in estimate.stages
        ],
        "server_memory": estimate.server,
        "best": [_layout(layout) for layout in best],
        "disk": {**dataclasses.asdict(needs), "total": needs.total},
        "not_modelled": _unmodelled(run),
        "sources": run.cluster.device.sources,
    }


def _disk_needs(run: PlannedRun) -> DiskNeeds:
    return disk_needs(run.config, run.architecture, mean_response=run.cluster.mean_response)


def _layout(estimate: Estimate) -> dict[str, Any]:
    """Returns one layout for --json."""
    config = estimate.run.config

    return {
        "name": estimate.name,
        "parallel": dataclasses.asdict(config.parallel),
        "dp": estimate.run.dp,
        "recompute": config.model.recompute,
        "rollout_tp": config.rollout.tp,
        "fits": estimate.fits,
        "peak_bytes": estimate.peak,
        "seconds": {**dataclasses.asdict(estimate.seconds), "step": estimate.seconds.total},
        "hours": estimate.hours,
        "gpu_hours": estimate.gpu_hours,
        "usd": estimate.usd,
    }


def _step(run: PlannedRun) -> dict[str, float]:
    """Returns the numbers of a step that follow from the configuration, for a reader to check."""
    return {
        "rollouts": run.rollouts,
        "updates": run.config.updates_per_step,
        "rollouts an update": run.rollouts // run.config.updates_per_step,
        "tokens a rollout": run.mean_tokens,
        "micro-batches an update and rank": run.micro_batches,
        "padded vocabulary": run.architecture.padded_vocab(run.config.parallel.tp),
    }


def _unmodelled(run: PlannedRun) -> list[str]:
    """Returns the settings of Megatron that the estimates know nothing of."""
    return sorted(f"megatron.{name}" for name in set(run.config.megatron) - MODELLED)


def _text(estimate: Estimate, best: Sequence[Estimate]) -> list[str]:
    """Returns the plan's paragraphs: model, memory, time, cost, disk, other layouts, sources."""
    run = estimate.run
    device = run.cluster.device

    # A published model is a directory of the package, which says nothing to the reader.
    model = run.config.model.path
    if Path(model).name in PUBLISHED:
        model = Path(model).name
    serving = ""
    if run.server_gpus:
        serving = f" and {run.server_gpus} that serve"
    step = ", ".join(f"{name} {value:,.0f}" for name, value in _step(run).items())

    paragraphs = [
        f"{model}, {run.architecture.num_parameters / 1e9:.2f}B parameters, on "
        f"{run.cluster.gpus} x {device.name}{serving}: {estimate.name}, recompute "
        f"{run.config.model.recompute}\n{step}",
        table(_memory(estimate)),
    ]

    verdict = "DOES NOT FIT"
    if estimate.fits:
        verdict = "fits"
    memory = (
        f"{verdict}: {_gib(estimate.peak)} GiB at the peak, {_gib(estimate.budget)} of "
        f"{device.memory_gib} GiB may be used ({RESERVE_SHARE:.0%} stay for CUDA, NCCL and "
        f"fragmentation)"
    )
    if estimate.server:
        parts = ", ".join(f"{part} {_gib(size)}" for part, size in estimate.server.items())
        memory += f"\na GPU that serves: {_gib(sum(estimate.server.values()))} GiB ({parts})"
    paragraphs.append(memory)

    paragraphs.append(_time(estimate))
    paragraphs.append(
        f"{run.config.trainer.steps} steps: {estimate.hours:,.1f} hours, "
        f"{estimate.gpu_hours:,.0f} GPU-hours, ${estimate.usd:,.0f} at ${device.usd_per_hour:g} "
        f"per GPU and hour; evaluations, checkpoints and start-up are not counted"
    )
    paragraphs.append(_disk(run))

    if best:
        paragraphs.append(_ranking(best))
    else:
        paragraphs.append(
            "No layout fits: take more or larger GPUs, or lower batch.max_tokens or "
            "rollout.kv_cache_mib."
        )

    lines = [f"{name} is not in this model of memory and time" for name in _unmodelled(run)]
    if device.measured:
        lines.append("Rates:")
    else:
        lines.append("Rates, none of them measured here:")
    lines += [f"  {source}" for source in device.sources]
    paragraphs.append("\n".join(lines))

    return paragraphs


def _memory(estimate: Estimate) -> list[list[str]]:
    """Returns the table of memory, a column for each pipeline stage."""
    stages = estimate.stages
    rows = [
        ["GiB on one rank", *(f"stage {s.stage}" for s in stages)],
        ["layers", *(str(s.layers) for s in stages)],
        ["parameters (billions)", *(f"{s.resident.parameters / 1e9:.3f}" for s in stages)],
    ]

    sizes = {
        "weights": [s.resident.weights for s in stages],
        "gradients": [s.resident.gradients for s in stages],
        "optimizer": [s.resident.optimizer for s in stages],
        "update: saved activations": [s.update.saved for s in stages],
        "update: log-prob head": [s.update.head for s in stages],
        "update: layer at work": [s.update.layer for s in stages],
        "old log-probs": [s.old_logprobs.total for s in stages],
    }
    for part in stages[0].engine:
        sizes[f"engine: {part}"] = [s.engine[part] for s in stages]
    sizes["sync: tensor, bucket"] = [s.sync for s in stages]
    # The parts of a step follow one another: the memory that counts is the largest peak.
    for part in stages[0].peaks:
        sizes[f"peak of {part}"] = [s.peaks[part] for s in stages]

    for name, bytes_of_stages in sizes.items():
        rows.append([name, *map(_gib, bytes_of_stages)])
    return rows


def _time(estimate: Estimate) -> str:
    """Returns the table of a step's parts."""
    seconds = estimate.seconds
    parts = dataclasses.asdict(seconds)
    if not seconds.reference:
        del parts["reference"]
    # `ahead` is the part of the rollout that is hidden behind training: none of the step's seconds.
    hidden = parts.pop("ahead")
    if hidden:
        parts["rollout"] -= hidden
    parts["step"] = seconds.total

    rows = [["part of a step", "seconds", "share"]]
    for name, value in parts.items():
        rows.append([name, f"{value:.1f}", f"{value / seconds.total:.0%}"])

    text = table(rows)
    if hidden:
        text += f"\n{hidden:.1f} s of the rollout are hidden behind training"
    return text


def _disk(run: PlannedRun) -> str:
    """Returns the sentence about the run directory's size."""
    needs = _disk_needs(run)
    newest = run.config.rollout.keep_steps
    every = run.config.rollout.keep_every

    rollouts = "rollouts of all steps"
    if newest:
        rollouts = f"rollouts of the last {newest} steps"
    if every:
        rollouts += f" and of every {every}th"
    if run.config.rollout.keep_groups:
        rollouts = f"{run.config.rollout.keep_groups} groups of the {rollouts}"

    return (
        f"disk: up to {_gib(needs.total)} GiB: {needs.num_checkpoints} checkpoints of "
        f"{_gib(needs.checkpoint)}, {rollouts} {_gib(needs.rollouts)} (rollout.keep_steps), "
        f"exported weights {_gib(needs.export)}"
    )


def _ranking(best: Sequence[Estimate]) -> str:
    """Returns the table of the fastest layouts that fit."""
    rows = [
        [
            "fastest layouts that fit",
            "recompute",
            "engine tp",
            "step s",
            "rollout s",
            "peak GiB",
        ]
    ]

    for estimate in best:
        rows.append(
            [
                estimate.name,
                estimate.run.config.model.recompute,
                str(estimate.run.config.rollout.tp),
                f"{told_apart(estimate.seconds.total):g}",
                f"{told_apart(estimate.seconds.rollout):g}",
                _gib(estimate.peak),
            ]
        )
    return table(rows)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
