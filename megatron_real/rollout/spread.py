"""Which engine answers which prompt.

Prompts are dealt out by the expected length of their answers, so that all engines end at about the
same time.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_real.records import Prompt, Rollout, Status


def spread(costs: Sequence[float], engines: int) -> list[list[int]]:
    """Deals out positions, the most expensive first, each to the engine with the least cost so far.

    Returns:
        [engine] the positions that it takes, in order.

    Example: costs 5, 1, 4, 1 over two engines -> [[0, 3], [1, 2]]
    """
    shares: list[list[int]] = [[] for _ in range(engines)]
    # (cost, number of prompts, engine): at equal cost the engine with fewer prompts comes first, so
    # prompts of unknown length are dealt out evenly.
    loads = [(0.0, 0, engine) for engine in range(engines)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, count, engine = heapq.heappop(loads)
        shares[engine].append(i)
        heapq.heappush(loads, (load + costs[i], count + 1, engine))
    return [sorted(share) for share in shares]


def begun_and_waiting(
    shares: Sequence[Sequence[int]], costs: Sequence[float], at_once: int
) -> tuple[list[list[int]], list[int]]:
    """Splits shares into what each engine begins with, and what waits for an engine with room.

    Args:
        shares: [engine] positions, as `spread` deals them out.
        costs: of each position.
        at_once: positions that an engine computes at the same time.

    Returns:
        [engine] the positions that it begins with, in order: its most expensive ones. And all
        others, the most expensive first, because what begins last should not be long.

    Example: shares [0, 1, 2], [3] of costs 5, 1, 4, 2, two at once -> [[0, 2], [3]] and [1]
    """
    begun: list[list[int]] = []
    waiting: list[int] = []
    for share in shares:
        longest_first = sorted(share, key=lambda i: (-costs[i], i))
        begun.append(sorted(longest_first[:at_once]))
        waiting += longest_first[at_once:]
    return begun, sorted(waiting, key=lambda i: (-costs[i], i))


def samples_together(num_prompts: int, num_samples: int, engines: int) -> int:
    """Returns how many of a prompt's `num_samples` samples one engine draws.

    It draws all of them, unless engines would then be idle. Samples that stay together share the
    prefill of their prompt, and a step ends with its longest answer, which no spreading makes
    shorter. So a group is cut only where there are fewer prompts than engines: into equal parts, as
    few as give every engine one.

    Example: 128 prompts x 8 samples over 512 engines -> 2
    """
    # The fewest parts first: each one computes the prompt again.
    for num_parts in range(1, num_samples + 1):
        if num_samples % num_parts == 0 and num_prompts * num_parts >= engines:
            return num_samples // num_parts
    return 1


class ExpectedLengths:
    """How long the answers to a prompt were last time.

    It is the same on every rank, because every rank knows all rollouts' lengths.
    """

    def __init__(self) -> None:
        self.of: dict[str, float] = {}
        """Mean response tokens by the prompt's uid."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state that `load_state_dict` restores."""
        return {"of": dict(self.of)}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Restores a saved state. Any state fits, so there is no difference to name."""
        self.of = dict(state["of"])
        return []

    def costs(self, prompts: Sequence[Prompt], num_samples: int) -> list[float]:
        """Returns the number of tokens that each prompt and its answers are expected to take.

        An unknown prompt is expected to get answers of the known prompts' mean length.
        """
        # Any number: while no length is known all prompts are alike.
        mean = 1.0
        if self.of:
            mean = sum(self.of.values()) / len(self.of)
        return [len(p.token_ids) + num_samples * self.of.get(p.uid, mean) for p in prompts]

    def learn(self, rollouts: Sequence[Rollout]) -> None:
        """Remembers the lengths of these rollouts.

        A lost completion does not count: its length is unknown, and was perhaps the longest.
        """
        # A prompt may be in a step twice: its answers are one sample of the same length.
        lengths: dict[str, list[int]] = {}
        for rollout in rollouts:
            if rollout.verdict.status != Status.LOST:
                lengths.setdefault(rollout.prompt.uid, []).append(rollout.completion.num_trained)
        for uid, trained in lengths.items():
            self.of[uid] = sum(trained) / len(trained)


def prompt_seed(seed: int, attempt: int, place: tuple[int, int], prompt: Prompt) -> int:
    """Returns the seed of a prompt's answers, in 63 bits. It does not depend on the engine.

    Args:
        seed: seed of the draw.
        attempt: how often an engine has lost the answer; 0 at first.
        place: (group, sample) of the first answer.
        prompt: the prompt, of which the uid counts.
    """
    # Not hash(), which differs from process to process.
    text = f"{seed} {attempt} {place} {prompt.uid}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
