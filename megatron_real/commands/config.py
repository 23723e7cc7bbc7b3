"""`megatron-real config [PREFIX ...]`: what can be configured; `--schema`: the same for editors, as a JSON schema."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap

from megatron_real.commands.terminal import refuse
from megatron_real.config.describe import Setting, every_setting
from megatron_real.config.json_schema import json_schema
from megatron_real.config.names import closest
from megatron_real.objective.registry import OBJECTIVES

SUMMARY = "explain every setting: type, default, bounds, meaning"
EXAMPLES = """\
examples:
  megatron-real config                             all settings
  megatron-real config rollout.sync batch          those that begin so
  megatron-real config objective.clip              with the objectives that have it
  megatron-real config --schema > schema.json      for editors; then in a YAML file:
                                                   # yaml-language-server: $schema=schema.json
"""

_WIDTH = 80


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("prefixes", nargs="*", metavar="PREFIX", help="for example rollout.sync")
    parser.add_argument("--schema", action="store_true", help="print a JSON schema of a YAML file")


def run(options: argparse.Namespace) -> int:
    """Prints the settings that begin with one of the prefixes; returns the exit code."""
    if options.schema:
        json.dump(json_schema(), sys.stdout, indent=1)
        print()
        return 0

    prefixes = tuple(options.prefixes)
    listed = every_setting()
    settings = [s for s in listed if not prefixes or s.path.startswith(prefixes)]
    if not settings:
        names = closest(prefixes[0], [setting.path for setting in listed])
        return refuse(
            ValueError(
                f"no setting begins with {' or '.join(prefixes)}; the nearest are {', '.join(names)}"
            )
        )
    for setting in settings:
        print(_text(setting))
    return 0


def _text(setting: Setting) -> str:
    objectives = f"  [{', '.join(setting.objectives)}]"
    of_every_objective = len(setting.objectives) in (0, len(OBJECTIVES))
    head = f"{setting.path} = {setting.default}   ({setting.kind})"
    if not of_every_objective:
        head += objectives
    return f"{head}\n{textwrap.indent(textwrap.fill(setting.meaning, _WIDTH - 4), '    ')}"
