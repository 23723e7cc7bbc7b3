"""What a rollout engine does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from megatron_real.records import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from torch import Tensor


class Engine(Protocol):
    """Samples completions under weights that it is given. One engine serves one rank.

    Example:
        engine.prepare_for_inference(policy.stream())
        completions = engine.generate(prompts, sampling, seed=17)
        engine.finish_inference()
    """

    name: str
    """As in `rollout.engine`."""
    tokenizer: Any
    """The model's transformers tokenizer."""

    def prepare_for_inference(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the policy's weights, a stream of HF (name, tensor), one at a time.

        Raises:
            RuntimeError: a tensor is unknown, has another shape, or is missing at the end; names it.
        """

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[list[Completion]]:
        """[prompt][sample] completions. The same weights, prompts, sampling and seed give the same completions."""

    def finish_inference(self) -> None:
        """Gives back the memory that only generation needs."""
