"""Checks per second of a verifier on 1 worker, and on more of them as a ratio to that,
side by side in one run.

    python tools/bench_labels.py [--workers 1 2] [--checks 1024] [--verifier math_verify]

The completions are as long as reasoning is (4,000 words before the answer); half of them are right.
Rounds alternate between the pools, and the median counts, so that other load on the machine hits
all of them alike.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from bench_machine import add_result_options, show

from megatron_real.labels.pool import Check, VerifierPool

FORMS = (
    "{}",
    "{}.0",
    "x = {}",
    "\\frac{{{}}}{{7}}",
    "\\sqrt{{{}}}",
    "{} \\text{{ cm}}",
    "({}, 3)",
    "\\frac{{{}\\pi}}{{2}}",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--checks", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--verifier", default="math_verify")
    add_result_options(parser)
    options = parser.parse_args()
    checks = honest_checks(options.checks)
    pools = [
        VerifierPool(options.verifier, workers=n, timeout_seconds=10, memory_mib=1024)
        for n in options.workers
    ]
    seconds: list[list[float]] = [[] for _ in pools]
    for number in range(options.rounds + 1):
        for pool, seconds_of_pool in zip(pools, seconds, strict=True):
            started = time.monotonic()
            pool.run(checks)
            if number:  # the first round warms up
                seconds_of_pool.append(time.monotonic() - started)

    base = statistics.median(seconds[0])
    rows = []
    for workers, pool, seconds_of_pool in zip(options.workers, pools, seconds, strict=True):
        median = statistics.median(seconds_of_pool)
        rows.append(
            {"workers": workers, "checks/s": len(checks) / median, "x the first": base / median}
        )
        pool.close()
    show(f"{options.verifier}, {len(checks)} checks", rows, options)


def honest_checks(count: int) -> list[Check]:
    draw = random.Random(0)
    thinking = "so it goes " * 1333
    checks = []
    for i in range(count):
        form = draw.choice(FORMS)
        answer = form.format(i + draw.randrange(2))
        checks.append(Check(f"<think>{thinking}</think> \\boxed{{{answer}}}", [form.format(i)]))
    return checks


if __name__ == "__main__":
    main()
