r"""The verifier `code`: the completion's Python program has to pass the row's tests.

The program is the last complete fenced block (``` or ```python) outside the thinking. The row's
extra_info has its tests in one of these forms, and may have `setup`, code that program and tests
both begin with, and `seconds`, the limit of one test (default 5):

    {"tests": [{"stdin": "2 3\n", "stdout": "5\n"}, {"assert": "add(2, 3) == 5"}]}

    as APPS and TACO have them:
    {"inputs": ["2 3\n"], "outputs": ["5\n"]}

    as HumanEval has them:
    {"test": "def check(candidate):\n    assert candidate(2, 3) == 5", "entry_point": "add"}

    as MBPP has them:
    {"test_list": ["assert add(2, 3) == 5"], "test_setup_code": "import math"}

Asserts run in the judge. What they use and nobody defines are the program's functions; beside an
`entry_point` there are no others. A function of the program is there a stand-in that passes plain
values to the program's process and back. So the program never has an expected value in its memory,
and its objects never get to a comparison.
"""

from __future__ import annotations

import ast
import builtins
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_real.labels.answers import after_thinking
from megatron_real.labels.code.programs import Launcher, ProgramEnded, ProgramLimits
from megatron_real.labels.sandbox.walls import Walls

_OPENING = re.compile(r"```(?:python3?|py)?\s*")
_SECONDS = 5.0
_MAX_PROGRAM_CHARS = 100_000
_SHARE_OF_CHECK = 0.9  # of a check's time that its tests may take together
_STATUSES_SHOWN = 20


@dataclass(frozen=True)
class Test:
    """One test of a row."""

    asserts: str = ""
    """Code of asserts; empty: a program is run on `stdin` and has to print `stdout`."""
    candidate: str = ""
    """The function that `check(candidate)`, which the asserts define, is called with; empty:
    nothing is called."""
    stdin: str = ""
    """What the program reads."""
    stdout: str = ""
    """What it has to print, blanks at the ends of lines aside."""


class CodeVerifier:
    """Judges completions by running their programs.

    It lives in a worker; each check runs in a child of its own.
    """

    def __init__(self, *, require_think: bool, partial: bool, seconds: float, memory: int) -> None:
        """Takes the settings; `start` makes it usable.

        Args:
            require_think: no program counts without a closing mark of thinking before it.
            partial: the reward is the share of passed tests; else 1 if all pass, and the first
                failure ends the check.
            seconds: wall clock of one check, all tests together.
            memory: bytes of address space of one program.
        """
        self._require_think = require_think
        self._partial = partial
        self._seconds = seconds
        self._memory = memory
        self._launcher: Launcher | None = None

    def start(self, walls: Walls) -> None:
        """Makes the launcher; before the first check, so that programs have seen none."""
        self._launcher = Launcher(walls)

    def is_usable(self) -> bool:
        """Returns whether programs can be started, so that a verdict given just now is one."""
        return self._launcher is not None and self._launcher.is_running()

    def __call__(
        self, text: str, _golds: Sequence[str], metadata: Mapping[str, Any]
    ) -> tuple[str, float | None, str]:
        """Runs the program of a completion against the tests of its row.

        Returns:
            Status, reward, and what became of each test.

        Raises:
            ValueError: the row has no tests, or they cannot be read.
        """
        tests = row_tests(metadata)
        setup = str(metadata.get("setup") or metadata.get("test_setup_code") or "")
        limit = float(metadata.get("seconds", _SECONDS))
        source = program_of(text, require_think=self._require_think)
        if source is None:
            return "unparsable", None, "no program"

        # Short of the whole: the pool's own clock kills the worker, and would lose the verdict on
        # the tests that passed.
        deadline = time.monotonic() + _SHARE_OF_CHECK * self._seconds
        statuses: list[str] = []
        for test in tests:
            left = deadline - time.monotonic()
            status = "timeout"
            if left > 0:
                status = self._status(test, setup, source, min(limit, left))
            statuses.append(status)
            if status != "ok" and not self._partial:
                break

        num_passed = statuses.count("ok")
        shown = " ".join(statuses[:_STATUSES_SHOWN])
        reason = f"{num_passed} of {len(tests)} tests passed: {shown}"
        if self._partial:
            return "score", num_passed / len(tests), reason
        if num_passed == len(tests):
            return "ok", 1.0, reason
        return "wrong", 0.0, reason

    def _status(self, test: Test, setup: str, source: str, seconds: float) -> str:
        """Runs one test, and returns `ok`, `wrong`, `error`, `timeout` or `overlong`."""
        assert self._launcher is not None, "started"
        limits = ProgramLimits(seconds, self._memory)
        program = source
        if setup:
            program = f"{setup}\n{source}"

        if not test.asserts:
            ending = self._launcher.run(program, test.stdin.encode("utf-8", "replace"), limits)
            if ending.status != "ok":
                return ending.status
            printed = ending.output.decode("utf-8", "replace")
            # Judges of programs have always forgiven blanks at the ends of lines.
            if _lines(printed) == _lines(test.stdout):
                return "ok"
            return "wrong"

        with self._launcher.functions(program, limits) as functions:
            namespace: dict[str, Any] = {"__name__": "tests"}
            # The row's own code, which comes with the data; what the model wrote runs behind
            # `functions`.
            exec(setup, namespace)
            missing = _missing_names(test.asserts, namespace)
            if test.candidate and missing - {test.candidate}:
                # As a function of the program it could say that any answer is right.
                raise ValueError(
                    f"extra_info.test uses {', '.join(sorted(missing - {test.candidate}))}, which "
                    "is neither defined in it nor the entry point; define it in extra_info.setup"
                )
            for name in missing:
                namespace[name] = functions[name]

            try:
                exec(test.asserts, namespace)
                if test.candidate:
                    namespace["check"](functions[test.candidate])
            except AssertionError:
                return "wrong"
            except ProgramEnded as ended:
                return str(ended.args[0])
            except Exception:
                # A function of the program raised it, or gave a value that the test cannot use.
                return "error"
        return "ok"


