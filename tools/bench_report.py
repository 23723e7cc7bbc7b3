"""What a report costs: seconds, memory and size of the page, for long runs with many rollouts.

    # 3 runs of 1,400 steps of 1,024 rollouts
    python tools/bench_report.py
    python tools/bench_report.py --steps 100 --rollouts 128 --runs 1

The runs are synthetic, with the metrics of a real one and rollouts of groups of 8. A report reads
the rollouts of at most 40 steps of a run, which are drawn one by one; the files of all other steps
are links to the first of them, as they are never opened. The report is the command, in a process of
its own: its seconds are those of the clock, its memory is its peak.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import yaml
from bench_machine import add_result_options, show

from megatron_real.records import Completion, Label, Prompt, Rollout, Status, Verdict
from megatron_real.report.browser import MAX_STEPS, spaced
from megatron_real.report.charts import CURVES
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import write_rollouts

GROUP = 8
WORDS = (
    "so",
    "the",
    "sum",
    "of",
    "42",
    "and",
    "7",
    "is",
    "49",
    "<b>",
    "&",
    "therefore",
    "\\frac{1}{2}",
)


def main() -> None:
    """Writes the runs, and a report of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--rollouts", type=int, default=1024, help="of a step")
    parser.add_argument("--tokens", type=int, default=512, help="of an answer, on average")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=5.0, help="limit of the page")
    parser.add_argument(
        "--token-weights", action="store_true", help="with trainer.keep_token_weights"
    )
    add_result_options(parser)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder) / f"real-{seed}" for seed in range(options.runs)]
        started = time.perf_counter()
        # Writing rollouts takes most of the time: the other runs link to those of the first.
        first, *others = runs
        write_run(first, options, seed=0, rollouts_of=None)
        for seed, path in enumerate(others, start=1):
            write_run(path, options, seed=seed, rollouts_of=first)
        on_disk = sum(file.stat().st_size for file in distinct_files(runs[0]))
        print(f"{options.runs} runs written in {time.perf_counter() - started:.0f} s, ", end="")
        print(f"{on_disk / 1e6:.0f} MB of rollouts in the files that a report of one run opens")
        measure(runs, Path(folder) / "report.html", options)


def measure(runs: list[Path], out: Path, options: argparse.Namespace) -> None:
    """Runs the command, and prints its figures."""
    command = [sys.executable, "-m", "megatron_real", "report", *map(str, runs), "--out", str(out)]
    started = time.perf_counter()
    # A process of its own: the peak is then the report's, and its imports are in the seconds.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--megabytes", str(options.megabytes)], check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = time.perf_counter() - started
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime

    row = {
        "runs": len(runs),
        "steps": options.steps,
        "rollouts a step": options.rollouts,
        "seconds": seconds,
        "CPU seconds": cpu,
        "peak memory, MiB": used.ru_maxrss / 1024,
        "page, MB": out.stat().st_size / 1e6,
    }
    show("A report", [row], options)


def write_run(
    path: Path, options: argparse.Namespace, *, seed: int, rollouts_of: Path | None
) -> None:
    """Writes a run directory. `rollouts_of`: a run whose files of rollouts it shares."""
    run = RunDirectory(path)
    run.rollouts(1).parent.mkdir(parents=True)
    config = {
        "trainer": {"steps": options.steps, "seed": seed, "run_dir": str(path)},
        "objective": {"name": "real", "tau": 0.5},
        "model": {"path": "model"},
    }
    run.config.write_text(yaml.safe_dump(config))
    run.status.write_text(json.dumps({"state": "finished", "reason": "", "time": "noon"}))
    draw = random.Random(seed)
    rows = [json.dumps(metrics_of(step, draw)) for step in range(1, options.steps + 1)]
    run.metrics.write_text("\n".join(rows) + "\n")

    opened = spaced(range(1, options.steps + 1), MAX_STEPS)
    for step in opened:
        if rollouts_of is None:
            write_step(run, step, options)
        else:
            os.link(RunDirectory(rollouts_of).rollouts(step), run.rollouts(step))
    # A report never opens these, but counts them.
    for step in set(range(1, options.steps + 1)) - set(opened):
        os.link(run.rollouts(opened[0]), run.rollouts(step))


def write_step(run: RunDirectory, step: int, options: argparse.Namespace) -> None:
    """Draws and writes the rollouts of a step."""
    rollouts = list(drawn(step, options))
    figures = [0.1] * len(rollouts)
    of_tokens = {}
    if options.token_weights:
        noise = numpy.random.default_rng(step)
        sizes = [len(rollout.completion.token_ids) for rollout in rollouts]
        for name in ("log_ratios", "token_weights"):
            of_tokens[name] = [noise.normal(size=size).astype(numpy.float32) for size in sizes]
    write_rollouts(
        run.rollouts(step),
        rollouts,
        step=step,
        scores=figures,
        weights=figures,
        token_figures=of_tokens,
    )


def drawn(step: int, options: argparse.Namespace) -> Iterator[Rollout]:
    """Rollouts in groups, of exponential lengths."""
    draw = numpy.random.default_rng(step)
    for number in range(options.rollouts):
        group, sample = divmod(number, GROUP)
        length = min(8192, 1 + int(draw.exponential(options.tokens)))
        words = draw.choice(WORDS, size=length)
        logprobs = -draw.exponential(0.5, size=length).astype(numpy.float32)
        completion = Completion(
            draw.integers(0, 150_000, size=length).astype(numpy.int32),
            logprobs,
            " ".join(words),
            True,
        )
        right = bool(draw.random() < 0.5)
        status = Status.OK if right else Status.WRONG
        prompt = Prompt(f"train/{group}", "What is 42 + 7? " * 8, (1, 2, 3) * 30, ("49",))
        yield Rollout(
            prompt,
            group,
            sample,
            completion,
            Verdict(status, Label(right), float(right)),
        )


def metrics_of(step: int, draw: random.Random) -> dict[str, Any]:
    """The row of a step: every curve that the report draws, as noisy as real ones,
    and the times of 8 ranks.
    """
    noisy = 1 - math.exp(-step / 300) + draw.gauss(0, 0.05)
    row: dict[str, Any] = {
        "step": step,
        **{name: noisy for name in CURVES if "heldout" not in name},
    }
    for stage in ("sync", "rollout", "label", "old_logprobs", "update", "report"):
        row[f"seconds/{stage}"] = 10 * draw.random()
        for which in ("min", "mean", "max"):
            row[f"rank_seconds/{stage}_{which}"] = 10 * draw.random()
        row[f"rank_seconds/{stage}_slowest"] = float(draw.randrange(8))
    return row | {"status/ok": 512.0, "status/wrong": 512.0}


def distinct_files(run: Path) -> list[Path]:
    """The files of rollouts that are no links to one another."""
    files = {file.stat().st_ino: file for file in (run / "rollouts").iterdir()}
    return list(files.values())


if __name__ == "__main__":
    main()
