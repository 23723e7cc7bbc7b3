"""A run that is asked to stop in a given place: `python -m tests.integration.stopped_job SIGNAL
STAGE N train CONFIG`.

It gets the signal as the N-th stage of that name begins, and goes on to the next seam.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_real import cli
from megatron_real.progress import RunProgress
from megatron_real.runs import reporter


class Stopper(RunProgress):
    """A run's progress that asks it to stop."""

    number = signal.SIGUSR1
    chosen = ""
    left = 0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.left -= name == self.chosen
        if name == self.chosen and self.left == 0:
            os.kill(os.getpid(), self.number)
        with super().stage(name):
            yield


if __name__ == "__main__":
    Stopper.number, Stopper.chosen, Stopper.left = (
        signal.Signals[sys.argv[1]],
        sys.argv[2],
        int(sys.argv[3]),
    )
    reporter.RunProgress = Stopper  # type: ignore[misc]
    sys.exit(cli.main(sys.argv[4:]))
