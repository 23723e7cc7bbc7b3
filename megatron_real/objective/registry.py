"""The objectives by name. Torch-free: only the objective that a configuration names is imported."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_real.objective.objective import Objective

OBJECTIVES: Mapping[str, str] = {
    "real": "megatron_real.objective.real_objective:Real",
    "grpo": "megatron_real.objective.grpo:Grpo",
    "dr_grpo": "megatron_real.objective.dr_grpo:DrGrpo",
    "dapo": "megatron_real.objective.dapo:Dapo",
    "gspo": "megatron_real.objective.gspo:Gspo",
    "cispo": "megatron_real.objective.cispo:Cispo",
    "sapo": "megatron_real.objective.sapo:Sapo",
    "disco": "megatron_real.objective.disco:Disco",
    "lpo": "megatron_real.objective.lpo:Lpo",
    "conspo": "megatron_real.objective.conspo:Conspo",
}
"""Name in the configuration -> module:class."""


def objective_class(name: str) -> type[Objective]:
    """Returns the class of the objective called `name`.

    Raises:
        ValueError: there is none of that name; the sentence lists those that there are.
    """
    if name not in OBJECTIVES:
        close = difflib.get_close_matches(str(name), list(OBJECTIVES), n=1)
        hint = ""
        if close:
            hint = f"; did you mean {close[0]}?"
        raise ValueError(
            f"objective.name is {name!r}; it takes one of {', '.join(OBJECTIVES)}{hint}"
        )

    module, _, attribute = OBJECTIVES[name].partition(":")
    # Imported only now: a run pays for the objective that it uses.
    cls: type[Objective] = getattr(importlib.import_module(module), attribute)
    return cls


def make_objective(name: str = "real", **settings: Any) -> Objective:
    """Returns the objective called `name` with these settings; the others have their defaults.

    Example:
        make_objective("dapo", clip_high=0.28, kl=KlConfig(to="old", coefficient=1e-3))

    Args:
        name: one of the registry's names.
        settings: fields of that objective's class; `kl` is a KlConfig.

    Raises:
        ValueError: an unknown name, a setting that this objective does not have, or a value out of
            bounds.
    """
    import dataclasses

    from megatron_real.bounds import check_bounds

    cls = objective_class(name)
    # Python's own TypeError would name no alternatives.
    known = [f.name for f in dataclasses.fields(cls)]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{name} has no setting {setting!r}; it takes {', '.join(known)}")

    objective = cls(**settings)
    check_bounds(objective, "objective.")
    return objective
