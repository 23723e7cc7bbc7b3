"""How a command ends: exit codes, states of a run, and the errors that carry both.

One sentence explains an error of this family. The command line prints it and exits with the error's
code (`cli.main`), and status.json of a training run gets the error's state (`Job.__exit__`). Every
other error is a defect or an accident: it ends a command with a traceback and exit code 1.

A ValueError says that an input is wrong. It refuses a command's input where the command checks it
(`commands.terminal.input_checks`).

Loadable without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from megatron_real.disk import is_full_disk

DONE = 0
FAILED = 1
REFUSED = 2
STOPPED_EARLY = 75
"""sysexits' EX_TEMPFAIL: Slurm and shell scripts start the same command again."""
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

EXIT_CODES: Mapping[int, str] = {
    DONE: "Done, or there was nothing left to do.",
    FAILED: (
        "The run failed, or a check of `plan`, `doctor`, `convert verify` and the like found "
        "something."
    ),
    REFUSED: "The input was refused. One sentence says what is wrong, and no run was changed.",
    STOPPED_EARLY: "The run stopped early with everything saved. Start the same command again.",
    INTERRUPTED: "Ctrl-C. The run has saved where it could; the same command goes on.",
}
"""Exit code -> what it says, for the reference of the documentation."""

State = Literal["running", "stopped", "finished", "failed", "crashed"]
"""What became of the last start of a run."""

STATES: Mapping[State, str] = {
    "running": "A process is at work, or was killed without a word.",
    "stopped": "It ended early with everything saved. The same command goes on.",
    "finished": "All steps are done.",
    "failed": "It was refused, or has failed in a way that the same command would repeat.",
    "crashed": "It ended by an accident, after which the same command may succeed.",
}
"""State -> its meaning, as `status` and the docs print it."""


class ExpectedEnd(Exception):
    """An end that its one sentence explains. Every rank of a job raises it, unless it says not."""

    exit_code: int = FAILED
    """The exit code of the command."""
    state: State = "failed"
    """The state of the run."""
    diverged: bool = False
    """Whether the run ends because its weights or updates were not finite."""
    on_every_rank: bool = True
    """Whether all ranks raise it together, so that the first one tells the user for all."""


class Refused(ExpectedEnd, ValueError):
    """The input is refused."""

    exit_code = REFUSED

    def __init__(self, sentence: str, *, on_every_rank: bool = True) -> None:
        """Takes what is wrong, and whether every rank knows it."""
        super().__init__(sentence)
        self.on_every_rank = on_every_rank


class NothingToDo(ExpectedEnd):
    """The run has finished already. The sentence says how to go on."""

    exit_code = DONE
    state: State = "finished"


class Stopped(ExpectedEnd):
    """The run stopped early, as it was asked to; everything is saved."""

    exit_code = STOPPED_EARLY
    state: State = "stopped"


class Interrupted(Stopped):
    """The run stopped early for Ctrl-C; everything is saved."""

    exit_code = INTERRUPTED


class DiskFull(ExpectedEnd):
    """There is no room on a disk. The rank that needed it may be alone to know."""

    on_every_rank = False


def state_and_reason(error: BaseException) -> tuple[State, str]:
    """Returns what status.json says of a run that ends by `error`."""
    if isinstance(error, ExpectedEnd):
        return error.state, str(error)
    if isinstance(error, KeyboardInterrupt):
        return "stopped", "interrupted"
    # It would fail again until somebody frees space.
    if is_full_disk(error):
        return "failed", str(error)
    return "crashed", f"{type(error).__name__}: {error}"
