"""The protocol that every rollout engine keeps, and the records that it shares with the sync."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_real.errors import ExpectedEnd, State
from megatron_real.records import Completion, Prompt, Sampling
from megatron_real.rollout.checksum import checksum


class EngineFailed(ExpectedEnd, RuntimeError):
    """An engine cannot go on.

    The completions that it has not returned are lost, and drawn again on another rank's engine.
    """

    # An engine may be lost by accident: a script may start the same command again.
    state: State = "crashed"


@dataclass(frozen=True)
class Held:
    """One HF tensor that an engine expects."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    parts: Mapping[int, tuple[slice, ...]]
    """The part of it that a process of the engine holds, by the number of the process.

    Only those processes are listed that this rank answers for.
    """


@dataclass(frozen=True)
class TensorPart:
    """One HF tensor in the memory of one process of an engine."""

    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    part: tuple[slice, ...]
    """The part of it that this process holds, as a slice of each axis."""
    tensor: Tensor
    """That part, in the memory that the engine computes with; not a copy."""


class Engine(Protocol):
    """Samples completions under weights that it is given.

    `tp` neighbouring ranks make up one engine.

    Example:
        engine.prepare_for_inference(policy.stream())
        for i, k, completion in engine.generate(prompts, sampling, seeds=[17, 18]): ...
        engine.finish_inference()
    """

    name: str
    """The engine's name in `rollout.engine`."""
    tokenizer: Any
    """The model's transformers tokenizer."""
    tp: int
    """Number of ranks that make up one engine.

    All of them call every method together, with the same prompts.
    """
    process: str
    """What messages call the engine's processes, such as `worker`.

    It is `rank` where the training processes themselves hold the engine's weights.
    """

    def held(self) -> Mapping[str, Held]:
        """Returns every tensor that the engine expects, by its HF name.

        A tied lm_head is one of them.
        """

    def checksums(self, dtypes: Mapping[str, torch.dtype]) -> Mapping[str, Mapping[int, int]]:
        """Returns the checksum of what each process now holds of each tensor.

        Args:
            dtypes: by tensor, the dtype in which it left the trainer. An engine may keep a tensor
                in a wider dtype, which loses nothing; the checksum is of the tensor as it was sent.

        Returns:
            By HF name, and by the number of each process that `held` lists.
        """

    def revive(self) -> bool:
        """Brings back processes that have ended since they were last used, and waits for them.

        Collective over all ranks.

        Returns:
            Whether any had ended, on every rank alike. It then holds no weights of the policy.

        Raises:
            EngineFailed: they cannot be brought back; raised on every rank alike.
        """

    def prepare_for_inference(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Takes over the policy's weights, a stream of HF (name, tensor), one at a time.

        The stream is checked against `held` on the way (sync.py): it has every tensor once, in its
        shape.
        """

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
    ) -> Iterator[tuple[int, int, Completion]]:
        """Yields (index of the prompt, sample, completion) as completions finish.

        So the first completions can be verified while the last ones are sampled. A completion that
        is lost (a timeout, a server that died) is never yielded.

        Args:
            prompts: what to complete, `sampling.num_samples` times each.
            sampling: temperature, lengths and counts.
            seeds: one for each prompt. Equal weights and arguments give equal completions, in any
                order.

        Raises:
            EngineFailed: every completion that has not been yielded is lost.
        """

    def finish_inference(self) -> None:
        """Releases the memory that only generation needs."""

    def close(self) -> None:
        """Ends the engine and what it has started, so that this process may build another one.

        It is called once, before the process leaves its process groups. A process that ends need
        not call it.
        """


@runtime_checkable
class QueueEngine(Engine, Protocol):
    """An engine that begins its prompts one after the other, as it has room.

    What it has not begun yet may become another engine's (backlog.py). The answer to a prompt must
    not depend on what is decoded beside it, but for rounding.
    """

    at_once: int
    """Number of completions that it decodes at the same time for this rank."""

    def generate_as_room(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        rows: Iterator[int],
    ) -> Iterator[tuple[int, int, Completion]]:
        """Does what `generate` does, for the prompts that `rows` names.

        Args:
            prompts, sampling, seeds: as of `generate`.
            rows: indices of the prompts to complete. Each is asked for when there is room for the
                next prompt, and then belongs to this engine. After a failure that would cost the
                next ones too, none is asked for.

        Raises:
            EngineFailed: every completion that was begun and has not been yielded is lost.
        """


class InTrainer:
    """What engines share that hold their weights in the training processes.

    Each rank answers for its own part of every tensor.
    """

    process = "rank"

    def parts(self) -> dict[str, TensorPart]:
        """Returns this rank's part of every HF tensor, by name."""
        raise NotImplementedError

    def held(self) -> dict[str, Held]:
        """See `Engine`."""
        rank = dist.get_rank()
        return {name: Held(part.shape, {rank: part.part}) for name, part in self.parts().items()}

    def checksums(self, dtypes: Mapping[str, torch.dtype]) -> dict[str, dict[int, int]]:
        """See `Engine`."""
        rank = dist.get_rank()
        parts = self.parts()
        return {
            name: {rank: checksum(parts[name].tensor.to(dtype))} for name, dtype in dtypes.items()
        }

    def revive(self) -> bool:
        """Returns False: the engine ends with its process, so there is nothing to revive."""
        return False


def completed(
    engine: Engine, prompts: Sequence[Prompt], sampling: Sampling, *, seeds: Sequence[int]
) -> list[list[Completion | None]]:
    """Generates until the engine has finished.

    Returns:
        [prompt][sample] the completions; None for each that the engine has lost.
    """
    completions: list[list[Completion | None]] = [[None] * sampling.num_samples for _ in prompts]
    for i, k, completion in engine.generate(prompts, sampling, seeds=seeds):
        # They come as they finish, in any order.
        completions[i][k] = completion
    return completions
