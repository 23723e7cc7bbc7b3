"""Counts tests and what they assert, here and at another commit:
a change of the tests' speed must not lose any.

    python tools/count_tests.py            # this checkout
    python tools/count_tests.py main~20    # beside that of a commit

Test functions are counted, not the parameters that each is run with (`pytest --collect-only` has
those); an assertion is an assert statement or a pytest.raises, wherever it stands below tests/.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Counts tests and assertions.")
    parser.add_argument("commit", nargs="?", help="a commit to show beside this checkout")
    options = parser.parse_args()

    here = counts(file.read_text() for file in sorted(ROOT.glob("tests/**/*.py")))
    print(f"this checkout: {here[0]} test functions, {here[1]} assertions")
    if options.commit:
        there = counts(texts_of(options.commit))
        print(f"{options.commit}: {there[0]} test functions, {there[1]} assertions")


def texts_of(commit: str) -> Iterable[str]:
    """Yields the text of each Python file below tests/ at a commit."""
    listed = git("ls-tree", "-r", "--name-only", commit, "tests")
    for file in listed.splitlines():
        if file.endswith(".py"):
            yield git("show", f"{commit}:{file}")


def counts(texts: Iterable[str]) -> tuple[int, int]:
    """Returns the numbers of test functions and of assertions in Python files."""
    tests = assertions = 0
    for text in texts:
        for node in ast.walk(ast.parse(text)):
            tests += isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            assertions += isinstance(node, ast.Assert) or is_raises(node)
    return tests, assertions


def is_raises(node: ast.AST) -> bool:
    """Whether this is the call in `with pytest.raises(...)`."""
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "raises"
    )


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


if __name__ == "__main__":
    main()
