"""`megatron-real config [PREFIX ...]`: what can be configured.

With `--schema` the same for editors, as a JSON schema.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap

from megatron_real.commands.terminal import hanging
from megatron_real.config.describe import every_setting
from megatron_real.config.json_schema import json_schema
from megatron_real.config.names import closest
from megatron_real.errors import Refused
from megatron_real.objective.registry import OBJECTIVES

SUMMARY = "explain every setting: type, default, bounds, meaning"
EXAMPLES = """\
examples:
  megatron-real config                          all settings
  megatron-real config rollout.sync batch       those that begin so
  megatron-real config objective.clip           with the objectives that have it
  megatron-real config --schema > schema.json   for editors

Then in a YAML file: # yaml-language-server: $schema=schema.json
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
    all_settings = every_setting()
    # startswith(()) is False for everything, so that no prefix must be asked for by itself.
    settings = [s for s in all_settings if not prefixes or s.path.startswith(prefixes)]
    if not settings:
        # One path may have several meanings, one for each kind of objective.
        names = closest(prefixes[0], {setting.path for setting in all_settings})
        raise Refused(
            f"no setting begins with {' or '.join(prefixes)}; the nearest are {', '.join(names)}"
        )

    for setting in settings:
        head = f"{setting.path} = {setting.default}   ({setting.kind})"
        # Named only where not every objective has the setting; no names mean that all have it.
        if len(setting.objectives) not in (0, len(OBJECTIVES)):
            head += f"  [{', '.join(setting.objectives)}]"
        print(hanging(head, 4))
        print(textwrap.indent(textwrap.fill(setting.meaning, _WIDTH - 4), "    "))
    return 0
