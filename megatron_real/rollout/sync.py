"""Weight sync: the policy's weights go into the engine, and every way to lose one is detected.

    every sync             each HF tensor arrives once, with the shape that the engine expects
    checksum_every syncs   the bits that left the trainer are those in the engine's memory, part by
                           part on each rank
    probe_every syncs      the engine samples an answer, and the trainer computes the same log-probs
    always                 a sync that outlasts its time ends the run and says where each rank waits

The weights are streamed: beside the two models there is one tensor at a time. A tied lm_head is
sent as a tensor of its own, because an engine may keep a copy of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_real.config import SyncConfig
from megatron_real.errors import ExpectedEnd, State
from megatron_real.parallel.collective import gathered_if_any, on_every_rank
from megatron_real.records import POSITIVE, Completion, Prompt, Rollout, Status, Verdict
from megatron_real.rollout.checksum import checksum
from megatron_real.rollout.engines.engine import Engine, EngineFailed, Held, completed
from megatron_real.rollout.sampling import probe_sampling
from megatron_real.rollout.watch import Watch
from megatron_real.weights.mapping import HF_EMBEDDING, HF_OUTPUT

Mismatch = Callable[[Sequence[Rollout]], Sequence[float]]
"""Returns mean |log-prob in the trainer - log-prob in the engine| (nats) of each rollout.

Collective over all ranks.
"""

Checksums = dict[str, tuple[torch.dtype, dict[int, int]]]
"""By name: the dtype in which a tensor left the trainer, and the checksums of its parts.