def program_of(text: str, *, require_think: bool = False) -> str | None:
    """Returns the last complete fenced block after the thinking.

    None where there is none or it is too long.
    """
    spoken, is_closed = after_thinking(text)
    if require_think and not is_closed:
        return None

    program: str | None = None
    block: list[str] | None = None  # the lines since the last opening fence
    for line in spoken.splitlines(keepends=True):
        if block is not None and line.rstrip() == "```":
            program = "".join(block)
            block = None
        elif _OPENING.fullmatch(line):
            block = []
        elif block is not None:
            block.append(line)

    if program is None or len(program) > _MAX_PROGRAM_CHARS:
        return None
    return program


def row_tests(metadata: Mapping[str, Any]) -> list[Test]:
    """Returns the tests of a row's extra_info.

    Raises:
        ValueError: it has none in a form that is known here.
    """
    match metadata:
        case {"tests": list(tests)} if tests:
            return [_test(test) for test in tests]
        case {"inputs": list(inputs), "outputs": list(outputs)} if inputs:
            if metadata.get("fn_name") or len(inputs) != len(outputs):
                raise ValueError("extra_info.inputs and outputs must be texts, one output an input")
            return [Test(stdin=str(i), stdout=str(o)) for i, o in zip(inputs, outputs, strict=True)]
        # Code that tests nothing would be passed by every program.
        case {"test": str(code), "entry_point": str(name)} if code.strip() and name:
            return [Test(asserts=code, candidate=name)]
        case {"test_list": list(asserts)} if asserts and all(str(c).strip() for c in asserts):
            return [Test(asserts=str(code)) for code in asserts]
    raise ValueError(
        "extra_info has no tests; it takes `tests`, `inputs` and `outputs`, `test` and "
        "`entry_point`, or `test_list`"
    )


def _test(test: Any) -> Test:
    """Reads one of extra_info.tests.

    Raises:
        ValueError: it is of another form.
    """
    match test:
        case {"stdin": str(stdin), "stdout": str(stdout)}:
            return Test(stdin=stdin, stdout=stdout)
        case {"assert": str(condition)}:
            return Test(asserts=f"assert {condition}")
    raise ValueError(
        f"extra_info.tests has {str(test)[:80]!r}, which is neither stdin and stdout nor assert"
    )


def _lines(text: str) -> list[str]:
    """Returns the lines without trailing blanks, and without blank lines at the end."""
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _missing_names(code: str, namespace: Mapping[str, Any]) -> set[str]:
    """Returns the names that `code` uses and nobody defines: they are the program's functions.

    A name that is defined anywhere in the code counts as defined everywhere.
    """
    used: set[str] = set()
    defined: set[str | None] = set(namespace)
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                defined.add(node.name)
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar():
                defined.add(node.name)  # None where nothing is bound
            case ast.arg():
                defined.add(node.arg)
            case ast.Import() | ast.ImportFrom():
                for alias in node.names:
                    defined.add((alias.asname or alias.name).partition(".")[0])
            case ast.Name():
                used.add(node.id)
                if isinstance(node.ctx, ast.Store):
                    defined.add(node.id)
    return {name for name in used - defined if not hasattr(builtins, name)}
