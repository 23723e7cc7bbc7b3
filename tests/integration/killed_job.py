"""A run that kills itself at a given moment: `python -m tests.integration.killed_job PLAN.json
train CONFIG ...`.

PLAN.json says how many steps go well, in which stage the kill comes then, and how long after the
stage's beginning. A thread waits for that moment, writes down the stage, and sends SIGKILL: nobody
writes a last word.
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

from megatron_real import cli
from megatron_real.progress import RunProgress
from megatron_real.runs import reporter

WRITING = "checkpoint being written"
"""Not a stage of the loop: the thread that writes a checkpoint is at it."""


class Killer(RunProgress):
    """A run's progress that knows when to end it."""

    plan: dict[str, Any]

    def __init__(self, *words: Any, **options: Any) -> None:
        super().__init__(*words, **options)
        self._done = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def step_done(self, *words: Any) -> None:
        super().step_done(*words)
        self._done += 1

    def _now(self) -> tuple[int | str, str]:
        """What runs, under a name of its own each time, and its stage."""
        if self.plan["stage"] == WRITING:
            partial = next(Path(self.plan["checkpoints"]).glob("*.partial"), None)
            return (partial.name, WRITING) if partial else ("", "")
        begun, stage, _ = self.at()
        return begun, stage

    def _watch(self) -> None:
        """A stage that is over before its kill is left alone;
        the next of its kind is given a quarter of that time.
        """
        stage, seconds = self.plan["stage"], self.plan["seconds"]
        while True:
            time.sleep(0.0005)
            now, began = self._now(), time.monotonic()
            while self._done >= self.plan["steps"] and now[1] == stage and self._now() == now:
                if time.monotonic() - began >= seconds:
                    Path(self.plan["hit"]).write_text(stage)
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(0.0005)
                missed = self._now() != now
                seconds *= 0.25 if missed else 1.0


if __name__ == "__main__":
    Killer.plan = json.loads(Path(sys.argv[1]).read_text())
    reporter.RunProgress = Killer  # type: ignore[misc]
    sys.exit(cli.main(sys.argv[2:]))
