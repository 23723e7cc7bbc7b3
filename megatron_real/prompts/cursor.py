"""The order in which prompts are drawn, resumable in the middle of an epoch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_real.records import Prompt

_DIGEST_LETTERS = 8  # 32 bits a prompt: a change goes unseen with a chance of 1 in 4 billion


@dataclass(frozen=True)
class Digests:
    """What tells whether prompts are those of an earlier life: 8 letters for each, in order."""

    questions: str
    """Of the prompts' tokens."""
    answers: str
    """Of their gold answers."""

    @classmethod
    def of(cls, prompts: Sequence[Prompt]) -> Digests:
        """Makes them: 20 to 70 microseconds a prompt."""
        return cls(
            _digests(prompt.token_ids for prompt in prompts),
            _digests(prompt.answers for prompt in prompts),
        )


class PromptCursor:
    """Draws prompts epoch by epoch; epoch e is a permutation that depends on the seed and e alone.

    Example:
        cursor = PromptCursor(prompts, seed=1)
        batch = cursor.next_batch(128)  # may straddle two epochs
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        seed: int,
        shuffle: bool = True,
        digests: Digests | None = None,
    ) -> None:
        """Begins the first epoch.

        Args:
            prompts: [1..] what is drawn.
            seed: of the permutations.
            shuffle: else the prompts keep their order in every epoch.
            digests: of the prompts, where another rank has made them already.
        """
        self._prompts = prompts
        self._seed = seed
        self._shuffle = shuffle
        self._digests = digests or Digests.of(prompts)
        # Of the next prompt: its epoch, and its place in the order of that epoch.
        self.epoch = 0
        self.position = 0
        self._order = self._permutation()

    def next_batch(self, size: int) -> list[Prompt]:
        """Returns the next `size` prompts."""
        batch: list[Prompt] = []
        while len(batch) < size:
            # An epoch may end in the middle of a batch.
            if self.position == len(self._prompts):
                self.epoch += 1
                self.position = 0
                self._order = self._permutation()
            indices = self._order[self.position : self.position + size - len(batch)]
            batch += [self._prompts[i] for i in indices]
            self.position += len(indices)
        return batch

    def peek(self, size: int) -> list[Prompt]:
        """Returns the prompts that `next_batch` will give; they stay the next."""
        # The three that next_batch changes.
        epoch = self.epoch
        position = self.position
        order = self._order
        batch = self.next_batch(size)
        self.epoch = epoch
        self.position = position
        self._order = order
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns what `load_state_dict` needs to go on from here."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self._seed,
            "questions": self._digests.questions,
            "answers": self._digests.answers,
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
        # Another seed would draw another order, and prompts of this epoch a second time.
        if state["seed"] != self._seed:
            raise ValueError(
                f"the saved prompt order has seed {state['seed']}, this run has {self._seed}; "
                f"set trainer.seed={state['seed']}"
            )
        if "questions" not in state:
            raise ValueError(
                "the saved prompt order is of an earlier version of this program, which did not "
                "say what the prompts were; go on with that version, or give another "
                "trainer.run_dir"
            )

        # Digests stand one after the other: the length says how many prompts there were.
        num_saved = len(state["questions"]) // _DIGEST_LETTERS
        if num_saved != len(self._prompts):
            raise ValueError(
                f"the saved prompt order is of {num_saved} prompts, and data.train now has "
                f"{len(self._prompts)} that data.max_prompt_tokens lets through; use the same data"
            )

        changed = self._changed(state["questions"], self._digests.questions)
        if changed:
            raise ValueError(
                f"the saved prompt order is of other prompts: the tokens of {changed} have "
                "changed; use the same data in the same order, and the same data.suffix, tokenizer "
                "and chat template"
            )

        self.epoch = state["epoch"]
        self.position = state["position"]
        self._order = self._permutation()

        # Corrected answers leave the order as it is: they are worth a sentence, not a refusal.
        changed = self._changed(state["answers"], self._digests.answers)
        if not changed:
            return []
        return [f"the gold answers of {changed} have changed"]

    def _changed(self, before: str, now: str) -> str:
        """Returns the first prompt whose digest differs, and how many do; "" where none does."""
        changed: list[int] = []
        for i in range(len(self._prompts)):
            digest = slice(i * _DIGEST_LETTERS, (i + 1) * _DIGEST_LETTERS)
            if before[digest] != now[digest]:
                changed.append(i)

        if not changed:
            return ""
        first = self._prompts[changed[0]].uid
        if len(changed) == 1:
            return first
        return f"{len(changed)} of {len(self._prompts)} prompts (the first of them is {first})"

    def _permutation(self) -> list[int]:
        """Returns [prompts] the order of this epoch, from nothing but the seed and its number."""
        order = list(range(len(self._prompts)))
        # A text as seed: Random hashes it, so that neighbouring seeds and epochs share nothing.
        if self._shuffle:
            random.Random(f"{self._seed}-{self.epoch}").shuffle(order)
        return order


def _digests(values: Iterable[tuple[Any, ...]]) -> str:
    """Returns a digest of each value, one after the other."""
    digests: list[str] = []
    for value in values:
        # surrogatepass: an answer may hold half a surrogate pair, and its digest must not fail.
        text = repr(value).encode("utf-8", "surrogatepass")
        # A byte is two hexadecimal letters.
        digests.append(hashlib.blake2b(text, digest_size=_DIGEST_LETTERS // 2).hexdigest())
    return "".join(digests)
