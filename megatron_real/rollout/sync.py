"""Weight sync that cannot lie: the policy's weights go into the engine, and every way to lose one is found.

    every sync                each HF tensor arrives once, with the shape that the engine expects       (names, shapes)
    checksum_every syncs      the bits that left the trainer are those in the engine's memory, part by part on each rank
    probe_every syncs         the engine samples an answer, and the trainer gives it the same log-probs
    always                    a sync that outlasts its time ends the run and says where each rank stands

Streamed: one tensor at a time beside the two models. A tied lm_head is sent as a tensor of its own, since an engine may
keep a copy of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_real.collective import on_every_rank
from megatron_real.config import SyncConfig
from megatron_real.records import POSITIVE, Completion, Prompt, Rollout, Sampling, Status, Verdict
from megatron_real.rollout.checksum import checksum
from megatron_real.rollout.engine import Engine, EngineFailed, Held, completed
from megatron_real.rollout.watch import Watch
from megatron_real.weights.mapping import HF_EMBEDDING, HF_OUTPUT

Mismatch = Callable[[Sequence[Rollout]], Sequence[float]]
"""Of the trainer: mean |log-prob there - in the engine| (nats) of each rollout. Collective over all ranks."""

Checksums = dict[str, tuple[torch.dtype, dict[int, int]]]
"""By name: the dtype in which a tensor left the trainer, and the checksum of each part of it that this rank answers
for, by the number of the process that holds the part."""


class SyncError(RuntimeError):
    """Trainer and engine do not have the same weights."""


class WeightSync:
    """Brings the policy's weights into one engine, version by version. Every rank of the job calls it together.

    Example:
        sync = WeightSync(engine, config.rollout.sync, tied=False, probe=prompts[0], temperature=1.0)
        sync.run(policy.stream(), policy.mismatch)
    """

    def __init__(
        self, engine: Engine, config: SyncConfig, *, tied: bool, probe: Prompt, temperature: float
    ) -> None:
        """The same on every rank.

        Args:
            tied: the policy's output weight is its embedding, so its stream has no lm_head.
            probe: the prompt that probes answer.
            temperature: of the trainer's log-probs.
        """
        self.engine, self.config, self.tied, self._prompt, self._temperature = (
            engine,
            config,
            tied,
            probe,
            temperature,
        )
        self.version = 0
        """Syncs so far."""
        self._order: list[str] = []

    def run(self, weights: Iterable[tuple[str, Tensor]], mismatch: Mismatch | None = None) -> None:
        """One sync of the whole stream.

        Args:
            mismatch: the trainer's, for the probe; there is none without.

        Raises:
            EngineFailed: it cannot take weights or does not answer the probe; on every rank alike.
            SyncError: a tensor is unknown, has another shape, comes twice or not at all, or is not in the engine as it
                left the trainer, and is named; or the probe's answer differs, and the engine's ranks are named.
        """
        self.version += 1
        self.engine.revive()  # a start takes its own time, which is not the sync's
        every = self.config.checksum_every
        sums: Checksums | None = {} if every and (self.version - 1) % every == 0 else None
        with Watch(self.version, self.config.timeout_seconds) as watch:
            self.engine.prepare_for_inference(
                self._checked(weights, self.engine.held(), sums, watch)
            )
            watch.at = "the other ranks' checksums"
            if sums is not None:
                self._compare(sums)
        every = self.config.probe_every
        if mismatch is not None and every and (self.version - 1) % every == 0:
            self._probe(mismatch)

    def _probe(self, mismatch: Mismatch) -> None:
        """Compares the log-probs of an answer that every engine samples with the trainer's."""
        sampling = Sampling(1, self._temperature, self.config.probe_tokens)

        def answer() -> Completion:
            ((found,),) = completed(self.engine, [self._prompt], sampling, seeds=[self.version])
            if found is None:
                raise EngineFailed("the answer to the probe was lost")
            return found

        answers = on_every_rank(
            answer, group=dist.group.WORLD, expected=EngineFailed, raises=EngineFailed
        )
        tp = self.engine.tp
        rollouts = [
            _rollout(self._prompt, engine, answer) for engine, answer in enumerate(answers[::tp])
        ]
        for engine, difference in enumerate(mismatch(rollouts)):
            if not difference <= self.config.probe_bound:
                ranks = _numbered("rank", range(engine * tp, (engine + 1) * tp))
                raise SyncError(
                    f"weight sync {self.version}: trainer and engine differ by {difference:.3g} nats a token on the "
                    f"probe {self._prompt.uid!r}, more than rollout.sync.probe_bound = {self.config.probe_bound}; the "
                    f"engine of {ranks} does not compute with the trainer's weights"
                )

    def _checked(
        self,
        weights: Iterable[tuple[str, Tensor]],
        held: Mapping[str, Held],
        sums: Checksums | None,
        watch: Watch,
    ) -> Iterator[tuple[str, Tensor]]:
        """The stream, a tied head in it, as far as it is what the engine expects."""
        missing, order = set(held), []
        for name, tensor in self._watched(self._with_head(weights), watch):
            if name not in held:
                raise SyncError(f"weight sync {self.version}: the engine has no tensor {name}")
            if held[name].shape != tuple(tensor.shape):
                raise SyncError(
                    f"weight sync {self.version}: {name} has the shape {tuple(tensor.shape)}, the engine expects "
                    f"{held[name].shape}"
                )
            if name not in missing:
                raise SyncError(f"weight sync {self.version}: {name} came twice")
            missing.discard(name)
            order.append(name)
            if sums is not None:
                sums[name] = (
                    tensor.dtype,
                    {i: checksum(tensor[part]) for i, part in held[name].parts.items()},
                )
            yield name, tensor
        if missing:
            raise SyncError(
                f"weight sync {self.version}: the engine got nothing for {', '.join(sorted(missing))}"
            )
        self._order = order

    def _with_head(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            yield name, tensor
            if self.tied and name == HF_EMBEDDING:
                yield HF_OUTPUT, tensor

    def _watched(
        self, weights: Iterator[tuple[str, Tensor]], watch: Watch
    ) -> Iterator[tuple[str, Tensor]]:
        """The stream; the watch knows which tensor it waits for: by name from the second sync on."""
        number, last = 0, ""
        while True:
            known = self._order[number] if number < len(self._order) else f"the tensor after {last}"
            watch.at = known if last or self._order else "the first tensor"
            following = next(weights, None)
            if following is None:
                return
            watch.at = last = following[0]
            yield following
            number += 1

    def _compare(self, sums: Checksums) -> None:
        """Compares what left the trainer with what each of the engine's processes now holds."""
        held = self.engine.checksums({name: dtype for name, (dtype, _) in sums.items()})
        wrong = [
            (name, i)
            for name, (_, parts) in sums.items()
            for i, sent in parts.items()
            if held[name][i] != sent
        ]
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, wrong)
        on: dict[str, list[int]] = defaultdict(list)
        for name, process in sorted(
            ((name, i) for wrong in found for name, i in wrong), key=lambda found: found[1]
        ):
            on[name].append(process)
        if on:
            listed = "; ".join(
                f"{name} on {_numbered(self.engine.process, found)}"
                for name, found in list(on.items())[:10]
            )
            raise SyncError(
                f"weight sync {self.version}: {len(on)} tensors in the engine are not what the trainer sent: {listed}"
            )


def _rollout(prompt: Prompt, engine: int, answer: Completion) -> Rollout:
    return Rollout(
        prompt,
        group=engine,
        sample=0,
        completion=answer,
        verdict=Verdict(Status.OK, POSITIVE, None),
    )


def _numbered(what: str, numbers: Sequence[int]) -> str:
    return f"{what}{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
