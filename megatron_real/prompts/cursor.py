"""The order in which prompts are drawn, resumable in the middle of an epoch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from megatron_real.records import Prompt


class PromptCursor:
    """Draws prompts epoch by epoch; epoch e is a permutation that depends on the seed and e alone.

    Example:
        cursor = PromptCursor(prompts, seed=1)
        batch = cursor.next_batch(128)  # may straddle two epochs
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self.epoch = self.position = 0
        self._order = self._permutation()

    def next_batch(self, size: int) -> list[Prompt]:
        """The next `size` prompts."""
        batch: list[Prompt] = []
        while len(batch) < size:
            if self.position == len(self._prompts):
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._permutation()
            taken = self._order[self.position : self.position + size - len(batch)]
            batch += [self._prompts[i] for i in taken]
            self.position += len(taken)
        return batch

    def peek(self, size: int) -> list[Prompt]:
        """The prompts that `next_batch` will give; they stay the next."""
        at = self.state_dict()
        batch = self.next_batch(size)
        self.load_state_dict(at)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here."""
        return {"epoch": self.epoch, "position": self.position, "seed": self._seed, "fingerprint": self.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state.

        Raises:
            ValueError: the state belongs to other prompts or another seed.
        """
        for name, mine in (("seed", self._seed), ("fingerprint", self.fingerprint)):
            if state[name] != mine:
                raise ValueError(
                    f"the saved prompt order has {name} {state[name]}, this run has {mine}; use the same data"
                )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._permutation()

    @property
    def fingerprint(self) -> str:
        """Identity of the prompts: a digest of their tokens."""
        digest = hashlib.sha256()
        for prompt in self._prompts:
            digest.update(repr((prompt.uid, prompt.token_ids)).encode())
        return digest.hexdigest()[:16]

    def _permutation(self) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"{self._seed}-{self.epoch}").shuffle(order)
        return order
