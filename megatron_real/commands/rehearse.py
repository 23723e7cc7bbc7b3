"""`megatron-real rehearse CONFIG --gpus N`: a step of one rank without a GPU.

With --all-stages it is a step of one rank of each pipeline stage. docs/rehearsal.md shows the
output. Exit codes: 0 the step runs and fits, 1 it breaks or does not fit, 2 the input was refused.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any

from megatron_real import config as configuration
from megatron_real.commands.arguments import add_gpu, add_overrides
from megatron_real.commands.terminal import input_checks, table
from megatron_real.plan.devices import DEVICES
from megatron_real.plan.layouts import RESERVE_SHARE
from megatron_real.rehearsal.launch import rehearse
from megatron_real.rehearsal.report import Phase, RankReport, Request
from megatron_real.weights.published import PUBLISHED, published_model

SUMMARY = "run a training step of a GPU cluster on one CPU core, without GPU or weights"
EXAMPLES = """\
examples:
  megatron-real rehearse my.yaml --model r1-distill-qwen-7b --gpus 16
  megatron-real rehearse my.yaml --gpus 64 --gpu h200-141g --all-stages \\
      parallel.tp=8 parallel.pp=4

exit codes: 0 it runs and fits, 1 it breaks or does not fit, 2 the input was
refused
"""

_SITES = 8
"""Call sites that a table names."""
_COLUMNS = 80
"""Width of the output."""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("config", help="YAML file; of the model config.json is read, nothing else")
    add_overrides(parser)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs that train")
    add_gpu(parser)
    parser.add_argument(
        "--model",
        choices=PUBLISHED,
        metavar="NAME",
        help="shapes that ship with the package, for model.path: " + ", ".join(PUBLISHED),
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, default=0, help="global rank to rehearse")
    which.add_argument("--all-stages", action="store_true", help="one rank of each pipeline stage")
    parser.add_argument(
        "--micro-batches",
        type=int,
        default=0,
        metavar="M",
        help=(
            "of the update on a data-parallel rank; default: twice the pipeline's stages, 3 at "
            "least"
        ),
    )
    parser.add_argument("--json", action="store_true", help="all counts as JSON")


def run(options: argparse.Namespace) -> int:
    """Runs `rehearse`; returns the exit code."""
    with input_checks():
        requests = _requests(options)
        # Within the checks: some inputs are refused by the rank's own process.
        reports = rehearse(requests)

    # The share that `plan` leaves free, too: both must call the same layout too large.
    budget = int(DEVICES[options.gpu].memory_gib * 2**30 * (1 - RESERVE_SHARE))
    objects: list[dict[str, Any]] = []
    for report in reports:
        # A rank that broke has a peak of what it came to, which may well fit.
        fits = not report.fault and report.peak <= budget
        sizes = {"peak": report.peak, "budget": budget, "fits": fits}
        objects.append({**report.to_json(), **sizes})

    if options.json:
        print(json.dumps(objects, indent=2))
    else:
        print("\n\n".join(paragraph for r in reports for paragraph in _text(r, budget)))
    if all(report["fits"] for report in objects):
        return 0
    return 1


def _requests(options: argparse.Namespace) -> list[Request]:
    overrides = tuple(options.overrides)
    if options.model:
        overrides = (*overrides, f"model.path={published_model(options.model)}")
    if options.gpus < 1:
        raise ValueError(f"--gpus is {options.gpus}; it must be at least 1")
    config = configuration.load(options.config, overrides)
    configuration.check_world(config, options.gpus)
    if not 0 <= options.rank < options.gpus:
        raise ValueError(f"--rank is {options.rank}; it must be 0 to {options.gpus - 1}")

    ranks = [options.rank]
    if options.all_stages:
        # Megatron's rank numbers count pipeline stages last: each stage is one block of ranks.
        ranks_of_stage = options.gpus // config.parallel.pp
        ranks = [stage * ranks_of_stage for stage in range(config.parallel.pp)]
    return [
        Request(
            config=options.config,
            overrides=overrides,
            gpus=options.gpus,
            rank=rank,
            gpu=options.gpu,
            micro_batches=options.micro_batches,
        )
        for rank in ranks
    ]


def _text(report: RankReport, budget: int) -> list[str]:
    """Returns the paragraphs of one rank."""
    place = " ".join(f"{axis} {number}" for axis, number in report.place.items())
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    title = f"rank {report.rank} ({place}); {versions}; rehearsed in {report.seconds:.0f} s"
    paragraphs = [_folded(title)]

    if report.fault:
        paragraphs.append(_folded(f"BREAKS: {report.fault}"))
    # It broke before there was a model: nothing below has a figure.
    if not report.resident:
        return paragraphs

    load = (
        f"{report.micro_batches} micro-batches of {report.sequences} sequences, "
        f"{report.tokens} tokens on this rank, groups {report.placement}; "
        f"{report.parameters / 1e6:,.1f} million parameters"
    )
    paragraphs.append(_folded(load))

    # Only the phases that `plan` models, under the same names.
    measured = {"resident": report.resident}
    for phase in report.phases:
        if phase.name in ("old_logprobs", "gradient"):
            measured[phase.name] = phase.peak
    rows = [["GiB at the peak", "rehearsed", "plan", "plan is"]]
    for name, size in measured.items():
        planned = report.plan[name]
        rows.append([name, _gib(size), _gib(planned), f"{planned / size - 1:+.1%}"])
    paragraphs.append(table(rows))

    verdict = "DOES NOT FIT"
    if report.peak <= budget:
        verdict = "fits"
    peak = f"{_gib(report.peak)} GiB at the peak, {_gib(budget)} may be used"
    paragraphs.append(_folded(f"{verdict}: {peak}; the engine's part of it is plan's figure"))

    rows = [["part of the step", "peak GiB", "after", "TFLOP", "kernels", "syncs", "in layers"]]
    for phase in report.phases:
        figures = [f"{phase.flops / 1e12:,.1f}", f"{phase.kernels:,}", str(phase.num_syncs)]
        row = [phase.name, _gib(phase.peak), _gib(phase.after), *figures]
        rows.append([*row, str(phase.syncs_in_layers)])
    paragraphs.append(table(rows))
    paragraphs += [_details(phase) for phase in report.phases if phase.name == "gradient"]

    unusual = sorted({site for phase in report.phases for site in phase.guesses})
    if unusual:
        title = "taken as a constant, since only a GPU knows them:"
        paragraphs.append("\n".join([title, *(_folded(f"  {site}", 4) for site in unusual)]))

    if report.skipped:
        paragraphs.append(_folded("not rehearsed: " + "; ".join(report.skipped)))

    return paragraphs


def _folded(line: str, indent: int = 2) -> str:
    """Returns a line as lines of 80 columns; a word that is longer stays whole."""
    return textwrap.fill(
        line,
        _COLUMNS,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _details(phase: Phase) -> str:
    """Returns what holds memory at a phase's peak, where the host waits in it, what it sends."""
    lines = [f"{phase.name}: what holds memory at its peak (GiB)"]
    for site, size in list(phase.holders.items())[:_SITES]:
        # 11 columns before the site, 23 before the call below: later lines begin under it.
        lines.append(_folded(f"  {_gib(size):>7}  {site}", 11))

    if phase.syncs:
        lines.append(f"{phase.name}: where the host waits for the device (times)")
        for site, times in list(phase.syncs.items())[:_SITES]:
            lines.append(_folded(f"  {times:>7}  {site}", 11))

    if phase.collectives:
        lines.append(f"{phase.name}: collectives (calls, MiB of this rank)")
        for sent in phase.collectives:
            counts = f"{sent.calls:>7}  {sent.num_bytes / 2**20:>10,.1f}"
            over = f"over {sent.ranks} ({sent.group})"
            lines.append(_folded(f"  {counts}  {sent.call} {sent.dtype} {over}", 23))

    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
