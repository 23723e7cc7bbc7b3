"""What a rollout engine does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from megatron_real.records import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Held:
    """One HF tensor in the memory of an engine's rank."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    part: tuple[slice, ...]
    """What of it this rank holds."""
    tensor: Tensor
    """That part: the memory that the engine computes with, not a copy."""


class Engine(Protocol):
    """Samples completions under weights that it is given. `tp` neighbouring ranks make up one engine.

    Example:
        engine.prepare_for_inference(policy.stream())
        completions = engine.generate(prompts, sampling, seeds=[17, 18])
        engine.finish_inference()
    """

    name: str
    """As in `rollout.engine`."""
    tokenizer: Any
    """The model's transformers tokenizer."""
    tp: int
    """Ranks that make up one engine; all of them call every method together, with the same prompts."""

    def held(self) -> Mapping[str, Held]:
        """Every tensor that the engine expects, by its HF name; a tied lm_head is one of them."""

    def prepare_for_inference(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the policy's weights, a stream of HF (name, tensor), one at a time.

        The stream is checked against `held` on the way (sync.py): it has every tensor once, in its shape.
        """

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """[prompt][sample] completions; a seed for each prompt. Equal weights and arguments give equal completions."""

    def finish_inference(self) -> None:
        """Gives back the memory that only generation needs."""
