"""A run that kills itself at a given moment.

    python -m tests.integration.killed_job PLAN.json train CONFIG ...

PLAN.json has the number of steps that end first, the stage in which the kill comes then, and the
seconds since the stage's beginning. A thread waits for that moment, writes down the stage, and
sends SIGKILL, so that the run cannot write anything more.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_real import cli
from megatron_real.progress import RunProgress
from megatron_real.runs import reporter

WRITING = "checkpoint being written"
"""Not a stage of the loop: the thread that writes a checkpoint is at it."""


class Killer(RunProgress):
    """A run's progress that kills the run as planned."""

    plan: dict[str, Any]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._steps_done = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def step_done(self, *args: Any) -> None:
        super().step_done(*args)
        self._steps_done += 1

    def _now(self) -> tuple[int | str, str]:
        """Returns a name of what runs, another one each time that a stage begins, and the stage."""
        if self.plan["stage"] == WRITING:
            partial = next(Path(self.plan["checkpoints"]).glob("*.partial"), None)
            if partial is None:
                return "", ""
            return partial.name, WRITING
        begun, stage, _ = self.at()
        return begun, stage

    def _watch(self) -> None:
        """Waits for the stage, and then for the moment in it.

        A stage that is over before its kill is left alone; the kill comes into the next of its
        kind, after a quarter of that time.
        """
        stage = self.plan["stage"]
        seconds = self.plan["seconds"]
        while True:
            time.sleep(0.0005)
            now = self._now()
            began = time.monotonic()
            while self._steps_done >= self.plan["steps"] and now[1] == stage and self._now() == now:
                if time.monotonic() - began >= seconds:
                    Path(self.plan["hit"]).write_text(stage)
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.0005)
                is_over = self._now() != now
                if is_over:
                    seconds *= 0.25


if __name__ == "__main__":
    Killer.plan = json.loads(Path(sys.argv[1]).read_text())
    with mock.patch.object(reporter, "RunProgress", Killer):
        sys.exit(cli.main(sys.argv[2:]))
