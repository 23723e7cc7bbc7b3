"""The rollouts of a step, drawn chunk by chunk; a whole chunk is kept on disk and never drawn again.

A chunk is a run of a draw's prompts. What it draws depends on the run's seed, the step, the draw and its prompts: a
step that is taken up draws the missing chunks only, and its refills ask for the same prompts as before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_real.prompts import PromptCursor
from megatron_real.records import Prompt, Rollout
from megatron_real.rollout.spread import ExpectedLengths
from megatron_real.runs.ranks import Ranks
from megatron_real.runs.reporter import Reporter
from megatron_real.runs.rollouts import read_rollouts, write_rollouts


@dataclass(frozen=True)
class Draws:
    """The draws of one step. Every rank makes them together."""

    step: int
    """Number of the step."""
    cursor: PromptCursor
    """Where prompts come from."""
    lengths: ExpectedLengths
    """Learns from chunks that are read instead of sampled."""
    sample: Callable[[Sequence[Prompt], int, int], list[Rollout]]
    """Labelled rollouts of some prompts, for the draw of that number and its first prompt."""
    chunk_prompts: int
    """Prompts of a chunk; 0: all of a draw."""
    reuse: bool
    """Whether chunks on disk are still good: not when the weights that generated them may be gone."""
    reporter: Reporter
    """Knows where chunks are kept."""
    ranks: Ranks
    """All processes of the job."""
    seam: Callable[[], None]
    """Called after each chunk; may end the run by an exception."""

    def draw(self, num_prompts: int, number: int) -> list[Rollout]:
        """Draw `number` of the step: the labelled rollouts of so many fresh prompts.

        Raises:
            ValueError: a kept chunk answers other prompts.
        """
        prompts = self.cursor.next_batch(num_prompts)
        size = self.chunk_prompts or num_prompts
        return [
            dataclasses.replace(rollout, group=first + rollout.group)
            for first in range(0, num_prompts, size)
            for rollout in self._chunk(prompts[first : first + size], number, first)
        ]

    def _chunk(self, prompts: Sequence[Prompt], number: int, first: int) -> list[Rollout]:
        file = self.reporter.directory.chunk(self.step, number, first)
        if self.reuse and self.ranks.shared(file.exists()):
            return self._kept(file, prompts)
        rollouts = self.sample(prompts, number, first)
        if self.ranks.first:
            write_rollouts(file, rollouts, step=self.step)
        self.seam()
        return rollouts

    def _kept(self, file: Path, prompts: Sequence[Prompt]) -> list[Rollout]:
        rollouts = read_rollouts(file)
        if {r.group: r.prompt.uid for r in rollouts} != {i: p.uid for i, p in enumerate(prompts)}:
            raise ValueError(
                f"{file} answers other prompts than step {self.step} asks; delete it and start the same command again"
            )
        self.reporter.progress.say(f"step {self.step}: {len(rollouts)} rollouts are on disk and not sampled again")
        self.lengths.learn(rollouts)
        return rollouts
