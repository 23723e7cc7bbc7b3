"""`megatron-real train --nproc N`: one sentence for what is refused,
one error for a rank that fails, two lines for Ctrl-C.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import zygote
from tests.integration.conftest import CONFIG, ROOT
from tests.integration.test_starts import WORDS, untrained

__all__ = ["untrained"]

BROKEN_RANK = """\
import os

if os.environ.get("RANK") == "1":
    import megatron_real.loop

    def train(job):
        raise RuntimeError("broken on purpose")

    megatron_real.loop.train = train
"""


def command(base: Path, run_dir: Path, *words: str) -> list[str]:
    paths = [f"model.path={base}", f"data.train={base}/train.jsonl", "data.heldout="]
    start = [sys.executable, "-W", "ignore", "-m", "megatron_real", "train", str(CONFIG)]
    return [*start, "--nproc", "2", f"trainer.run_dir={run_dir}", *paths, *WORDS, *words]


def start(words: list[str], **environment: str) -> subprocess.Popen[str]:
    """Starts a command line in a fork, which reads PYTHONPATH's sitecustomize.py as well."""
    process: subprocess.Popen[str] = zygote.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return process


def test_what_is_refused_starts_no_process(untrained: Path, tmp_path: Path) -> None:
    job = start(command(untrained, tmp_path / "run", "parallel.tp=3"))
    _, errors = job.communicate(timeout=400)
    assert job.returncode == 2
    assert errors.count("\n") == 1
    assert errors.startswith("megatron-real: ")
    assert not (tmp_path / "run").exists()


def test_a_rank_s_error_is_shown_once_with_its_log(untrained: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BROKEN_RANK)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    job = start(command(untrained, tmp_path / "run"), PYTHONPATH=path)
    _, errors = job.communicate(timeout=600)
    assert job.returncode == 1
    assert errors.count("Traceback") == 1, errors
    assert "rank 1 failed (exit code 1)" in errors
    assert "ChildFailedError" not in errors
    log = tmp_path / "run/logs/rank-1-err.log"
    assert "broken on purpose" in log.read_text()


def test_ctrl_c_ends_in_two_lines(untrained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start(command(untrained, run, "trainer.steps=1000"))
    deadline = time.monotonic() + 600
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.5)

    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=600)

    assert job.returncode == 130, errors
    assert "Traceback" not in errors, errors
    lines = errors.splitlines()
    assert lines[0] == "megatron-real: starting 2 processes"
    assert len(lines) == 3, errors
    assert "same command goes on" in errors or "start the same command again" in errors
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"


@pytest.mark.parametrize("count", ["0", "-1"])
def test_a_wrong_number_of_processes_is_refused(
    untrained: Path, tmp_path: Path, count: str
) -> None:
    words = command(untrained, tmp_path / "run")
    words[words.index("--nproc") + 1] = count
    job = start(words)
    _, errors = job.communicate(timeout=400)
    assert job.returncode == 2
    assert errors == f"megatron-real: --nproc is {count}; it must be 1 or above\n"


AFTER_A_SIGNAL = """
import signal, sys
from pathlib import Path
from torch.distributed.elastic.multiprocessing.api import SignalException
from megatron_real import launcher
from megatron_real.runs.directory import RunDirectory
sys.exit(launcher._stopped(SignalException("", signal.SIGTERM), RunDirectory(Path(sys.argv[1]))))
"""


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("stopped", 75), ("running", 143)])
def test_after_a_signal_the_exit_code_says_what_became_of_the_run(
    tmp_path: Path, state: str, code: int
) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": state}))
    done = zygote.run(
        [sys.executable, "-c", AFTER_A_SIGNAL, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == code, done.stderr
