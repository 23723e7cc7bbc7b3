"""What whole runs share."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's base model."""
    out = tmp_path_factory.mktemp("quickstart") / "base"
    subprocess.run([sys.executable, "tools/make_tiny_model.py", "--out", str(out)], cwd=ROOT, check=True, timeout=400)
    return out
