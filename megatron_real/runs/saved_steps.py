"""The rollouts of an earlier run, for a replay: each one is read by one rank.

    prompts     every rank reads them, a column each
    the rest    a file's row groups (512 rollouts) are dealt to the ranks, one node after the other;
                the others learn lengths, status, label and reward (exchange.py)

So a rank reads what it holds. The tokens go to the ranks that train on them as those of fresh
rollouts do.
"""

from __future__ import annotations

import dataclasses

from megatron_real.parallel.exchange import Exchange
from megatron_real.parallel.ranks import Ranks
from megatron_real.records import Rollout
from megatron_real.runs.columns import Questions
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import portions, read_prompts, read_rollouts


class SavedSteps:
    """Reads the steps of one run directory, on all ranks together."""

    def __init__(self, directory: RunDirectory, ranks: Ranks, exchange: Exchange) -> None:
        self._directory = directory
        self._ranks = ranks
        self._exchange = exchange

    def read(self, step: int) -> list[Rollout]:
        """Returns the rollouts of a step, in order of group and sample. Collective.

        They are the same on every rank but for the completions that other ranks hold.

        Raises:
            EveryRankError: a file, which the message names, is missing or damaged.
        """
        file = self._directory.saved_rollouts(step)
        if file.suffix == ".jsonl":
            # An earlier version's: a file of lines is read as a whole.
            return self._exchange.keep_own(self._ranks.together(lambda: read_rollouts(file)))

        exchange = self._exchange
        own: list[Rollout] = []

        def read() -> Questions:
            # Portions go to the first ranks of all nodes, then to the second ones, and so on: every
            # node's link to the file system carries a part of the file.
            for number, portion in enumerate(portions(file)):
                local, node = divmod(number % self._ranks.world, exchange.num_nodes)
                if node * exchange.ranks_per_node + local == self._ranks.rank:
                    own.extend(portion.read())
            return read_prompts(file)

        questions = self._ranks.together(read)
        rollouts = exchange.share(own, questions.prompts)
        # Refills are known to the file of prompts alone; `share` has sent the rest.
        return [dataclasses.replace(r, refills=questions.refills[r.group]) for r in rollouts]
