"""Runs from Python: the notebook from top to bottom, and what a further run in one
process finds of those before.
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

RUNS = """\
import gc, signal, sys, threading
import psutil
import megatron_real


sigint_handler = signal.getsignal(signal.SIGINT)
losses = {}
for run_of_engine in sys.argv[2].split(","):
    name, engine = run_of_engine.split("=")
    words = [*sys.argv[3:], f"trainer.run_dir={sys.argv[1]}/{name}", f"rollout.engine={engine}"]
    run = megatron_real.train(megatron_real.load_config("examples/configs/quickstart.yaml", words))
    assert run.status()["state"] == "finished"
    assert run.steps() == [1, 2]
    losses.setdefault(engine, []).append([row["loss"] for row in run.metrics()])
    assert len(run.rollout_rows(2)) == len(run.rollouts(2)) == 64
    assert signal.getsignal(signal.SIGINT) is sigint_handler, "the run has kept Ctrl-C for itself"
    assert not psutil.Process().children(), "the run has left its verifiers or its servers"

    gc.collect()
    names = {type(o).__name__ for o in gc.get_objects()}
    left = names & {"Policy", "PolicyModel", "DistributedDataParallel"}
    assert not left, f"the run's weights and optimizer are still in memory: {left}"
    # vLLM's bars of progress leave their clock running, one for the whole process. The others have
    # been told to end.
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and thread.name != "tqdm_monitor":
            thread.join(60)
    threads = [t.name for t in threading.enumerate() if t.name != "tqdm_monitor"]
    assert len(threads) == 1, threads
for engine, of_runs in losses.items():
    assert all(of_run == of_runs[0] for of_run in of_runs), (engine, of_runs)
"""


@pytest.mark.parametrize(
    "runs",
    [
        "first=transformers,second=transformers,first=transformers",
        pytest.param(
            "first=vllm,between=transformers,second=vllm",
            marks=[pytest.mark.grid, pytest.mark.xdist_group("vllm")],
        ),
        pytest.param(
            "first=vllm-server,second=vllm-server",
            marks=[pytest.mark.grid, pytest.mark.xdist_group("vllm")],
        ),
    ],
)
def test_runs_in_one_process_are_equal_and_leave_nothing_behind(
    base: Path, tmp_path: Path, runs: str
) -> None:
    if "vllm" in runs:
        pytest.importorskip("vllm", reason="vLLM is not installed")
    script = tmp_path / "runs.py"
    script.write_text(RUNS)
    paths = [f"model.path={base}", f"data.train={base}/train.jsonl"]
    python(script, tmp_path, runs, *SHORT, *paths)


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
        short = "trainer.steps=2", "rollout.num_prompts=32", "evaluation.max_problems=20"
        cell.source = cell.source.replace('"trainer.steps=8"', ", ".join(map(repr, short)))
    client = nbclient.NotebookClient(
        notebook, timeout=400, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()

    printed = json.dumps(notebook.cells)
    assert printed.count("image/png") == 2, "both figures are drawn"
    assert "UserWarning" not in printed and "FutureWarning" not in printed
