"""What a rank does beside the model, which must not grow with ranks or steps: planning, prompts,
shares of engines.

    python tools/bench_bookkeeping.py
    # with the planner of an earlier commit beside today's
    python tools/bench_bookkeeping.py --before 37a47e0
    # with that many steps of a run of 64 ranks
    python tools/bench_bookkeeping.py --steps 10000

One process does what each rank of a run does alike. Lengths of answers are exponential with a mean
of 3,000 tokens, cut at 8,192, under a budget of 10,240; groups of 8. A plan with the planner of an
earlier commit is given up after --patience seconds.

Slow engines are simulated: the shares are the program's own, the clock is not. Each engine draws 8
prompts in groups of 8 and decodes 16 sequences at a time, a token of each in a unit of time; one
engine needs 4 units. Nothing is known of the lengths beforehand. The best possible is all tokens
over the engines' speeds, and not less than the longest answer takes.

The run of 64 ranks draws 32 prompts of 40,000 a step in groups of 8, shares them out, cuts
minibatches, plans, learns lengths, and takes the state that a checkpoint would save. Its memory and
its time a step must stay flat.
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing as mp
import random
import resource
import time
from pathlib import Path
from typing import Any

from bench_machine import add_options, apply_options, show
from earlier import module_at

from megatron_real.batching import Layout, minibatches, placement, plan
from megatron_real.objective import make_objective
from megatron_real.prompts import PromptCursor
from megatron_real.records import Completion, Label, Prompt, Rollout, Status, Verdict
from megatron_real.rollout.spread import (
    ExpectedLengths,
    begun_and_waiting,
    samples_together,
    spread,
)

MAX_TOKENS = 10240
GROUP = 8
AT_ONCE = 16
"""Sequences that a simulated engine decodes together."""
SIZES = ((256, 16), (1024, 64), (1024, 512), (16384, 512), (16384, 4096))
"""Rollouts of a plan, data-parallel ranks."""


def cost(length: int) -> float:
    """Of a sequence, about as a model of 1.5B computes it."""
    return length * (3e9 + 5e4 * length)


def drawn_lengths(count: int) -> list[int]:
    """Tokens of so many rollouts."""
    draw = random.Random(0)
    return [256 + min(8192, int(draw.expovariate(1 / 3000)) + 1) for _ in range(count)]


def timed_plan(module: Any, count: int, dp: int) -> tuple[float, float, str]:
    """Seconds of a plan, its estimate, and where groups lie."""
    lengths = drawn_lengths(count)
    groups = [i // GROUP for i in range(count)]
    layout = module.Layout(dp=dp, max_tokens=MAX_TOKENS)
    started = time.perf_counter()
    planned = module.plan(
        lengths, groups, layout=layout, placement="auto", needs_scores=True, cost=cost
    )
    return time.perf_counter() - started, planned.seconds, planned.placement


def patient_plan(module: Any, count: int, dp: int, patience: float) -> tuple[float, float] | None:
    """Seconds and estimate of a plan in a process of its own;
    None where it takes longer than `patience`.
    """
    # A process, since a planner that loops in Python cannot be interrupted from a thread.
    context = mp.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(timed_plan(module, count, dp)[:2]))
    process.start()
    answer: tuple[float, float] | None = None
    if ours.poll(patience):
        answer = ours.recv()
    process.kill()
    process.join()
    return answer


def plans(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each size."""
    before = None
    if options.before:
        before = module_at(options.before, "megatron_real/batching/placement.py")

    rows = []
    for count, dp in SIZES:
        rounds = [timed_plan(placement, count, dp) for _ in range(1 + options.rounds)]
        seconds, estimate, place = min(rounds[1:])
        row = {"rollouts": count, "DP": dp, "placement": place, "seconds": seconds}
        if before is not None:
            earlier = patient_plan(before, count, dp, options.patience)
            if earlier is None:
                row |= {"before, seconds": f"over {options.patience:.0f}", "plan / before": "-"}
            else:
                earlier_seconds, earlier_estimate = earlier
                row["before, seconds"] = earlier_seconds
                row["plan / before"] = estimate / earlier_estimate
        rows.append(row)
    return rows


def made_prompts(count: int) -> list[Prompt]:
    """Prompts of 128 tokens."""
    return [Prompt(f"p/{i}", "", tuple(range(i, i + 128)), (str(i),)) for i in range(count)]


