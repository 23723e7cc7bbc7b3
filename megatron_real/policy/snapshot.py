"""A copy of the policy's parameters in host memory.

It holds the weights that generated rollouts which are trained on later. pi_old is the trainer's
own, under the weights that generated. While rollouts lag behind, those weights are no longer the
model's: they take its place for the pass that computes the old log-probs, and give it back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_real.pinned import host_copies
from megatron_real.policy.policy import Policy


class Snapshot:
    """One rank's parameters as they were at the last `take`.

    Example:
        snapshot.take()                     # the weights that the engine generates with
        ...                                 # updates
        with snapshot.swapped_in():
            batches = policy.prepare(rollouts, lagging=True)
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._parameters = [
            parameter for chunk in policy.chunks for parameter in chunk.parameters()
        ]
        self._copies = host_copies(self._parameters)

    def take(self) -> None:
        """Copies the parameters as they are. Collective under overlap_param_gather."""
        self._policy.gather_parameters()
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            copy.copy_(parameter.detach(), non_blocking=True)
        _wait_for_copies()

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Gives the model the copied parameters; afterwards it has its own again, to the bit."""
        self._policy.gather_parameters()
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        # One parameter at a time: the exchange takes the memory of a single parameter more.
        for parameter, copy in zip(self._parameters, self._copies, strict=True):
            own = parameter.detach().clone()
            parameter.data.copy_(copy, non_blocking=True)
            # In the device's order: the host's copy is overwritten when the device has read it.
            copy.copy_(own, non_blocking=True)
        _wait_for_copies()


def _wait_for_copies() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
