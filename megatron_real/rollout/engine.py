"""What a rollout engine does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_real.records import Completion, Prompt, Sampling
from megatron_real.rollout.checksum import checksum


class EngineFailed(RuntimeError):
    """An engine cannot go on. What it has not returned is lost, and drawn again on another rank's engine."""


@dataclass(frozen=True)
class Held:
    """One HF tensor that an engine expects."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    parts: Mapping[int, tuple[slice, ...]]
    """What of it lies where, by the number of a process of the engine's: those processes that this rank answers for."""


@dataclass(frozen=True)
class Part:
    """One HF tensor in the memory of one process of an engine."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    part: tuple[slice, ...]
    """What of it this process holds."""
    tensor: Tensor
    """That part: the memory that the engine computes with, not a copy."""


class Engine(Protocol):
    """Samples completions under weights that it is given. `tp` neighbouring ranks make up one engine.

    Example:
        engine.prepare_for_inference(policy.stream())
        for i, k, completion in engine.generate(prompts, sampling, seeds=[17, 18]): ...
        engine.finish_inference()
    """

    name: str
    """As in `rollout.engine`."""
    tokenizer: Any
    """The model's transformers tokenizer."""
    tp: int
    """Ranks that make up one engine; all of them call every method together, with the same prompts."""
    process: str
    """What its processes are called: `rank` where the training processes themselves hold the weights."""

    def held(self) -> Mapping[str, Held]:
        """Every tensor that the engine expects, by its HF name; a tied lm_head is one of them."""

    def checksums(self, dtypes: Mapping[str, torch.dtype]) -> Mapping[str, Mapping[int, int]]:
        """By tensor, of the processes that `held` names: the checksum of what each now holds.

        Args:
            dtypes: those in which the tensors left the trainer. An engine may keep a tensor in a wider dtype, which
                loses nothing; the checksum is of the tensor as it was sent.
        """

    def revive(self) -> bool:
        """Brings back what has ended since it was last used; waits for it. Collective over all ranks.

        Returns:
            Whether anything had ended, on every rank alike: it then holds no weights of the policy.

        Raises:
            EngineFailed: in vain; on every rank alike.
        """

    def prepare_for_inference(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the policy's weights, a stream of HF (name, tensor), one at a time.

        The stream is checked against `held` on the way (sync.py): it has every tensor once, in its shape.
        """

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        """Yields (index of the prompt, sample, completion) as completions finish, so that they are verified meanwhile.

        There is a seed for each prompt; equal weights and arguments give equal completions, in any order. What is lost
        (a timeout, a server that died) never comes.

        Raises:
            EngineFailed: everything that has not come is lost.
        """

    def finish_inference(self) -> None:
        """Gives back the memory that only generation needs."""

    def close(self) -> None:
        """Ends the engine and what it has started, so that this process may build another one.

        Called once, before the process leaves its process groups. A process that ends need not call it.
        """


def held_on(process: int, parts: Mapping[str, Part]) -> dict[str, Held]:
    """What an engine of one process at hand expects."""
    return {name: Held(part.shape, {process: part.part}) for name, part in parts.items()}


def checksums_on(
    process: int, parts: Mapping[str, Part], dtypes: Mapping[str, torch.dtype]
) -> dict[str, dict[int, int]]:
    """The checksums of what one process at hand holds."""
    return {
        name: {process: checksum(parts[name].tensor.to(dtype))} for name, dtype in dtypes.items()
    }


def completed(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
) -> list[list[Completion | None]]:
    """[prompt][sample] everything that the engine generates; None for what it lost."""
    found = {
        (i, k): completion for i, k, completion in engine.generate(prompts, sampling, seeds=seeds)
    }
    return [[found.get((i, k)) for k in range(sampling.num_samples)] for i in range(len(prompts))]
