"""The quickstart's base model, made once, and the command line that trains it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_real.runs.rollouts import read_rows
from tests import zygote

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples/configs/quickstart.yaml"


PROBLEMS = 500
"""How many of the base model's 7,333 training problems the tests' runs read:
each run spends two seconds on all of them.
"""


LEARNING = (
    "trainer.steps=4", "optimizer.lr=1e-4", "rollout.num_prompts=32", "batch.minibatch_prompts=16",
    "evaluation.max_problems=150",
)  # fmt: skip
"""Settings of a short run that raises the held-out accuracy, from 0.4, by more than 0.2."""
SMALL = ("rollout.num_prompts=8", "batch.minibatch_prompts=4", "data.heldout=")
"""Settings of a run in which only what happens around the steps matters: two updates of 32 rollouts
a step, and no evaluation.
"""


@pytest.fixture(scope="session")
def base(whole_base: Path, once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The quickstart's base model, with the first of its training problems."""

    def make(out: Path) -> None:
        shutil.copytree(whole_base, out)
        lines = (whole_base / "train.jsonl").read_text().splitlines(keepends=True)
        (out / "train.jsonl").write_text("".join(lines[:PROBLEMS]))

    return once("base", make)


@pytest.fixture(scope="session")
def whole_base(
    request: pytest.FixtureRequest, once: Callable[[str, Callable[[Path], None]], Path]
) -> Path:
    """The quickstart's base model."""
    if made := request.config.getoption("--base"):
        return _awaited(Path(made).absolute())

    def make(out: Path) -> None:
        zygote.run(
            [sys.executable, "tools/make_tiny_model.py", "--out", str(out)],
            cwd=ROOT,
            check=True,
            timeout=900,
        )

    return once("whole-base", make)


def _awaited(base: Path, seconds: float = 1800.0) -> Path:
    """The directory `base`, which another process may still be making under another name."""
    ends = time.monotonic() + seconds
    while not base.is_dir():
        log = base.with_suffix(".log")
        printed = ""
        if log.exists():
            printed = log.read_text()
        assert "Traceback" not in printed and time.monotonic() < ends, f"no base model:\n{printed}"
        time.sleep(0.5)
    return base


def python(*words: object) -> str:
    """Standard output of a Python command line that must succeed."""
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    done = zygote.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Traceback" not in done.stderr, done.stderr[-5000:]
    return str(done.stdout)


def launcher(processes: int) -> list[str]:
    """The words that start a module in several processes; none for one process."""
    if processes == 1:
        return []
    return ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]


def command(base: Path, run_dir: Path, *words: str, processes: int = 2) -> list[str]:
    """The command line that trains the base model; later words replace earlier ones."""
    paths = [
        f"model.path={base}",
        f"data.train={base}/train.jsonl",
        f"data.heldout={base}/heldout.jsonl",
    ]
    return [
        sys.executable, *launcher(processes), "-m", "megatron_real", "train", str(CONFIG),
        f"trainer.run_dir={run_dir}", "trainer.tensorboard=false", *paths, *words,
    ]  # fmt: skip


def train(
    base: Path, run_dir: Path, *words: str, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    run = command(base, run_dir, *words, processes=processes)
    return zygote.run(run, cwd=ROOT, capture_output=True, text=True, timeout=1200)


def num_rows(path: Path) -> int:
    """Returns how many rows a file has, which a run writes or deletes meanwhile."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:  # a run that begins anew deletes the rows of the life before
        return 0


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of rollouts, or the lines of a JSONL file."""
    if path.suffix == ".parquet":
        return list(read_rows(path))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