The parts are those that this rank answers for, by the number of the process that holds the part.
"""


class SyncError(ExpectedEnd, RuntimeError):
    """Trainer and engine do not have the same weights."""

    state: State = "crashed"


class WeightSync:
    """Brings the policy's weights into one engine, version by version.

    All ranks of the job call it together.

    Example:
        sync = WeightSync(
            engine, config.rollout.sync, tied=False, probe=prompts[0], temperature=1.0
        )
        sync.run(policy.stream(), policy.mismatch)
    """

    def __init__(
        self, engine: Engine, config: SyncConfig, *, tied: bool, probe: Prompt, temperature: float
    ) -> None:
        """Takes the same arguments on every rank.

        Args:
            engine: receives the weights.
            config: which syncs are checked how.
            tied: whether the policy's output weight is its embedding, so that its stream has no
                lm_head.
            probe: the prompt that the engine answers in a probe.
            temperature: the temperature of the trainer's log-probs.
        """
        self.engine = engine
        self.config = config
        self.tied = tied
        self._prompt = probe
        self._temperature = temperature
        self.version = 0
        """Number of syncs so far."""
        self._order: list[str] = []
        """Names of the last sync's tensors, in the order of the stream."""

    def run(self, weights: Iterable[tuple[str, Tensor]], mismatch: Mismatch | None = None) -> None:
        """Sends the whole stream to the engine and checks what the configuration asks for.

        Args:
            weights: every HF (name, tensor) of the policy.
            mismatch: the trainer's log-probs against the engine's; without it there is no probe.

        Raises:
            EngineFailed: the engine cannot take weights or does not answer the probe; raised on
                every rank alike.
            SyncError: a tensor is unknown, has another shape, comes twice or not at all, or is not
                in the engine as it left the trainer; the message names it. Or the log-probs of the
                probe's answer differ; the message names the engine's ranks.
        """
        self.version += 1
        # Before the watch begins: starting a server again takes its own time, which is not the
        # sync's.
        self.engine.revive()
        sums: Checksums | None = None
        if self._is_due(self.config.checksum_every):
            sums = {}

        with Watch(self.version, self.config.timeout_seconds) as watch:
            checked = self._checked(weights, self.engine.held(), sums, watch)
            self.engine.prepare_for_inference(checked)
            # Where this rank is done, it waits for the slowest.
            watch.at = "the other ranks' checksums"
            if sums is not None:
                self._compare(sums)

        if mismatch is not None and self._is_due(self.config.probe_every):
            self._probe(mismatch)

    def _is_due(self, every: int) -> bool:
        """Tells whether a check of every so many syncs, 0 for never, is made of the present one."""
        return every > 0 and (self.version - 1) % every == 0

    def _probe(self, mismatch: Mismatch) -> None:
        """Compares the log-probs of an answer that every engine samples with the trainer's."""
        sampling = probe_sampling(self.config, temperature=self._temperature)

        def answer() -> Completion:
            # The version as seed, so that each probe has another answer.
            ((completion,),) = completed(
                self.engine, [self._prompt], sampling, seeds=[self.version]
            )
            if completion is None:
                raise EngineFailed("the answer to the probe was lost")
            return completion

        answers = on_every_rank(
            answer, group=dist.group.WORLD, expected=EngineFailed, raises=EngineFailed
        )

        # The ranks of an engine return the same answer, so one of them speaks for all.
        tp = self.engine.tp
        verdict = Verdict(Status.OK, POSITIVE, None)  # `mismatch` does not look at it
        rollouts = [
            Rollout(self._prompt, group=engine, sample=0, completion=completion, verdict=verdict)
            for engine, completion in enumerate(answers[::tp])
        ]

        for engine, difference in enumerate(mismatch(rollouts)):
            # Written so that NaN fails, too.
            if not difference <= self.config.probe_bound:
                ranks = _numbered("rank", range(engine * tp, (engine + 1) * tp))
                raise SyncError(
                    f"weight sync {self.version}: trainer and engine differ by {difference:.3g} "
                    f"nats a token on the probe {self._prompt.uid!r}, more than "
                    f"rollout.sync.probe_bound = {self.config.probe_bound}; the engine of {ranks} "
                    "does not compute with the trainer's weights"
                )

    def _checked(
        self,
        weights: Iterable[tuple[str, Tensor]],
        held: Mapping[str, Held],
        sums: Checksums | None,
        watch: Watch,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the stream, with a tied head added, as long as it is what the engine expects.

        Args:
            weights: the policy's stream.
            held: what the engine expects.
            sums: receives the checksums of what is yielded; None: none are computed.
            watch: is told which tensor this rank waits for.

        Raises:
            SyncError: a tensor is unknown, has another shape, comes twice or not at all.
        """
        missing = set(held)
        order = []
        for name, tensor in self._watched(self._with_head(weights), watch):
            if name not in held:
                raise SyncError(f"weight sync {self.version}: the engine has no tensor {name}")
            if held[name].shape != tuple(tensor.shape):
                raise SyncError(
                    f"weight sync {self.version}: {name} has the shape {tuple(tensor.shape)}, "
                    f"the engine expects {held[name].shape}"
                )
            if name not in missing:
                raise SyncError(f"weight sync {self.version}: {name} came twice")

            missing.discard(name)
            order.append(name)

            if sums is not None:
                # Of what leaves the trainer, before the engine has it: it may take the tensor's
                # memory.
                parts = {i: checksum(tensor[part]) for i, part in held[name].parts.items()}
                sums[name] = (tensor.dtype, parts)
            yield name, tensor

        if missing:
            names = ", ".join(sorted(missing))
            raise SyncError(f"weight sync {self.version}: the engine got nothing for {names}")
        # Of a whole stream only: a broken one says nothing about the next.
        self._order = order

    def _with_head(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            yield name, tensor
            if self.tied and name == HF_EMBEDDING:
                # At once: when the stream goes on, this tensor may be gone.
                yield HF_OUTPUT, tensor

    def _watched(
        self, weights: Iterator[tuple[str, Tensor]], watch: Watch
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the stream, and tells the watch which tensor this rank waits for.

        From the second sync on the tensor's name is known before it comes, by the last sync's
        order.
        """
        number = 0
        last = ""
        while True:
            if number < len(self._order):
                watch.at = self._order[number]
            elif last:
                watch.at = f"the tensor after {last}"
            else:
                watch.at = "the first tensor"

            following = next(weights, None)
            if following is None:
                return

            # Until the next tensor is asked for, the engine has this one.
            last = following[0]
            watch.at = last
            yield following
            number += 1

    def _compare(self, sums: Checksums) -> None:
        """Compares what left the trainer with what each of the engine's processes now holds.

        Collective over all ranks.

        Raises:
            SyncError: some part differs; the message names ten tensors at most.
        """
        # Read back from the memory that the engine computes with.
        held = self.engine.checksums({name: dtype for name, (dtype, _) in sums.items()})
        wrong = []
        for name, (_, parts) in sums.items():
            wrong += [
                (name, process) for process, sent in parts.items() if held[name][process] != sent
            ]

        wrong_of_rank = gathered_if_any(wrong, group=dist.group.WORLD)
        every_wrong = [pair for pairs in wrong_of_rank for pair in pairs]
        if not every_wrong:
            return

        processes_of: dict[str, list[int]] = defaultdict(list)
        for name, process in sorted(every_wrong, key=lambda pair: pair[1]):
            processes_of[name].append(process)
        listed = "; ".join(
            f"{name} on {_numbered(self.engine.process, processes)}"
            for name, processes in list(processes_of.items())[:10]
        )
        raise SyncError(
            f"weight sync {self.version}: {len(processes_of)} tensors in the engine are not what "
            f"the trainer sent: {listed}"
        )


def _numbered(noun: str, numbers: Sequence[int]) -> str:
    plural = "s" if len(numbers) > 1 else ""
    return f"{noun}{plural} {', '.join(map(str, numbers))}"
