"""The rollouts of a step, generated chunk by chunk and kept on disk as soon as a chunk is whole.

A chunk is a run of the step's prompts. What it samples depends on the run's seed, the step and its prompts alone, so a
resumed step samples the missing chunks only, and they come out the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from megatron_real.records import Prompt, Rollout, Sampling
from megatron_real.rollout import RolloutStage
from megatron_real.runs.ranks import Ranks
from megatron_real.runs.reporter import Reporter
from megatron_real.runs.rollouts import read_rollouts, write_rollouts


def kept_rollouts(reporter: Reporter, ranks: Ranks, step: int, prompts: Sequence[Prompt]) -> list[Rollout] | None:
    """The step's rollouts where an earlier life of this run has them all, else None. Collective.

    Raises:
        ValueError: they answer other prompts.
    """
    file = reporter.directory.rollouts(step)
    if not ranks.shared(file.exists()):
        return None
    rollouts = read_rollouts(file)
    if {r.group: r.prompt.uid for r in rollouts} != {i: p.uid for i, p in enumerate(prompts)}:
        raise ValueError(
            f"{file} answers other prompts than step {step} asks; delete it and start the same command again"
        )
    reporter.progress.say(f"step {step}: its rollouts are on disk and are not sampled again")
    return rollouts


def sampled_rollouts(
    stage: RolloutStage,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    step: int,
    seed: int,
    chunk_prompts: int,
    reporter: Reporter,
    ranks: Ranks,
    seam: Callable[[], None],
) -> list[Rollout]:
    """Samples and labels a step's rollouts. Collective.

    Args:
        chunk_prompts: prompts of a chunk; 0: all.
        seam: called after each chunk; may end the run by an exception.
    """
    timed, rollouts = reporter.progress.stage, []
    for first in range(0, len(prompts), chunk_prompts or len(prompts)):
        chunk, file = prompts[first : first + (chunk_prompts or len(prompts))], reporter.directory.chunk(step, first)
        if ranks.shared(file.exists()):
            rollouts += read_rollouts(file)
            continue
        with timed("rollout"):
            sampled = stage.generate(chunk, sampling, seed=seed + first)
        with timed("label"):
            done = [dataclasses.replace(r, group=first + r.group) for r in stage.label(chunk, sampled)]
        rollouts += done
        if chunk_prompts:
            if ranks.first:
                write_rollouts(file, done, step=step)
            seam()
    return rollouts
