"""Starts the processes of a training run on this machine, by torchrun's elastic agent.

The first rank has the terminal. What the others write goes to a file for each, which is kept in
RUN_DIR/logs where one of them fails; the agent's own tracebacks are not shown. On more than one
machine srun or torchrun start the processes: docs/cluster.md.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from megatron_real.errors import DONE, FAILED, INTERRUPTED, REFUSED, STOPPED_EARLY
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.status import read_status

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

SHUTDOWN_SECONDS = 600
"""How long ranks may take to save and stop once they are asked to.

A checkpoint of a large model takes minutes.
"""

_TAIL_LINES = 30
_TRACE = "Traceback (most recent call last)"


def launch(arguments: Sequence[str], *, num_ranks: int, run_dir: str) -> int:
    """Runs `megatron-real ARGUMENTS` in `num_ranks` processes that form one job.

    Returns:
        The exit code: that of the rank that failed first, 0 where none did.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Each of the agent's modules has set a level of its own.
    for name in logging.root.manager.loggerDict:
        if name.startswith(("torch.distributed.elastic", "torch.distributed.launcher")):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    # As many threads as the machine has cores, shared by the ranks. Each would take all of them.
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SHUTDOWN_SECONDS))

    logs = Path(tempfile.mkdtemp(prefix="megatron-real-"))
    # Not the first rank's, which has the terminal.
    redirects = {rank: Std.ALL for rank in range(1, num_ranks)}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        # Port 0: the store takes any that is free.
        rdzv_endpoint="localhost:0",
        # A failure ends the job: to go on from a checkpoint is a start of its own.
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=redirects or Std.NONE),
    )

    def pass_on(number: int, _frame: FrameType | None) -> None:
        """Gives a signal to every rank."""
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)

    # The elastic agent passes on signals that end a job, and no other.
    signal.signal(signal.SIGUSR1, pass_on)
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_real", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _failed(rank, failure, logs, RunDirectory(run_dir))
    except SignalException as error:
        return _stopped(error, RunDirectory(run_dir))
    finally:
        shutil.rmtree(logs, ignore_errors=True)

    return DONE


def _failed(first: int, failure: ProcessFailure, logs: Path, directory: RunDirectory) -> int:
    """Shows the error of the rank at fault, once, and says where the logs are.

    Args:
        first: the rank that was seen to end first.
        failure: how it ended.
        logs: directory of what the other ranks wrote.
        directory: of the run.

    Returns:
        The exit code.
    """
    code = failure.exitcode
    if code in (REFUSED, STOPPED_EARLY, INTERRUPTED):
        return code  # the first rank has said why, or the one that was alone to see it

    # The elastic agent keeps a folder for each rank.
    errors = {}
    for file in logs.glob("**/stderr.log"):
        errors[int(file.parent.name)] = file.read_text(errors="replace")

    # The others end because of the rank at fault, and may be seen to end before it.
    rank = first
    with_traceback = sorted(number for number, text in errors.items() if _TRACE in text)
    if any("rank 0 on" in text and "ended first" in text for text in errors.values()):
        # The lifeline's sentence on the others, where the first rank has ended.
        rank = 0
    elif with_traceback:
        rank = with_traceback[0]

    # The last traceback, else the last lines.
    lines = errors.get(rank, "").splitlines(keepends=True)
    traces = [i for i, line in enumerate(lines) if line.startswith(_TRACE)]
    if traces:
        lines = lines[traces[-1] :]
    # Nothing of the first rank: its own words are on the terminal already.
    print("".join(lines[-_TAIL_LINES:]), end="", file=sys.stderr)

    # Less than 0 is the number of the signal that ended the process.
    if code >= 0:
        reason = f"exit code {code}"
    else:
        reason = f"signal {signal.Signals(-code).name}"
    where = ""
    kept = _keep(logs, directory)
    if kept is not None:
        where = f"; the ranks' output is in {kept}"
    print(f"megatron-real: rank {rank} failed ({reason}){where}", file=sys.stderr)
    if code > 0:
        return code

    return FAILED


def _keep(logs: Path, directory: RunDirectory) -> Path | None:
    """Copies what the ranks wrote into the run's directory; None where the run never had one."""
    if not directory.path.is_dir():
        return None
    # A full disk must not hide the error of the run.
    with contextlib.suppress(OSError):
        directory.log.parent.mkdir(exist_ok=True)
        for file in logs.glob("**/std*.log"):
            rank = file.parent.name
            stream = file.stem.removeprefix("std")
            shutil.copyfile(file, directory.log.parent / f"rank-{rank}-{stream}.log")
        return directory.log.parent
    return None


def _stopped(error: SignalException, directory: RunDirectory) -> int:
    """Waits for ranks that are still there after a signal.

    Returns:
        The exit code that says what became of them.
    """
    # They are there where a second signal has ended the agent's own wait.
    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGINT)
    _, alive = psutil.wait_procs(children, timeout=10)
    for child in alive:
        child.kill()

    if error.sigval == signal.SIGINT:
        return INTERRUPTED
    state = read_status(directory.status).get("state")
    if state == "stopped":
        return STOPPED_EARLY
    # The signal came after the last step.
    if state == "finished":
        return DONE

    # As shells write an end by a signal.
    return 128 + int(error.sigval)
