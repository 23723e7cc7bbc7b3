"""Measures how a package's text reads: the length of functions, comments, blank lines,
dense assignments, vague names.

    python tools/measure_text.py megatron_real
    python tools/measure_text.py megatron_real path/to/another_package    # side by side

The figures say where to look, they are no goal: a file can have any of them and read badly.
"""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

VAGUE_NAMES = {"chosen", "found", "said", "told"}
LONG_BODY = 12
"""Lines from which a function's body is long enough to need paragraphs."""


@dataclass
class Figures:
    """Counts over the files of one package."""

    lines: int = 0
    """All lines that are not blank."""
    comment_lines: int = 0
    function_lines: list[int] = field(default_factory=list)
    """Of each function: the lines from `def` to its end, without the docstring."""
    long_body_lines: int = 0
    long_body_blank_lines: int = 0
    private_functions: Counter[str] = field(default_factory=Counter)
    """Definitions by name; a name of two functions counts as two."""
    uses: Counter[str] = field(default_factory=Counter)
    """Every name and attribute that is read, by name."""
    tuple_assignments: int = 0
    ternaries: int = 0
    vague_names: int = 0

    def add(self, source: str) -> None:
        """Adds one file.

        Raises:
            SyntaxError: the source is no Python.
        """
        lines = source.splitlines()
        self.lines += sum(1 for line in lines if line.strip())
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.comment_lines += sum(1 for token in tokens if token.type == tokenize.COMMENT)

        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._add_function(node, lines)
            elif isinstance(node, ast.Assign):
                pairs = zip(node.targets, [node.value] * len(node.targets), strict=True)
                self.tuple_assignments += sum(
                    isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                    for target, value in pairs
                )
            elif isinstance(node, ast.IfExp):
                self.ternaries += 1
            elif isinstance(node, ast.Name):
                self.vague_names += node.id in VAGUE_NAMES
                self.uses[node.id] += isinstance(node.ctx, ast.Load)
            elif isinstance(node, ast.arg):
                self.vague_names += node.arg in VAGUE_NAMES
            elif isinstance(node, ast.Attribute):
                self.uses[node.attr] += isinstance(node.ctx, ast.Load)

    def _add_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> None:
        first = node.body[0]
        docstring = 0
        if ast.get_docstring(node) is not None:
            docstring = (first.end_lineno or first.lineno) - first.lineno + 1
        end = node.end_lineno or node.lineno
        self.function_lines.append(end - node.lineno + 1 - docstring)

        if node.name.startswith("_") and not node.name.startswith("__"):
            self.private_functions[node.name] += 1

        body = lines[first.lineno - 1 + docstring : end]
        if len(body) >= LONG_BODY:
            self.long_body_lines += len(body)
            self.long_body_blank_lines += sum(1 for line in body if not line.strip())

    def rows(self) -> dict[str, str]:
        """The table's rows: what is measured, and its figure."""
        # A directory may hold no function, or only empty files; what is a share of nothing is 0.
        lines = max(self.lines, 1)
        thousands = lines / 1000
        once = sum(n for name, n in self.private_functions.items() if self.uses[name] == n)
        functions = len(self.function_lines)
        function_lines = self.function_lines or [0]
        return {
            "lines that are not blank": f"{self.lines:,}",
            "functions: median lines": f"{statistics.median(function_lines):.0f}",
            "functions: longest": f"{max(function_lines)}",
            "functions per 1,000 lines": f"{functions / thousands:.0f}",
            "private helpers used once, of all functions": f"{once / max(functions, 1):.0%}",
            "comments, of lines": f"{self.comment_lines / lines:.1%}",
            f"blank lines in bodies of {LONG_BODY} lines or more": (
                f"{self.long_body_blank_lines / max(self.long_body_lines, 1):.1%}"
            ),
            "tuple assignments per 1,000 lines": f"{self.tuple_assignments / thousands:.1f}",
            "ternaries per 1,000 lines": f"{self.ternaries / thousands:.1f}",
            f"{', '.join(sorted(VAGUE_NAMES))} as names": f"{self.vague_names}",
        }


def measure(package: Path) -> Figures:
    """The figures of every Python file below a directory.

    Raises:
        SystemExit: there is none.
    """
    files = sorted(package.rglob("*.py"))
    if not files:
        raise SystemExit(f"{package} has no Python file; name a package's directory")
    figures = Figures()
    for file in files:
        figures.add(file.read_text(encoding="utf-8"))
    return figures


def main() -> None:
    """Prints one table with a column for each package."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", nargs="+", type=Path, help="directories of Python files")
    packages = parser.parse_args().packages

    columns = [measure(package).rows() for package in packages]
    table = Table("", *(str(package) for package in packages))
    for name in columns[0]:
        table.add_row(name, *(column[name] for column in columns))
    Console().print(table)


if __name__ == "__main__":
    main()
