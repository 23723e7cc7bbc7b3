"""A module of the package as it was at an earlier commit, to be measured beside today's."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def source_at(commit: str, path: str) -> str:
    """Returns a file of the repository as it was at a commit."""
    return subprocess.run(
        ["git", "show", f"{commit}:{path}"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def module_at(commit: str, path: str) -> ModuleType:
    """Returns a module as it was at a commit; what it imports of the package is today's."""
    name = f"{Path(path).stem}_before"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.py"
        file.write_text(source_at(commit, path), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up by name.
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return module
