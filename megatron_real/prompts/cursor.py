"""The order in which prompts are drawn, resumable in the middle of an epoch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_real.records import Prompt

_DIGEST_LETTERS = 8  # 32 bits a prompt: a change goes unseen with a chance of 1 in 4 billion


class PromptCursor:
    """Draws prompts epoch by epoch; epoch e is a permutation that depends on the seed and e alone.

    Example:
        cursor = PromptCursor(prompts, seed=1)
        batch = cursor.next_batch(128)  # may straddle two epochs
    """

    def __init__(self, prompts: Sequence[Prompt], *, seed: int, shuffle: bool = True) -> None:
        self._prompts, self._seed, self._shuffle = prompts, seed, shuffle
        self._questions = _digests(prompt.token_ids for prompt in prompts)
        self._answers = _digests(prompt.answers for prompt in prompts)
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
        epoch, position, order = self.epoch, self.position, self._order
        batch = self.next_batch(size)
        self.epoch, self.position, self._order = epoch, position, order
        return batch

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self._seed,
            "questions": self._questions,
            "answers": self._answers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Goes on from a saved state.

        Returns:
            What is different about the prompts without changing their order: a sentence for each
            kind of difference.

        Raises:
            ValueError: the state belongs to another seed, or to prompts with other tokens or in
                another order.
        """
        if state["seed"] != self._seed:
            raise ValueError(
                f"the saved prompt order has seed {state['seed']}, this run has {self._seed}; "
                f"set trainer.seed={state['seed']}"
            )
        if "questions" not in state:
            raise ValueError(
                "the saved prompt order is of an earlier version of this program, which did not say what the prompts "
                "were; go on with that version, or give another trainer.run_dir"
            )
        saved = len(state["questions"]) // _DIGEST_LETTERS
        if saved != len(self._prompts):
            raise ValueError(
                f"the saved prompt order is of {saved} prompts, and data.train now has {len(self._prompts)} that "
                "data.max_prompt_tokens lets through; use the same data"
            )
        if changed := self._changed(state["questions"], self._questions):
            raise ValueError(
                f"the saved prompt order is of other prompts: the tokens of {changed} have changed; use the same data "
                "in the same order, and the same data.suffix, tokenizer and chat template"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._permutation()
        changed = self._changed(state["answers"], self._answers)
        return [f"the gold answers of {changed} have changed"] if changed else []

    def _changed(self, before: str, now: str) -> str:
        """The first prompt whose digest differs, and how many do; "" where none does."""
        size = _DIGEST_LETTERS
        different = [
            i
            for i in range(len(self._prompts))
            if before[i * size : (i + 1) * size] != now[i * size : (i + 1) * size]
        ]
        if not different:
            return ""
        first = self._prompts[different[0]].uid
        if len(different) == 1:
            return first
        return f"{len(different)} of {len(self._prompts)} prompts (the first of them is {first})"

    def _permutation(self) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"{self._seed}-{self.epoch}").shuffle(order)
        return order


def _digests(values: Iterable[tuple[Any, ...]]) -> str:
    """A digest of each value, one after the other."""
    size = _DIGEST_LETTERS // 2
    return "".join(
        hashlib.blake2b(repr(value).encode("utf-8", "surrogatepass"), digest_size=size).hexdigest()
        for value in values
    )
