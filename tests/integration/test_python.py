"""Runs from Python: the notebook from top to bottom, and what a second run in one
process finds of the first.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import megatron_real
from tests.integration.conftest import ROOT, python

SHORT = [
    "trainer.steps=2",
    "trainer.export=false",
    "trainer.tensorboard=false",
    "rollout.num_prompts=8",
    "batch.minibatch_prompts=4",
    "data.heldout=",
]

TWO_RUNS = """\
import signal, sys, threading
import psutil
import megatron_real


heard = signal.getsignal(signal.SIGINT)
losses = []
for name in ("first", "second", "first"):
    words = [*sys.argv[2:], f"trainer.run_dir={sys.argv[1]}/{name}"]
    run = megatron_real.train(megatron_real.load_config("examples/configs/quickstart.yaml", words))
    assert run.status()["state"] == "finished"
    assert run.steps() == [1, 2]
    losses.append([row["loss"] for row in run.metrics()])
    assert len(run.rollout_rows(2)) == len(run.rollouts(2)) == 64
    assert signal.getsignal(signal.SIGINT) is heard, "the run has kept Ctrl-C for itself"
    assert not psutil.Process().children(), "the run has left its verifiers"
    assert threading.active_count() == 1, threading.enumerate()
assert losses[0] == losses[1] == losses[2], losses
"""


def test_two_runs_in_one_process_are_equal_and_leave_nothing_behind(
    base: Path, tmp_path: Path
) -> None:
    script = tmp_path / "two_runs.py"
    script.write_text(TWO_RUNS)
    paths = [f"model.path={base}", f"data.train={base}/train.jsonl"]
    python(script, tmp_path, *SHORT, *paths)


def test_a_directory_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"status\.json"):
        megatron_real.RunRecords(tmp_path)


def test_the_notebook_runs_from_top_to_bottom(base: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="the extra `notebook` is not installed")
    pytest.importorskip("pandas", reason="the extra `notebook` is not installed")
    nbformat = pytest.importorskip("nbformat")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    (tmp_path / "runs/quickstart/base").symlink_to(base)

    notebook = nbformat.read(ROOT / "examples/train_from_python.ipynb", as_version=4)
    for cell in notebook.cells:  # a short run shows as well that it runs
        cell.source = cell.source.replace("trainer.steps=8", "trainer.steps=2")
    client = nbclient.NotebookClient(
        notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()

    printed = json.dumps(notebook.cells)
    assert printed.count("image/png") == 2, "both figures are drawn"
    assert "UserWarning" not in printed and "FutureWarning" not in printed
