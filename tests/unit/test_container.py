"""The Dockerfile, as far as it can be tested without docker: a real linter, and its pins resolved
on the index.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=400
    )


def test_the_linter_finds_nothing() -> None:
    completed = run("hadolint", "Dockerfile")
    assert (completed.returncode, completed.stdout) == (0, "")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (("${BASE}", "nvcr.io/nvidia/pytorch"), "DL3006"),
        (("USER 10001", "USER root"), "DL3002"),
        (("pip install --no-cache-dir .", "pip install ."), "DL3042"),
    ],
)
def test_the_linter_finds_what_is_wrong(change: tuple[str, str], rule: str, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text((ROOT / "Dockerfile").read_text().replace(*change))
    completed = run("hadolint", str(tmp_path / "Dockerfile"))
    assert completed.returncode == 1 and rule in completed.stdout


def test_the_image_holds_what_it_copies_and_nothing_of_the_user() -> None:
    """.dockerignore begins by excluding everything, and lets in what COPY takes."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    recipe = (ROOT / "Dockerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in recipe if line.startswith("COPY ")]
    copied = [name for names in copies for name in names]
    assert sorted(f"!{name}" for name in copied) == sorted(
        line for line in lines if line.startswith("!")
    )
    assert all((ROOT / name).exists() for name in copied)


def test_no_secret_and_no_root_is_in_its_layers() -> None:
    """The value of an ARG or ENV can be read from every later layer."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1].isdecimal() and int(users[-1]) > 0
    names = re.findall(r"^(?:ARG|ENV) (\w+)", "\n".join(lines), flags=re.MULTILINE)
    assert "BASE" in names
    assert not [n for n in names if re.search(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", n)]
    assert not [line for line in lines if "type=secret" in line or "type=ssh" in line]


def test_the_pins_exist_and_fit_together() -> None:
    completed = run(sys.executable, "tools/check_container.py")
    assert completed.returncode == 0, completed.stderr
    held = completed.stdout.splitlines()
    assert "megatron-core==0.19.2" in held and "math-verify==0.9.0" in held
    assert [line for line in held if line.startswith("torch==")] == ["torch==2.15.0a0+875d815502"]


@pytest.mark.grid
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pin", "VLLM=99.0.0"], "No matching distribution found for vllm==99.0.0"),
        (["--pin", "MEGATRON_CORE=0.99.0"], "megatron-core==0.99.0"),
        (["--keep-torch-pins"], "torch==2.13.0"),
    ],
)
def test_pins_that_do_not_fit_are_named(words: list[str], message: str) -> None:
    completed = run(sys.executable, "tools/check_container.py", *words)
    assert completed.returncode == 1
    assert message in " ".join(completed.stderr.split())
