"""The quickstart's base model, made once, and the command line that trains it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "examples/configs/quickstart.yaml"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's base model."""
    out = tmp_path_factory.mktemp("quickstart") / "base"
    subprocess.run([sys.executable, "tools/make_tiny_model.py", "--out", str(out)], cwd=ROOT, check=True, timeout=400)
    return out


def python(*words: object) -> str:
    """Standard output of a Python command line that must succeed."""
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Traceback" not in done.stderr, done.stderr[-5000:]
    return done.stdout


def command(base: Path, run_dir: Path, *words: str, processes: int = 2) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    paths = [f"model.path={base}", f"data.train={base}/train.jsonl", f"data.heldout={base}/heldout.jsonl"]
    return [
        sys.executable, *launcher, "-m", "megatron_real", "train", str(CONFIG), f"trainer.run_dir={run_dir}",
        "trainer.tensorboard=false", *paths, *words,
    ]  # fmt: skip


def train(base: Path, run_dir: Path, *words: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    run = command(base, run_dir, *words, processes=processes)
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=400)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
