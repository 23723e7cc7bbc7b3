"""Imports run one way: a module imports its own package and the layers below it, and nothing else
of this project.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "megatron_real"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("disk", "numerics", "buffers", "pinned", "challenge", "bounds", "progress"),
    ("records", "errors"),
    ("objective",),
    ("config",),
    ("parallel", "labels", "batching"),
    ("prompts",),
    ("weights",),
    ("conversion",),
    ("policy", "rollout"),
    ("evaluation", "supervision"),
    ("runs",),
    ("checkpoint",),
    ("job", "doctor", "plan", "launcher", "compare", "report"),
    ("loop", "rehearsal"),
    ("session",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
"""From the bottom up. Packages and modules of one layer do not know each other."""

KNOWN = {
    ("config", "weights"): (
        "the checks of a layout ask the one reader of config.json, weights/architecture.py; it "
        "knows neither torch nor "
        "the configuration, and belongs below the two"
    ),
}
"""(importing, imported) pairs that break the rule, each with the reason why it still does."""


def layer_of(name: str) -> int:
    """Returns the number of the layer of a package or module."""
    for number, names in enumerate(LAYERS):
        if name in names:
            return number
    raise AssertionError(f"megatron_real.{name} is in no layer of {__file__}; add it to LAYERS")


def imported(source: str) -> Iterator[tuple[int, str]]:
    """Yields (line, top-level name) of every import of this project in a source, those inside
    functions too.
    """
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif node.module == "megatron_real":
            modules = [f"megatron_real.{alias.name}" for alias in node.names]
        else:
            assert node.level == 0, f"line {node.lineno}: imports are absolute in this project"
            modules = [node.module or ""]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "megatron_real" and len(parts) > 1:
                yield node.lineno, parts[1]


def violations(name: str, source: str) -> list[str]:
    """Returns a line for each import of `source`, a file of `name`, that does not run downwards."""
    return [
        f"line {line} imports megatron_real.{other}"
        for line, other in imported(source)
        if other != name and layer_of(other) >= layer_of(name) and (name, other) not in KNOWN
    ]


FILES = sorted(file.relative_to(PACKAGE) for file in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("folder", sorted({file.parts[0] for file in FILES}))
def test_imports_run_downwards(folder: str) -> None:
    if folder == "__init__.py":
        return  # the package's own face: it shows names of any layer, and nothing imports it
    files = [file for file in FILES if file.parts[0] == folder]
    name = folder.removesuffix(".py")
    for file in files:
        wrong = violations(name, (PACKAGE / file).read_text(encoding="utf-8"))
        assert not wrong, f"megatron_real/{file}: {'; '.join(wrong)}; its layer is {layer_of(name)}"


def test_the_device_is_named_in_one_way() -> None:
    """torch.cuda's own answer needs a GPU, or the emulation of one; cpu.device() needs neither."""
    asks_cuda = [
        str(file)
        for file in FILES
        if "current_device" in (PACKAGE / file).read_text(encoding="utf-8")
    ]
    emulated = [name for name in asks_cuda if name.startswith("rehearsal")]
    assert sorted(set(asks_cuda) - set(emulated)) == ["parallel/cpu.py"]


def test_every_known_violation_still_exists() -> None:
    """The entry of a violation that has been mended must be deleted."""
    for name, other in KNOWN:
        files = [file for file in FILES if file.parts[0].removesuffix(".py") == name]
        sources = [(PACKAGE / file).read_text(encoding="utf-8") for file in files]
        present = {imported_name for source in sources for _, imported_name in imported(source)}
        assert other in present, f"{name} no longer imports {other}; take the entry out of KNOWN"


@pytest.mark.parametrize(
    "source",
    [
        "from megatron_real.runs.directory import RunDirectory",
        "import megatron_real.cli",
        "def late():\n    from megatron_real import loop",
        "from megatron_real.policy.policy import Policy",
    ],
)
def test_an_import_upwards_or_sideways_is_seen(source: str) -> None:
    assert violations("rollout", source)
    assert not violations("rollout", "from megatron_real.weights.mapping import Weights")
