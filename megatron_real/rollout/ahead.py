"""The next step's rollouts, generated while the present one trains (rollout.max_lag=1).

    step k        its rollouts are there | weights to the servers | rollouts of k + 1 begin | old log-probs, updates
    step k + 1    waits for them         | ...

They are of the weights before step k's updates: one step behind those that train on them. Only engines in processes of
their own can do it, and whatever else wants the engine (an evaluation, the next sync) has to wait until it is done.
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
        self._stage, self._sampling = stage, sampling
        self._prompts: Sequence[Prompt] = ()
        self._sampled: Future[Sampled] | None = None
        self._rollouts: list[Rollout] | None = None

    def begin(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        """Generates and verifies in a thread. It waits for no rank, so it is no part of the training's collectives."""
        assert self._sampled is None and self._rollouts is None, "one step at a time"
        self._prompts, self._sampled = prompts, Future()
        Thread(
            target=self._generate, args=(self._sampled, seed), name="rollouts-ahead", daemon=True
        ).start()

    def settle(self) -> bool:
        """Waits until the rollouts that were begun are there, all of the same weights; False without any. Collective
        over all ranks."""
        if self._sampled is not None:
            self._rollouts, self._sampled = (
                self._stage.label(self._prompts, self._sampled.result()),
                None,
            )
        return self._rollouts is not None

    def take(self, prompts: Sequence[Prompt]) -> list[Rollout] | None:
        """The rollouts that were begun, for these very prompts; None without any, or not settled."""
        rollouts, self._rollouts = self._rollouts, None
        assert rollouts is None or list(prompts) == list(self._prompts), (
            "the order of the prompts is fixed"
        )
        return rollouts

    def _generate(self, sampled: Future[Sampled], seed: int) -> None:
        try:
            sampled.set_result(self._stage.generate(self._prompts, self._sampling, seed=seed))
        except BaseException as error:  # of whatever kind: the training's thread raises it
            sampled.set_exception(error)
