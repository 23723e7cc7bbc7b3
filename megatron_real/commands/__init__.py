"""The commands of `megatron-real`, a module each, and all of one form.

    add(parser)      gives an argparse parser the command's arguments
    run(options)     runs it, and returns its exit code

A module's SUMMARY says in a line what the command does, which `--help` shows; its EXAMPLES stand at
the end of the command's own help. A new command is a module here and a row in `COMMANDS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

from megatron_real.commands import (
    compare,
    config,
    convert,
    doctor,
    eval,
    labels,
    plan,
    rehearse,
    report,
    rollouts,
    serve,
    train,
)

COMMANDS: Mapping[str, ModuleType] = {
    "train": train,
    "eval": eval,
    "compare": compare,
    "plan": plan,
    "rehearse": rehearse,
    "doctor": doctor,
    "config": config,
    "convert": convert,
    "labels": labels,
    "report": report,
    "rollouts": rollouts,
    "serve": serve,
}
"""By name, in the order in which help lists them."""
