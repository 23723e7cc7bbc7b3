"""One line of the doctor's report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """What was found of one thing."""

    verdict: Verdict
    """`ok`; `warn`: a run works, but slower or with less; `fail`: a run would end badly."""
    name: str
    """The thing."""
    found: str
    """What it is like, in a few words."""
    remedy: str = ""
    """What to do, where the verdict is not ok."""
    nodes: tuple[str, ...] = ()
    """Hosts where it is so; empty: all of them."""

    def __str__(self) -> str:
        line = f"{self.verdict:4}  {self.name:20}  {self.found}"
        if self.nodes:
            line = f"{line} [{' '.join(self.nodes)}]"
        if self.remedy:
            line = f"{line}; {self.remedy}"
        return line


def merged(by_node: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """Returns the findings of all nodes.

    Those that are the same everywhere are there once, the others with their nodes.

    Example: merged({"n1": [Finding("ok", "torch", "2.8")], "n2": [Finding("ok", "torch", "2.7")]})
    has two lines.
    """
    names: list[str] = []
    nodes_of: dict[Finding, list[str]] = {}
    for node, findings in by_node.items():
        for finding in findings:
            names.append(finding.name)
            nodes_of.setdefault(finding, []).append(node)

    lines: list[Finding] = []
    for finding, nodes in nodes_of.items():
        # Nodes are named only where others differ.
        if len(nodes) < len(by_node):
            finding = dataclasses.replace(finding, nodes=tuple(nodes))
        lines.append(finding)
    # Stable: within a name the lines keep the order of the nodes.
    return sorted(lines, key=lambda line: names.index(line.name))
