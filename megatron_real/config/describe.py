"""Every setting with its type, default, bounds and meaning, as the code declares them.

`megatron-real config` prints them, and the reference of the documentation is made of them.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from megatron_real.bounds import hints, plain_hint
from megatron_real.config.schema import Config
from megatron_real.objective.registry import OBJECTIVES, make_objective

_KINDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}


@dataclass(frozen=True)
class Setting:
    """One setting, for a reader."""

    path: str
    """Its name, as on the command line."""
    kind: str
    """What it takes, bounds included."""
    default: str
    """Its default, as YAML has it."""
    meaning: str
    """The docstring under its field."""
    objectives: tuple[str, ...] = ()
    """The objectives that have it; empty for every other setting."""


def every_setting() -> list[Setting]:
    """Returns all settings in the order of the sections.

    A setting that several objectives have is there once for each meaning.
    """
    settings: list[Setting] = []
    for setting in _settings_of(Config(), ""):
        # The objective comes as a whole: which settings it has depends on which one it is.
        if setting.path != "objective":
            settings.append(setting)
            continue

        # In the section's place: the setting that names the objective, and those of all objectives.
        # Settings of one name with the same type, bounds, default and meaning are one.
        kind = f"one of {', '.join(OBJECTIVES)}"
        settings.append(Setting("objective.name", kind, "real", "The loss."))
        owners: dict[Setting, list[str]] = {}
        for name in OBJECTIVES:
            for own in _settings_of(make_objective(name), "objective."):
                owners.setdefault(own, []).append(name)
        for own, names in owners.items():
            settings.append(dataclasses.replace(own, objectives=tuple(names)))

    return settings


def _settings_of(section: Any, prefix: str) -> Iterator[Setting]:
    """Yields the settings of a dataclass with its defaults, and of those within it."""
    meanings = meanings_of(type(section))
    for name, hint in hints(type(section)).items():
        path = f"{prefix}{name}"
        if path == "given":
            continue  # says where settings come from, and is none
        value = getattr(section, name)
        if dataclasses.is_dataclass(value) and path != "objective":
            yield from _settings_of(value, f"{path}.")
        else:
            yield Setting(path, _kind(hint), _default(value), meanings.get(name, ""))


def meanings_of(cls: type) -> dict[str, str]:
    """Returns the docstring under each field of a dataclass, those of its bases included.

    Python does not keep them: they are read from the source.
    """
    meanings: dict[str, str] = {}
    # Bases first, so that a field that a class defines anew has its own docstring.
    # The last is `object`, which has no source in Python.
    for owner in reversed(cls.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(tree, ast.ClassDef), "the source of a class is a class"
        # A docstring is an expression of its own, behind the field that it describes.
        for field, after in zip(tree.body, tree.body[1:], strict=False):
            if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                meanings[field.target.id] = " ".join(str(after.value.value).split())
    return meanings


def _kind(hint: Any) -> str:
    """Returns what a setting takes, in words: its type and its bounds."""
    plain = plain_hint(hint)
    if get_origin(plain) is Literal:
        return f"one of {', '.join(map(str, get_args(plain)))}"
    demands = [_type(plain)]
    for marker in getattr(hint, "__metadata__", ()):
        # A bound says "must be above 0"; in a list the verb is too much.
        demands.append(marker.demand.removeprefix("must be ").removeprefix("must "))
    return ", ".join(demands)


def _type(plain: Any) -> str:
    """Returns the type of a setting in words."""
    choices = get_args(plain)
    if type(None) in choices:
        return f"{_type(choices[0])} or null"
    if get_origin(plain) is tuple:
        return f"list of: {_kind(choices[0])}"
    return _KINDS.get(plain, "keys and values")


def _default(value: Any) -> str:
    """Returns a default as a YAML file has it."""
    if value is None or isinstance(value, bool):
        # Before numbers: True is one.
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if value == "":
        return '""'
    return str(value)


def default_in_yaml(value: Any) -> Any:
    """Returns a default as YAML and JSON hold it: a list for a tuple."""
    if isinstance(value, tuple):
        return list(value)
    return value
