"""A run that is asked to stop in a given place.

    python -m tests.integration.stopped_job SIGNAL STAGE N train CONFIG

It gets the signal as the N-th stage of that name begins, and goes on to the next seam.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from megatron_real import cli
from megatron_real.progress import RunProgress
from megatron_real.runs import reporter


class Stopper(RunProgress):
    """A run's progress that asks the run to stop."""

    number = signal.SIGUSR1
    target_stage = ""
    stages_left = 0
    """How often the stage still begins until the signal comes, that time included."""

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if name == self.target_stage:
            self.stages_left -= 1
            if self.stages_left == 0:
                os.kill(os.getpid(), self.number)
        with super().stage(name):
            yield


if __name__ == "__main__":
    Stopper.number = signal.Signals[sys.argv[1]]
    Stopper.target_stage = sys.argv[2]
    Stopper.stages_left = int(sys.argv[3])
    with mock.patch.object(reporter, "RunProgress", Stopper):
        sys.exit(cli.main(sys.argv[4:]))
