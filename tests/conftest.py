"""Options and models shared by all tests."""

from __future__ import annotations

import fcntl
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.amount import ALL
from tests.costs import Recorder, name_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the long grids too")
    parser.addoption(
        "--base", metavar="DIR", help="the quickstart's base model, made before or meanwhile"
    )
    parser.addoption(
        "--costs", metavar="FILE", help="record the CPU time of each test, and show it"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--all"):
        os.environ[ALL] = "1"
    if file := config.getoption("--costs"):
        config.pluginmanager.register(Recorder(Path(file)))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the long grids out, and lays the rest out for two lanes."""
    if not config.getoption("--all"):
        left_out = [item for item in items if item.get_closest_marker("grid")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("grid")]

    for item in items:
        file = item.nodeid.partition("::")[0]
        shares = file.startswith(("tests/integration/", "tests/faults/"))
        if shares and not item.get_closest_marker("xdist_group"):
            # The tests of a file share the runs that its fixtures make, and those on Slurm one
            # cluster: two would number their jobs alike, and jobs take their ports by number.
            on_slurm = file.startswith("tests/integration/slurm/")
            item.add_marker(pytest.mark.xdist_group("slurm" if on_slurm else Path(file).stem))
    # Lanes take tests in this order: what is short comes last and evens them out.
    items.sort(key=_place_in_line)


LONGEST = ("test_resume", "test_server", "test_train", "test_eval")
"""Files of tests/integration by what they cost (docs/testing.md)."""
FIRST = ("test_vllm", "test_slurm")
"""Files of the two groups that take longest by the clock: one lane has each from the beginning on.

They are all tests with vLLM, whose first ones need no base model, which tests/run.sh makes
meanwhile, and those on Slurm, which mostly wait for jobs.
"""
DIRECTORIES = ("distributed", "integration", "faults", "unit")
"""Those of tests/distributed need no base model either."""


def _place_in_line(item: pytest.Item) -> tuple[int, int]:
    file = item.path
    if file.stem in FIRST:
        return -1, FIRST.index(file.stem)
    directory = next((i for i, name in enumerate(DIRECTORIES) if name in file.parts), 0)
    by_cost = len(LONGEST)
    if file.stem in LONGEST:
        by_cost = LONGEST.index(file.stem)
    return directory, by_cost


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_node_collection_finished(ids: list[str]) -> None:
    """Refuses lanes that would not keep the tests of a group together.

    pytest-xdist tells a group by the end of a test's name, which it changes where pytest lets it.
    Without groups nothing fails, but each lane makes all servers and runs for itself.
    """
    grouped = any(name.startswith("tests/integration/") for name in ids)
    if grouped and all(name_of(name) == name for name in ids):
        pytest.exit(
            f"pytest {pytest.__version__} ignores the groups of this pytest-xdist, so that "
            "lanes would start each server twice: install pytest<9.2",
            returncode=pytest.ExitCode.USAGE_ERROR,
        )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Shows the command that repeats just the tests that failed."""
    failed = terminalreporter.stats.get("failed", []) + terminalreporter.stats.get("error", [])
    words = sorted({name_of(report.nodeid) for report in failed})
    if not words:
        return

    if config.getoption("--all"):
        words.append("--all")
    # tests/run.sh sets it for the second version of megatron-core, which has no vLLM.
    version = os.environ.get("MEGATRON_CORE")
    prefix = ""
    if version:
        prefix = f"MEGATRON_CORE={version} VLLM_CPU= "
    terminalreporter.section("to repeat what failed")
    terminalreporter.write_line(f"{prefix}bash tests/run.sh {shlex.join(words)}")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Makes a file or directory once for all lanes: `once(name, make)` returns the path that
    make(path) filled.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # each lane has a folder of its own in it

    def path_of(name: str, make: Callable[[Path], None]) -> Path:
        path = folder / "once" / name
        path.parent.mkdir(exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                make(path)
        return path

    return path_of


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes, once per set of sizes, an HF directory with a random model whose
    every weight matters.
    """
    import torch
    import transformers

    made: dict[tuple[object, ...], Path] = {}

    def make(
        family: str = "qwen2",
        *,
        seed: int = 0,
        moved: float = 0.0,
        dtype: str = "float64",
        **sizes: object,
    ) -> Path:
        """`moved`: standard deviation of noise on top of the same weights,
        for a policy that has been updated.
        """
        key = (family, seed, moved, dtype, str(sorted(sizes.items())))
        if key not in made:
            shape = {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 101,
                "max_position_embeddings": 256,
                "tie_word_embeddings": False,
                "rms_norm_eps": 1e-6,
            } | sizes
            name = {"qwen2": "Qwen2", "llama": "Llama", "qwen3": "Qwen3"}[family]
            torch.manual_seed(seed)
            config = getattr(transformers, f"{name}Config")(**shape)
            model = getattr(transformers, f"{name}ForCausalLM")(config).double()
            # Biases start at 0 and norms at 1: all of them move, vectors further than matrices.
            for parameter in model.parameters():
                scale = 0.1 if parameter.dim() > 1 else 0.2
                parameter.data += torch.randn_like(parameter) * scale
            for parameter in model.parameters():
                parameter.data += moved * torch.randn_like(parameter)
            path = tmp_path_factory.mktemp("model")
            model.to(getattr(torch, dtype)).save_pretrained(path)
            made[key] = path
        return made[key]

    return make
