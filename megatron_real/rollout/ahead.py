"""The next step's rollouts, generated while the present one trains (rollout.max_lag=1).

    step k        its rollouts arrive | weights go to the servers | rollouts of k + 1 begin
                  | old log-probs, updates
    step k + 1    waits for them | ...

The rollouts of step k + 1 come from the weights before step k's updates: they lag one step behind
the weights that train on them. Only engines in processes of their own can generate ahead. Whatever
else wants the engine (an evaluation, the next sync) waits until it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from threading import Thread

from megatron_real.records import Prompt, Rollout, Sampling
from megatron_real.rollout.stage import RolloutStage, Sampled


class Ahead:
    """At most one step's rollouts under way, or waiting to be trained on."""

    def __init__(self, stage: RolloutStage, sampling: Sampling) -> None:
        self._stage = stage
        self._sampling = sampling
        self._prompts: Sequence[Prompt] = ()
        self._sampled: Future[Sampled] | None = None
        self._rollouts: list[Rollout] | None = None

    def begin(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        """Generates and verifies in a thread.

        The thread waits for no other rank: a collective of its own would meet the training's.
        """
        assert self._sampled is None and self._rollouts is None, "one step at a time"
        sampled: Future[Sampled] = Future()

        def generate() -> None:
            try:
                sampled.set_result(self._stage.generate(prompts, self._sampling, seed=seed))
            except BaseException as error:  # whatever it is, `settle` raises it in the main thread
                sampled.set_exception(error)

        self._prompts = prompts
        self._sampled = sampled
        Thread(target=generate, name="rollouts-ahead", daemon=True).start()

    def settle(self) -> bool:
        """Waits for the rollouts that were begun; collective over all ranks.

        Returns:
            Whether there are any. All of them come from the same weights.
        """
        if self._sampled is not None:
            # In the main thread: labelling is collective.
            self._rollouts = self._stage.label(self._prompts, self._sampled.result())
            self._sampled = None
        return self._rollouts is not None

    def take(self, prompts: Sequence[Prompt]) -> list[Rollout] | None:
        """Hands the rollouts over that were begun for these very prompts, once.

        Returns:
            None where none were begun, or where they are not settled.
        """
        rollouts = self._rollouts
        self._rollouts = None
        if rollouts is not None:
            assert list(prompts) == list(self._prompts), "the order of the prompts is fixed"
        return rollouts
