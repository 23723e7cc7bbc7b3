"""Which engine answers which prompt: by expected length, so that all engines end at about the same time."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_real.records import Prompt, Rollout, Status


def spread(costs: Sequence[float], engines: int) -> list[list[int]]:
    """[engine] the positions it takes, in order: the most expensive first, each to the engine with the least so far.

    Example: costs 5, 1, 4, 1 over two engines -> [[0, 3], [1, 2]]
    """
    shares: list[list[int]] = [[] for _ in range(engines)]
    # At equal cost, the engine with fewer prompts, then the first: prompts of unknown length are dealt out evenly.
    loads = [(0.0, 0, engine) for engine in range(engines)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, count, engine = heapq.heappop(loads)
        shares[engine].append(i)
        heapq.heappush(loads, (load + costs[i], count + 1, engine))
    return [sorted(share) for share in shares]


def samples_together(num_prompts: int, num_samples: int, engines: int) -> int:
    """How many samples of a prompt one engine draws, out of `num_samples`: all, unless engines would then be idle.

    Samples that stay together share the prefill of their prompt. A step ends with its longest answer, which no
    spreading makes shorter, so a group is cut only where there are fewer prompts than engines: into equal parts, as
    few as give every engine one.

    Example: 128 prompts x 8 samples over 512 engines -> 2
    """
    parts = (p for p in range(1, num_samples + 1) if num_samples % p == 0)
    enough = next((p for p in parts if num_prompts * p >= engines), num_samples)
    return num_samples // enough


class ExpectedLengths:
    """How long the answers to a prompt were last time. The same on every rank, since all know all rollouts."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}
        """Mean response tokens by the prompt's uid."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here."""
        return {"of": dict(self.of)}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Goes on from a saved state; any state fits, so there is no difference to name."""
        self.of = dict(state["of"])
        return []

    def costs(self, prompts: Sequence[Prompt], num_samples: int) -> list[float]:
        """Tokens that each prompt is expected to take; an unknown prompt answers as long as the known ones do."""
        mean = sum(self.of.values()) / len(self.of) if self.of else 1.0
        return [len(p.token_ids) + num_samples * self.of.get(p.uid, mean) for p in prompts]

    def learn(self, rollouts: Sequence[Rollout]) -> None:
        """Remembers the lengths of these rollouts; what was lost has none, and was perhaps the longest."""
        lengths: dict[str, list[int]] = {}
        for rollout in rollouts:
            if rollout.verdict.status != Status.LOST:
                lengths.setdefault(rollout.prompt.uid, []).append(rollout.completion.num_trained)
        self.of |= {uid: sum(found) / len(found) for uid, found in lengths.items()}


def prompt_seed(seed: int, attempt: int, place: tuple[int, int], prompt: Prompt) -> int:
    """Seed of a prompt's answers in 63 bits, whichever engine gives them.

    Args:
        seed: of the draw.
        attempt: 0, or how often an engine has lost the answer.
        place: (group, sample) of the first answer.
        prompt: its uid counts.
    """
    digest = hashlib.blake2b(
        f"{seed} {attempt} {place} {prompt.uid}".encode(), digest_size=8
    ).digest()
    return int.from_bytes(digest, "little") >> 1
