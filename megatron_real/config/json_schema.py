"""A JSON schema of a run's YAML file, made of the dataclasses.

Editors complete and check with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args, get_origin

from megatron_real.bounds import Above, AtLeast, Between, OneOf, hints, plain_hint
from megatron_real.config.describe import default_in_yaml, meanings_of
from megatron_real.config.schema import Config
from megatron_real.objective.registry import OBJECTIVES, make_objective

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}
_INTERPOLATION = {"type": "string", "pattern": r"^\$\{.*\}$"}


def json_schema() -> dict[str, Any]:
    """Returns the schema (draft 2020-12).

    Every value may also be an interpolation such as `${oc.env:NAME}`.
    """
    schema = _section(Config())

    # The settings of all objectives together: which of them has which is checked when the file is
    # loaded. Where two have other defaults or bounds for one name, neither is said.
    properties: dict[str, Any] = {}
    for name in OBJECTIVES:
        for setting, own in _section(make_objective(name))["properties"].items():
            known = properties.setdefault(setting, own)
            if known != own:
                properties[setting] = {"description": known.get("description", "")}

    properties["name"] = {"enum": list(OBJECTIVES), "default": "real", "description": "The loss."}
    objective = {"type": "object", "additionalProperties": False, "properties": properties}
    schema["properties"]["objective"] = objective

    # Not in the dataclasses: it is gone once the file is read.
    schema["properties"]["base"] = {
        "type": "string",
        "description": "Another YAML file, whose values this one changes.",
    }

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "megatron_real configuration",
        **schema,
    }


def _section(section: Any) -> dict[str, Any]:
    """Returns the schema of a dataclass, whose values are the defaults."""
    meanings = meanings_of(type(section))
    properties: dict[str, Any] = {}
    for name, hint in hints(type(section)).items():
        if name == "given":
            continue  # says where settings come from, and is none
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            properties[name] = _section(value)
        else:
            properties[name] = {**_value(hint), "default": default_in_yaml(value)}

        if meanings.get(name):
            properties[name]["description"] = meanings[name]

    return {"type": "object", "additionalProperties": False, "properties": properties}


def _value(hint: Any) -> dict[str, Any]:
    """Returns the schema of a single setting."""
    plain = plain_hint(hint)
    if get_origin(plain) is Literal:
        return {"enum": list(get_args(plain))}

    choices = get_args(plain)
    # Of `X | None`, the first choice is X.
    if type(None) in choices:
        value = {**_value(choices[0]), **_bounds(hint)}
        return {"anyOf": [value, _INTERPOLATION, {"type": "null"}]}
    if get_origin(plain) is tuple:
        return {"type": "array", "items": _value(choices[0])}
    if plain not in _TYPES:
        return {"type": "object"}

    value = {"type": _TYPES[plain], **_bounds(hint)}
    if plain is str:
        return value  # an interpolation is text as well
    return {"anyOf": [value, _INTERPOLATION]}


def _bounds(hint: Any) -> dict[str, Any]:
    """Returns the bounds of a setting, as the words of JSON schema have them."""
    bounds: dict[str, Any] = {}
    # Annotated keeps them, as markers of megatron_real/bounds.py.
    for marker in getattr(hint, "__metadata__", ()):
        if isinstance(marker, Above):
            bounds["exclusiveMinimum"] = marker.low
        elif isinstance(marker, AtLeast):
            bounds["minimum"] = marker.low
        elif isinstance(marker, Between):
            bounds["exclusiveMinimum" if marker.above_low else "minimum"] = marker.low
            bounds["exclusiveMaximum" if marker.below_high else "maximum"] = marker.high
        elif isinstance(marker, OneOf):
            bounds["enum"] = list(marker.choices)
    return bounds
