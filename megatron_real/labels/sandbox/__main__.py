"""Builds a sandbox and prints which rung it reached, as JSON: `this_node` runs it."""

from __future__ import annotations

import json
import sys

from megatron_real.labels.sandbox.supervisor import end_like, supervise
from megatron_real.labels.sandbox.walls import Outside, enclose


def _probe(outside: Outside) -> int:
    walls = enclose(outside, [])
    json.dump({"rung": walls.rung.value, "why": walls.why}, sys.stdout)
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    end_like(supervise(_probe, namespaces=True))
