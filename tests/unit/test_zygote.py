"""A forked command behaves like a new process in everything that tests look at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import zygote
from tests.amount import core, cover, on_first_version

PROGRAM = """
import os, sys, threading, atexit
atexit.register(print, "the end")
own_session = os.getsid(0) == os.getpid()
print(sys.argv[1:], __name__, sys.stdin.read(), os.getcwd(), sorted(os.environ), own_session)
print("a warning", file=sys.stderr)
threading.Thread(target=print, args=["a thread"]).start()
sys.exit({code!r})
"""


@pytest.mark.parametrize("code", [0, 3, "a sentence"])
def test_a_forked_command_behaves_like_a_new_process(tmp_path: Path, code: object) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(code=code))
    answers = []
    for start in (subprocess.Popen, zygote.Popen):
        process: subprocess.Popen[str] = start(
            [sys.executable, str(program), "one", "two"],
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "HOME": "/", "LC_CTYPE": "C.UTF-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        output = process.communicate("what it reads", timeout=240)
        answers.append((process.returncode, *output))

    assert answers[0] == answers[1]
    assert answers[0][0] == (code if isinstance(code, int) else 1)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 1)],
)
def test_signals_end_a_forked_command(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """SIGINT raises an exception, as in a process whose parent does not ignore it."""
    program = tmp_path / "program.py"
    program.write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n")
    process: Any = zygote.Popen([sys.executable, str(program)], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "up\n" and process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == code
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)


IS_FORK = "import os, sys; print('torch' in sys.modules, os.getpgid(0), os.getppid(), flush=True)\n"


def test_a_server_is_a_fork_of_its_guard_and_ends_with_its_group(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"{IS_FORK}import time\ntime.sleep(600)\n")
    guard = zygote.ROOT / "megatron_real/rollout/vllm_server/guard.py"
    process: Any = zygote.Popen(
        [sys.executable, str(guard), sys.executable, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    assert process.stdout.readline() == f"True {process.pid} {process.pid}\n"

    process.stdin.close()
    assert process.wait(timeout=240) == -signal.SIGKILL
    assert process.stdout.read() == "", "nobody has the stream any more"


@pytest.mark.parametrize("code", [0, 3])
def test_a_shell_scripts_python_is_a_fork(tmp_path: Path, code: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(f"{IS_FORK}print(sys.argv[1:], sys.stdin.read())\nsys.exit({code})\n")
    environment = os.environ | {"PATH": zygote.add_interpreter(tmp_path, "plain")}
    completed = subprocess.run(
        ["bash", "-c", f"echo input | python {program} one two"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )

    assert completed.returncode == code, completed.stderr

    first, second = completed.stdout.splitlines()[:2]
    assert first.startswith("True ") and second == "['one', 'two'] input"


def test_a_cover_has_each_value_by_default() -> None:
    # Of the six pairs, three are enough for each of the five values.
    rows = cover("ab", "cde")
    core = [row.values for row in rows if not row.marks]
    assert core == [("a", "c"), ("a", "e"), ("b", "d")]
    assert len(rows) == 6


def test_a_core_is_kept_and_the_rest_is_of_the_grid() -> None:
    rows = core("abc", "ca")
    assert [row.values for row in rows if not row.marks] == [("a",), ("c",)]
    assert [row.values for row in rows] == [("a",), ("b",), ("c",)]


def test_these_tests_run_on_the_first_version() -> None:
    """If the version were unknown, tests of one version would be thinned out on both."""
    assert on_first_version()
