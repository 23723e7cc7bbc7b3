"""What may change between a run and its resumption. Loadable without torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

REFUSED: Mapping[str, str] = {
    "trainer.seed": "the order of the prompts and all sampling depend on it",
    "data.shuffle": "the order of the prompts depends on it",
    "model.dtype": "the optimizer's state has another form",
    "objective.name": "one run would optimise two objectives",
    "objective.variant": "one run would optimise two objectives",
    "optimizer.beta1": "the saved moments were gathered with it",
    "optimizer.beta2": "the saved moments were gathered with it",
    "rollout.replay": "the rollouts come from elsewhere",
}
"""Settings that a resumed run may not change, with the reason. (Other prompts are refused by the
prompt cursor.)"""

_WITHIN_A_STEP = (
    "batch.minibatch_prompts",
    "rollout.num_prompts",
    "rollout.group_size",
    "rollout.temperature",
    "objective.",
)
"""Beginnings of the settings that may change between two steps and not within one."""
_BEFORE: Mapping[str, Any] = {"objective.name": "real"}
"""What a run did whose configuration does not have the setting, as an earlier version wrote it."""
_UNSAID = ("trainer.run_dir",)
"""Settings whose change is not mentioned: a run directory may be moved."""


def changes(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, value before, value now) of every setting that differs.

    A setting that one of them lacks is None there.
    """
    # In the order of the earlier file, then what is new.
    for name in [*before, *(name for name in now if name not in before)]:
        path = f"{prefix}{name}"
        # An earlier version did not know the newer settings: _BEFORE says what it did
        # in their place.
        old = before.get(name, _BEFORE.get(path))
        new = now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from changes(old, new, f"{path}.")
        elif _plain(old) != _plain(new) and path not in _UNSAID:
            yield path, old, new


def check_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], *, within_a_step: bool
) -> list[str]:
    """Returns a line for each setting that changed.

    Args:
        before: the configuration of an earlier life.
        now: that of this life.
        within_a_step: the checkpoint was saved between two updates of one step.

    Raises:
        ValueError: one of them may not; names it, both values and the reason.
    """
    lines = []
    for name, old, new in changes(before, now):
        reason = REFUSED.get(name)
        # str.startswith takes a tuple. "objective." stands for every setting of the section.
        if reason is None and within_a_step and name.startswith(_WITHIN_A_STEP):
            reason = "the checkpoint is in the middle of a step that was begun with it"
        if reason is not None:
            raise ValueError(
                f"{name} was {old!r} and is now {new!r}, which a resumed run may not change: "
                f"{reason}; set {name}={old}, or give another trainer.run_dir"
            )

        lines.append(f"{name}: {old!r} -> {new!r}")
    return lines


def _plain(value: Any) -> Any:
    # YAML has no tuples: a configuration that was read has lists in their place.
    return list(value) if isinstance(value, tuple) else value
