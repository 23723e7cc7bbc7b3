"""Verifiers of a user's own: `path.py:function`, loaded as the module that it is.

TRUSTED = True      # this verifier never runs what a completion says: docs/sandbox.md

def judge(text: str, answers: list[str], metadata: dict) -> bool | float: ...
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol


class OwnVerifier(Protocol):
    """What a loaded function is called as."""

    def __call__(
        self, text: str, golds: Sequence[str], metadata: Mapping[str, Any]
    ) -> tuple[str, float | None]: ...


def is_own(name: str) -> bool:
    """Returns whether `labels.verifier` names a file."""
    return ":" in name


def folder(name: str) -> str:
    """Returns the folder of the verifier's file, whose other modules it may import."""
    return str(Path(name.rpartition(":")[0]).resolve().parent)


def is_trusted(name: str) -> bool:
    """Returns whether the verifier's file says TRUSTED = True at its top level.

    Runs none of its code. A file that is not there or no Python is not trusted; loading it says
    what is wrong with it.
    """
    try:
        tree = ast.parse(Path(name.rpartition(":")[0]).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False

    # The first assignment decides; TRUSTED = 1 is not True.
    for statement in tree.body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id="TRUSTED")], value=ast.Constant(value=value))
                | ast.AnnAssign(target=ast.Name(id="TRUSTED"), value=ast.Constant(value=value))
            ):
                return value is True
    return False


def load_own(name: str) -> OwnVerifier:
    """Imports the verifier's file under its own name, and returns its function.

    The file's folder comes first on sys.path, so that dataclasses, pickling, process pools and
    modules beside the file work as in any program.

    Raises:
        ValueError: the file cannot be imported under its name, or has no such function.
        Exception: whatever the file raises.
    """
    path, _, function = name.rpartition(":")
    module_name = Path(path).stem
    if not module_name.isidentifier():
        raise ValueError(f"labels.verifier names {path!r}; the file's name must be a module's name")

    module = sys.modules.get(module_name)
    if module is None:
        is_other = module_name in sys.stdlib_module_names
    else:
        file = getattr(module, "__file__", None)
        is_other = file is None or Path(file).resolve() != Path(path).resolve()
    if is_other:
        raise ValueError(
            f"labels.verifier names {path!r}, but there is another module {module_name}; "
            "rename the file"
        )
    if module is None:
        module = _imported(module_name, path)

    judge = getattr(module, function, None)
    if not callable(judge):
        raise ValueError(f"labels.verifier: {path!r} has no function {function!r}")

    def verify(
        text: str, golds: Sequence[str], metadata: Mapping[str, Any]
    ) -> tuple[str, float | None]:
        verdict = judge(text, golds, metadata)
        # `is`, because 1 and 1.0 are scores.
        if verdict is True:
            return "ok", 1.0
        if verdict is False:
            return "wrong", 0.0
        return "score", float(verdict)

    return verify


def _imported(name: str, path: str) -> ModuleType:
    """Imports the file at `path` as the module `name`, as an import statement would.

    Raises:
        ValueError: it is no Python file.
        BaseException: whatever the file raises.
    """
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(
            f"labels.verifier names {path!r}, which is no Python file; write path.py:function"
        )

    module = importlib.util.module_from_spec(spec)
    # Both before the file runs: it may import its neighbours, and they may import it.
    sys.path.insert(0, folder(path + ":"))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:  # a user's file may raise anything; it is raised on
        del sys.modules[name]  # as an import statement does
        raise
    return module
