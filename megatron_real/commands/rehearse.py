"""`megatron-real rehearse CONFIG --gpus N`: a step of a GPU cluster's rank, without a GPU.

Rehearsed is one rank, or one of each pipeline stage. Exit codes: 0 it runs and fits, 1 it breaks or
does not fit, 2 the input was refused. docs/rehearsal.md.
"""

from __future__ import annotations

import argparse
import json

from megatron_real import config as configuration
from megatron_real.commands.terminal import refuse, table
from megatron_real.plan.devices import DEVICES
from megatron_real.plan.layouts import RESERVE_SHARE
from megatron_real.rehearsal.launch import rehearse
from megatron_real.rehearsal.report import Phase, RankReport, Request
from megatron_real.weights.published import PUBLISHED, published_model

SUMMARY = "run a training step of a GPU cluster on one CPU core, without GPU or weights"
EXAMPLES = """\
examples:
  megatron-real rehearse examples/configs/real_7b.yaml --model r1-distill-qwen-7b --gpus 16
  megatron-real rehearse my.yaml --gpus 64 --gpu h200-141g --all-stages parallel.tp=8 parallel.pp=4

exit codes: 0 it runs and fits, 1 it breaks or does not fit, 2 the input was refused
"""

_SITES = 8
"""Call sites that a table names."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("config", help="YAML file; of the model config.json is read, nothing else")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file"
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs that train")
    parser.add_argument("--gpu", choices=sorted(DEVICES), default="h100-80g", help="kind of GPU")
    parser.add_argument(
        "--model", choices=PUBLISHED, help="shapes that ship with the package, for model.path"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, default=0, help="global rank to rehearse")
    which.add_argument("--all-stages", action="store_true", help="one rank of each pipeline stage")
    parser.add_argument(
        "--micro-batches",
        type=int,
        default=0,
        metavar="M",
        help="of the update on a data-parallel rank; default: twice the pipeline's stages, 3 at "
        "least",
    )
    parser.add_argument("--json", action="store_true", help="all counts as JSON")


def run(options: argparse.Namespace) -> int:
    """Runs `rehearse`; returns the exit code."""
    try:
        requests = _requests(options)
        reports = rehearse(requests)
    except ValueError as error:
        return refuse(error)

    # As `plan` does it: a part of the memory stays for CUDA, NCCL and fragmentation.
    budget = int(DEVICES[options.gpu].memory_gib * 2**30 * (1 - RESERVE_SHARE))
    if options.json:
        rows = []
        for report in reports:
            fits = not report.fault and report.peak <= budget
            rows.append({**report.to_json(), "peak": report.peak, "budget": budget, "fits": fits})
        print(json.dumps(rows, indent=2))
    else:
        paragraphs = []
        for report in reports:
            paragraphs += _text(report, budget)
        print("\n\n".join(paragraphs))
    if all(not report.fault and report.peak <= budget for report in reports):
        return 0
    return 1


def _requests(options: argparse.Namespace) -> list[Request]:
    """Returns the ranks to rehearse.

    Raises:
        ValueError: an option or the configuration is refused.
    """
    words = tuple(options.overrides)
    if options.model:
        words = (*words, f"model.path={published_model(options.model)}")
    if options.gpus < 1:
        raise ValueError(f"--gpus is {options.gpus}; it must be at least 1")
    config = configuration.load(options.config, words)
    configuration.check_world(config, options.gpus)
    if not 0 <= options.rank < options.gpus:
        raise ValueError(f"--rank is {options.rank}; it must be 0 to {options.gpus - 1}")

    ranks = [options.rank]
    if options.all_stages:
        # Megatron numbers stages last: the first rank of a stage is a multiple of all the others.
        ranks = list(range(0, options.gpus, options.gpus // config.parallel.pp))
    requests = []
    for rank in ranks:
        requests.append(
            Request(
                config=options.config,
                overrides=words,
                gpus=options.gpus,
                rank=rank,
                gpu=options.gpu,
                micro_batches=options.micro_batches,
            )
        )
    return requests


def _text(report: RankReport, budget: int) -> list[str]:
    """Returns the paragraphs of one rank."""
    place = " ".join(f"{axis} {number}" for axis, number in report.place.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    paragraphs = [f"rank {report.rank} ({place}); {versions}; rehearsed in {report.seconds:.0f} s"]
    if report.fault:
        paragraphs.append(f"BREAKS: {report.fault}")
    # Where it broke before the model was built, there is no figure to show.
    if not report.resident:
        return paragraphs

    paragraphs.append(
        f"{report.micro_batches} micro-batches of {report.sequences} sequences, {report.tokens} "
        f"tokens on this rank, groups {report.placement}; {report.parameters / 1e6:,.1f} million "
        f"parameters"
    )

    comparison = [["GiB at the peak", "rehearsed", "plan", "plan is"]]
    measured = {"resident": report.resident}
    measured |= {p.name: p.peak for p in report.phases if p.name in ("old_logprobs", "gradient")}
    for name, size in measured.items():
        planned = report.plan[name]
        comparison.append([name, _gib(size), _gib(planned), f"{planned / size - 1:+.1%}"])
    paragraphs.append(table(comparison))

    verdict = "DOES NOT FIT"
    if report.peak <= budget:
        verdict = "fits"
    paragraphs.append(
        f"{verdict}: {_gib(report.peak)} GiB at the peak, {_gib(budget)} may be used; the engine's "
        f"part of it is plan's figure"
    )

    rows = [["part of the step", "peak GiB", "after", "TFLOP", "kernels", "syncs", "in layers"]]
    for phase in report.phases:
        rows.append(
            [
                phase.name,
                _gib(phase.peak),
                _gib(phase.after),
                f"{phase.flops / 1e12:,.1f}",
                f"{phase.kernels:,}",
                str(phase.num_syncs),
                str(phase.syncs_in_layers),
            ]
        )
    paragraphs.append(table(rows))
    paragraphs += [_details(phase) for phase in report.phases if phase.name == "gradient"]

    guesses = sorted({site for phase in report.phases for site in phase.guesses})
    if guesses:
        sites = "\n  ".join(guesses)
        paragraphs.append(f"taken as a constant, since only a GPU knows them:\n  {sites}")
    if report.skipped:
        paragraphs.append("not rehearsed: " + "; ".join(report.skipped))
    return paragraphs


def _details(phase: Phase) -> str:
    """Returns what holds memory at a phase's peak, where the host waits, and what it sends."""
    lines = [f"{phase.name}: what holds memory at its peak (GiB)"]
    for site, size in list(phase.holders.items())[:_SITES]:
        lines.append(f"  {_gib(size):>7}  {site}")
    if phase.syncs:
        lines.append(f"{phase.name}: where the host waits for the device")
        for site, times in list(phase.syncs.items())[:_SITES]:
            lines.append(f"  {times:>7}  {site}")
    if phase.collectives:
        lines.append(f"{phase.name}: collectives (calls, MiB of this rank)")
        for one in phase.collectives:
            lines.append(
                f"  {one.calls:>7}  {one.num_bytes / 2**20:>10,.1f}  {one.call} {one.dtype} over "
                f"{one.ranks} ({one.group})"
            )
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
