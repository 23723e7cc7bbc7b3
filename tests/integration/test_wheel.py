"""A built wheel works outside of the checkout: commands, public functions and a
training of two steps.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.integration.conftest import ROOT
from tests.integration.test_starts import untrained

__all__ = ["untrained"]

CONFIG = """\
trainer: {steps: 2, run_dir: run, tensorboard: false}
model: {dtype: fp32}
data: {max_prompt_tokens: 16}
rollout: {engine: transformers, num_prompts: 4, group_size: 4, max_response_tokens: 8}
batch: {minibatch_prompts: 2, max_tokens: 4096}
labels: {workers: 1}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of a wheel, as pip lays them into site-packages."""
    place = tmp_path_factory.mktemp("wheel")
    # A copy of what git knows: setuptools writes its build folder beside the sources.
    source = place / "source"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "megatron_real", "setup.py", "pyproject.toml", "README.md"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, tracked.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-c", "import setuptools.build_meta as b; b.build_wheel('..')"]
    subprocess.run(build, cwd=source, check=True, capture_output=True, timeout=300)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    return place / "site"


def run(site: Path, cwd: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-W", "ignore", *words]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_plan_needs_no_checkout(site: Path, tmp_path: Path) -> None:
    shown = run(site, tmp_path, "-m", "megatron_real", "plan", "--model", "r1-distill-qwen-1.5b")
    assert "fits: " in shown


def test_metadata(site: Path) -> None:
    (file,) = site.glob("*.dist-info/METADATA")
    text = file.read_text()
    for field in ("Requires-Python: >=3.11", "Project-URL", "Classifier", "Summary"):
        assert field in text, f"{field} is missing"
    (entry_points,) = site.glob("*.dist-info/entry_points.txt")
    assert "megatron-real = megatron_real.cli:main" in entry_points.read_text()


USES = """\
import sys
import megatron_real
from megatron_real import cli

print(megatron_real.__file__)
[getattr(megatron_real, name) for name in megatron_real.__all__]
assert set(megatron_real.__all__) <= set(dir(megatron_real))
assert cli.main(["train", "run.yaml", *sys.argv[1:]]) == 0
assert cli.main(["convert", "to-megatron", "run", "megatron"]) == 0
assert cli.main(["convert", "verify", "run", "megatron"]) == 0
"""


def test_its_functions_two_steps_of_training_and_a_conversion(
    site: Path, tmp_path: Path, untrained: Path
) -> None:
    """In one interpreter, whose package is that of the wheel."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    paths = [f"model.path={untrained}", f"data.train={untrained}/train.jsonl"]
    assert run(site, tmp_path, "-c", USES, *paths).startswith(str(site))
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
