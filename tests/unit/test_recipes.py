"""The paper's recipe for its two models: the configurations load, fit the models, and run on 8 to 64 GPUs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megatron_real import config
from megatron_real.config import Config

ROOT = Path(__file__).parents[2]
SHAPES = {  # of the DeepSeek-R1-Distill-Qwen models: heads, KV heads, hidden, ffn, vocabulary
    "1.5b": (12, 2, 1536, 8960, 151936),
    "7b": (28, 4, 3584, 18944, 152064),
}
GPUS_PER_NODE = 8


def recipe(model: str, tmp_path: Path) -> Config:
    heads, kv_heads, hidden, ffn, vocabulary = SHAPES[model]
    shape = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": hidden,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "intermediate_size": ffn,
        "vocab_size": vocabulary, "max_position_embeddings": 131072, "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    return config.load(ROOT / f"examples/configs/real_{model}.yaml", [f"model.path={tmp_path}"])


@pytest.mark.parametrize("model", SHAPES)
def test_recipe_is_the_papers(model: str, tmp_path: Path) -> None:
    found = recipe(model, tmp_path)
    assert (found.optimizer.lr, found.trainer.steps) == {"1.5b": (2e-6, 1400), "7b": (1e-6, 1000)}[model]
    assert (found.optimizer.weight_decay, found.optimizer.beta1, found.optimizer.beta2) == (0.01, 0.9, 0.999)
    assert (found.optimizer.clip_grad, found.optimizer.schedule) == (1.0, "constant")
    assert (found.rollout.num_prompts, found.rollout.group_size, found.batch.minibatch_prompts) == (128, 8, 32)
    assert (found.data.max_prompt_tokens, found.rollout.max_response_tokens) == (1024, 8192)
    assert (found.rollout.temperature, found.rollout.top_p, found.objective.tau) == (0.6, 1.0, 0.5)
    assert (found.evaluation.every, found.evaluation.samples) == (20, 8)
    assert found.data.suffix == r"Let's think step by step and output the final answer within \boxed{}."


@pytest.mark.parametrize("gpus", [8, 16, 32, 64])
@pytest.mark.parametrize("model", SHAPES)
def test_layout_fits_the_number_of_gpus(model: str, gpus: int, tmp_path: Path) -> None:
    found = recipe(model, tmp_path)
    copies = config.check_world(found, gpus)
    assert copies * found.parallel.tp == gpus and found.parallel.tp <= GPUS_PER_NODE
    assert found.batch.minibatch_prompts * found.rollout.group_size >= copies, "a copy without a sequence"


@pytest.mark.parametrize("script", ["real_1.5b.sh", "real_7b.sh", "slurm/job.sh", "slurm/node.sh"])
def test_scripts_parse(script: str) -> None:
    done = subprocess.run(["bash", "-n", ROOT / "examples" / script], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_both_scripts_differ_in_the_model_alone() -> None:
    small, large = ((ROOT / f"examples/real_{model}.sh").read_text() for model in SHAPES)
    assert small.replace("1.5B", "7B").replace("1.5b", "7b").replace("--nodes=1", "--nodes=2") == large
