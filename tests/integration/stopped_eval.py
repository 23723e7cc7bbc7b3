"""An evaluation that gets a signal in a given place.

    python -m tests.integration.stopped_eval SIGNAL N eval MODEL ...

It comes when the N-th chunk of this start is drawn, and not verified yet.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any
from unittest import mock

from megatron_real import cli
from megatron_real.evaluation import benchmark
from megatron_real.rollout.stage import RolloutStage


class Stopper(RolloutStage):
    """A stage that sends its process a signal."""

    number = signal.SIGINT
    chunks_left = 0
    """How many chunks are still drawn until the signal comes, the last one included."""

    def label(self, *args: Any, **options: Any) -> Any:
        Stopper.chunks_left -= 1
        if Stopper.chunks_left == 0:
            os.kill(os.getpid(), self.number)
        return super().label(*args, **options)


if __name__ == "__main__":
    Stopper.number = signal.Signals[sys.argv[1]]
    Stopper.chunks_left = int(sys.argv[2])
    with mock.patch.object(benchmark, "RolloutStage", Stopper):
        sys.exit(cli.main(sys.argv[3:]))