def cursors(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of the prompts' order, at two sizes of the data."""
    rows = []
    for count in options.prompts:
        prompts = made_prompts(count)
        started = time.perf_counter()
        cursor = PromptCursor(prompts, seed=0)
        built = time.perf_counter() - started

        started = time.perf_counter()
        for _ in range(100):
            cursor.next_batch(8)
            cursor.peek(8)
            cursor.state_dict()
        each = (time.perf_counter() - started) / 100
        rows.append(
            {"prompts": count, "start, seconds": built, "draw, peek and save, ms": 1e3 * each}
        )
    return rows


def step_time(
    begun: list[list[int]], waiting: list[int], tokens: list[list[int]], slowness: list[float]
) -> float:
    """When the last answer ends.

    Args:
        begun: [engine] the prompts that no other engine gets.
        waiting: those for whichever engine has room; it is emptied.
        tokens: [prompt] of each of its answers.
        slowness: [engine] time of a token.
    """
    left = [[n for i in prompts for n in tokens[i]] for prompts in begun]
    # Of every place in which an engine decodes a sequence: when it is free.
    free = [(0.0, engine) for engine in range(len(begun)) for _ in range(AT_ONCE)]
    ended = 0.0
    while free:
        now, engine = heapq.heappop(free)
        if not left[engine] and waiting:
            left[engine] = list(tokens[waiting.pop(0)])
        if left[engine]:
            end = now + left[engine].pop(0) * slowness[engine]
            ended = max(ended, end)
            heapq.heappush(free, (end, engine))
    return ended


def slow_engines(slow: float) -> list[dict[str, Any]]:
    """How long a step takes with one slow engine, in the time that it takes without one."""
    rows = []
    for engines in (2, 8, 64, 512):
        lengths = drawn_lengths(8 * engines * GROUP)
        tokens = [lengths[i : i + GROUP] for i in range(0, len(lengths), GROUP)]
        costs = ExpectedLengths().costs(made_prompts(len(tokens)), GROUP)
        shares = spread(costs, engines)

        usual = [1.0] * engines
        one_slow = [1.0] * (engines - 1) + [slow]
        undisturbed = step_time(shares, [], tokens, usual)
        kept = step_time(shares, [], tokens, one_slow)
        begun, waiting = begun_and_waiting(shares, costs, AT_ONCE // GROUP)
        taken = step_time(begun, list(waiting), tokens, one_slow)
        taken_usual = step_time(begun, list(waiting), tokens, usual)
        # No schedule beats the engines' speeds together, nor the longest answer on a usual one.
        speed = sum(AT_ONCE / slowness for slowness in one_slow)
        best = max(sum(lengths) / speed, max(lengths))
        rows.append(
            {
                "engines": engines,
                "prompts": len(tokens),
                "each its share": kept / undisturbed,
                "taken over": taken / undisturbed,
                "taken over, none slow": taken_usual / undisturbed,
                "best possible": best / undisturbed,
                "taken over / share": taken / kept,
            }
        )
    return rows


class Bookkeeping:
    """A run's steps without engines and model."""

    def __init__(self, *, ranks: int, prompts: int = 40_000, num_prompts: int = 32) -> None:
        self.cursor = PromptCursor(made_prompts(prompts), seed=0)
        self.lengths = ExpectedLengths()
        self.ranks = ranks
        self.num_prompts = num_prompts
        self.objective = make_objective("real")
        self.draw = random.Random(0)
        self.completions = [Completion((5,) * n, (0.0,) * n, "", True) for n in range(1, 65)]
        """Shared: the tokens themselves are not what is measured."""

    def step(self) -> int:
        """One step; returns the micro-batches of a rank."""
        prompts = self.cursor.next_batch(self.num_prompts)
        together = samples_together(len(prompts), GROUP, self.ranks)
        parts = [prompt for prompt in prompts for _ in range(GROUP // together)]
        assert len(spread(self.lengths.costs(parts, together), self.ranks)) == self.ranks

        rollouts: list[Rollout] = []
        for i, prompt in enumerate(prompts):
            for k in range(GROUP):
                completion = self.draw.choice(self.completions)
                label = Label(self.draw.randint(0, 1))
                verdict = Verdict(Status.OK, label, float(label))
                rollouts.append(Rollout(prompt, i, k, completion, verdict))
        self.lengths.learn(rollouts)

        (minibatch,) = minibatches(rollouts, self.objective, groups_per_minibatch=len(prompts))
        planned = plan(
            [rollouts[i].num_tokens for i in minibatch.kept],
            [rollouts[i].group for i in minibatch.kept],
            layout=Layout(dp=self.ranks, max_tokens=256),
            placement="auto",
            needs_scores=True,
        )

        # What a checkpoint would save.
        self.cursor.peek(self.num_prompts)
        self.cursor.state_dict()
        self.lengths.state_dict()
        return len(planned.micro_batches[0])


def resident_mib() -> float:
    """Of this process, now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def simulated(steps: int) -> list[dict[str, Any]]:
    """Memory and time of a tenth of the steps at a time, of a run of 64 ranks."""
    run = Bookkeeping(ranks=64)
    rows = []
    for tenth in range(10):
        clock = time.process_time()
        for _ in range(steps // 10):
            run.step()
        each = (time.process_time() - clock) / (steps // 10)
        done = (tenth + 1) * (steps // 10)
        rows.append({"steps": done, "ms a step": 1e3 * each, "resident MiB": resident_mib()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", default="", help="a commit whose planner is measured too")
    parser.add_argument("--patience", type=float, default=60, help="seconds for each of its plans")
    parser.add_argument("--prompts", type=int, nargs="+", default=[40_000, 400_000])
    parser.add_argument("--slow", type=float, default=4, help="how much slower the slow engine is")
    parser.add_argument("--steps", type=int, default=0, help="steps of the run of 64 ranks")
    add_options(parser, rounds=3)
    options = parser.parse_args()
    apply_options(options)
    show("One plan, seconds", plans(options), options)
    show("The order of the prompts", cursors(options), options)
    show(
        f"A step with one engine {options.slow:g} times slower, in the time of one without",
        slow_engines(options.slow),
        options,
    )
    if options.steps:
        show("Steps of 64 ranks", simulated(options.steps), options)


if __name__ == "__main__":
    main()
