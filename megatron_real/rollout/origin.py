"""What a draw of rollouts depends on, written beside the rollouts.

Rollouts are used again only where all of it is the same. A file on disk cannot be judged by the
run's configuration, which somebody may have rewritten since. So the file itself says which weights
drew its rollouts, by which settings, for which prompts and answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from megatron_real.records import Prompt
from megatron_real.rollout.checksum import checksum


@dataclass(frozen=True)
class Origin:
    """What some rollouts were drawn under.

    Equal origins give the same rollouts, as far as the engine repeats itself.
    """

    weights: str
    """Digest of every tensor of the policy that generated them, the same on any layout."""
    questions: str
    """Digest of the prompts' tokens, in order."""
    answers: str
    """Digest of their gold answers, in order."""
    seed: int
    """Seed of the draw."""
    settings: Mapping[str, Any]
    """Every setting that sampling and labels depend on, by its name in the configuration.

    The values are plain JSON.
    """

    def differences(self, now: Origin) -> list[str]:
        """Says in words what is different `now`; empty where nothing is."""
        sentences = {
            "weights": "the policy's weights have changed",
            "questions": "the prompts have changed",
            "answers": "gold answers have changed",
            "seed": "the draw has another seed",
        }

        # The long values are digests, which say nothing to a reader: a sentence stands for each.
        changed = [
            sentence
            for name, sentence in sentences.items()
            if getattr(self, name) != getattr(now, name)
        ]

        for name in {**self.settings, **now.settings}:
            before = self.settings.get(name)
            after = now.settings.get(name)
            if before != after:
                changed.append(f"{name} was {before!r} and is {after!r}")

        return changed

    def to_plain(self) -> dict[str, Any]:
        """Returns the record as values that JSON takes."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Origin:
        """Reads what `to_plain` returned.

        Raises:
            ValueError: `values` are something else.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"it does not say what it was drawn under ({error})") from error


def digest_of_questions(prompts: Sequence[Prompt]) -> str:
    """Returns a digest of the tokens of each prompt, in order.

    The prompts' names (`uid`) do not count.
    """
    return _digest(prompt.token_ids for prompt in prompts)


def digest_of_answers(prompts: Sequence[Prompt]) -> str:
    """Returns a digest of the gold answers of each prompt, in order."""
    return _digest(prompt.answers for prompt in prompts)


def _digest(values: Iterable[tuple[Any, ...]]) -> str:
    digest = hashlib.sha256()
    for value in values:
        # An answer may hold half of a surrogate pair, which strict UTF-8 would refuse.
        # repr, as it tells 1 from "1" and keeps the bounds between values.
        digest.update(repr(value).encode("utf-8", "surrogatepass"))
    # 16 hexadecimal digits are 64 bits: enough to tell draws apart.
    return digest.hexdigest()[:16]


class WeightsDigest:
    """Passes a stream of HF tensors on, and knows its digest once it has ended.

    Example:
        weights = WeightsDigest(policy.stream())
        sync.run(weights, policy.mismatch)
        weights.hexdigest()
    """

    def __init__(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        self._stream = stream
        self._tensors: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._stream:
            # With dtype and shape, since equal bits may be other numbers.
            self._tensors[name] = f"{tensor.dtype} {tuple(tensor.shape)} {checksum(tensor)}"
            yield name, tensor

    def hexdigest(self) -> str:
        """Returns the digest of all tensors that have passed.

        Their order does not count, because it depends on the layout.
        """
        return _digest(sorted(self._tensors.items()))
