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
        where = f" [{' '.join(self.nodes)}]" if self.nodes else ""
        return f"{self.verdict:4}  {self.name:20}  {self.found}{where}" + (
            f"; {self.remedy}" if self.remedy else ""
        )


def merged(by_node: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    """The findings of all nodes, those that are the same everywhere once, the others with their
    nodes.

    Example: merged({"n1": [Finding("ok", "torch", "2.8")], "n2": [Finding("ok", "torch", "2.7")]})
    has two lines.
    """
    where: dict[Finding, list[str]] = {}
    names = [finding.name for findings in by_node.values() for finding in findings]
    for node, findings in by_node.items():
        for finding in findings:
            where.setdefault(finding, []).append(node)
    lines = [
        dataclasses.replace(finding, nodes=() if len(nodes) == len(by_node) else tuple(nodes))
        for finding, nodes in where.items()
    ]
    return sorted(
        lines, key=lambda line: names.index(line.name)
    )  # stable: the nodes' order within a name
