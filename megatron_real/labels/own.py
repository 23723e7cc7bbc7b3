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
    """Whether `labels.verifier` names a file."""
    return ":" in name


def folder(name: str) -> str:
    """The folder of the verifier's file, whose other modules it may import."""
    return str(Path(name.rpartition(":")[0]).resolve().parent)


def is_trusted(name: str) -> bool:
    """Whether the verifier's file says TRUSTED = True at its top level. Runs none of its code.

    A file that is not there or no Python is not trusted; loading it says what is wrong with it.
    """
    try:
        tree = ast.parse(Path(name.rpartition(":")[0]).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    for statement in tree.body:
        match statement:
            case (
                ast.Assign(targets=[ast.Name(id="TRUSTED")], value=ast.Constant(value=value))
                | ast.AnnAssign(target=ast.Name(id="TRUSTED"), value=ast.Constant(value=value))
            ):
                return value is True
    return False


def load_own(name: str) -> OwnVerifier:
    """The function, its file imported under its own name with its folder first on sys.path.

    So dataclasses, pickling, process pools and modules beside the file work as in any program.

    Raises:
        ValueError: the file cannot be imported under its name, or has no such function.
        Exception: whatever the file raises.
    """
    path, _, function = name.rpartition(":")
    module_name = Path(path).stem
    if not module_name.isidentifier():
        raise ValueError(f"labels.verifier names {path!r}; the file's name must be a module's name")
    loaded = sys.modules.get(module_name)
    is_this_file = loaded is not None and _is_file(loaded, path)
    if not is_this_file and (loaded is not None or module_name in sys.stdlib_module_names):
        raise ValueError(
            f"labels.verifier names {path!r}, but there is another module {module_name}; rename the file"
        )
    module = loaded if loaded is not None else _imported(module_name, path)
    judge = getattr(module, function, None)
    if not callable(judge):
        raise ValueError(f"labels.verifier: {path!r} has no function {function!r}")

    def verify(
        text: str, golds: Sequence[str], metadata: Mapping[str, Any]
    ) -> tuple[str, float | None]:
        verdict = judge(text, golds, metadata)
        if isinstance(verdict, bool):
            return ("ok", 1.0) if verdict else ("wrong", 0.0)
        return "score", float(verdict)

    return verify


def _is_file(module: ModuleType, path: str) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == Path(path).resolve()


def _imported(name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(
            f"labels.verifier names {path!r}, which is no Python file; write path.py:function"
        )
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder(path + ":"))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:  # a user's file may raise anything; it is raised on
        del sys.modules[name]  # as an import statement does
        raise
    return module
