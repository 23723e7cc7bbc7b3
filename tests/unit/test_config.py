"""The configuration: shipped files load, wrong ones are refused in one sentence with the value and the remedy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_real import config
from megatron_real.config import Config

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    sizes = {
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "intermediate_size": 8960,
        "max_position_embeddings": 16384,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(sizes))
    return tmp_path / "model"


@pytest.fixture
def file(tmp_path: Path, model: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(f"model:\n  path: {model}\nrollout:\n  num_prompts: 64\n")
    return path


@pytest.mark.parametrize("path", sorted((ROOT / "examples/configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_configurations_load(path: Path, model: Path) -> None:
    config.load(path, [f"model.path={model}"])


def test_overrides_replace_values_of_the_file(file: Path) -> None:
    loaded = config.load(file, ["optimizer.lr=1e-6", "parallel.tp=4", "megatron.overlap_grad_reduce=true"])
    assert (loaded.optimizer.lr, loaded.parallel.tp, loaded.rollout.num_prompts) == (1e-6, 4, 64)
    assert loaded.megatron == {"overlap_grad_reduce": True}


REFUSED = {
    "trainer.stepz=3": "unknown key trainer.stepz; did you mean steps?",
    "optimiser.lr=3": "unknown key optimiser; did you mean optimizer?",
    "trainer.steps=many": "trainer.steps is 'many'; it takes a whole number",
    "trainer.steps=0": "trainer.steps is 0; it must be above 0",
    "trainer=3": "trainer is 3; it is a section and takes keys below it",
    "parallel.sp=maybe": "parallel.sp is 'maybe'; it takes true or false",
    "objective.variant=grpo": "objective.variant is 'grpo'; it takes one of anchored, vanilla, bce",
    "objective.tau=0": "objective.tau is 0.0; it must be above 0",
    "rollout.top_p=0.9": "or set rollout.allow_truncated_sampling=true",
    "rollout.num_prompts=65": "batch.minibatch_prompts = 32 does not divide rollout.num_prompts = 65",
    "rollout.group_size=1": "rollout.group_size = 1 makes every group one-class",
    "rollout.retries=-1": "rollout.retries is -1; it must be 0 (off) or above",
    "rollout.refill_rounds=-1": "rollout.refill_rounds is -1; it must be 0 (off) or above",
    "rollout.max_lag=1": "rollout.max_lag = 1 needs rollout.engine=vllm-server, not auto",
    "rollout.max_lag=2": "rollout.max_lag is 2; it takes one of 0, 1",
    "rollout.engine=vllm-server rollout.max_lag=1 rollout.refill_rounds=1": "set the former or the latter to 0",
    "rollout.num_servers=2": "need rollout.engine=vllm-server, not auto",
    "rollout.engine=vllm-server rollout.servers=[a:1]": "rollout.servers has 'a:1'; an address is of the form http://",
    "rollout.engine=vllm-server model.dtype=fp64": "model.dtype=fp64 is not known to vLLM",
    "labels.excluded=[wrong,ok]": "labels.excluded is 'ok'; it takes one of wrong, unparsable, timeout, crashed",
    "labels.verifier=own.py:judge labels.require_think=true": "which is given the whole text",
    "batch.max_tokens=100": "raise it to at least 9216",
    "parallel.sp=true": "parallel.sp=true needs parallel.tp > 1",
    "parallel.vpp=2": "parallel.vpp = 2 needs parallel.pp > 1",
    "parallel.tp=8": "parallel.tp = 8 does not divide the model's 12 attention heads; take one of [1, 2, 3, 4, 6, 12]",
    "parallel.pp=3": "does not divide the model's 28 layers",
    "data.max_prompt_tokens=9000 batch.max_tokens=20000": "exceeds the model's max_position_embeddings 16384",
    "model.path=/nowhere": "model.path is '/nowhere', which has no config.json",
    "megatron.hidden_dropuot=0": "unknown key megatron.hidden_dropuot; did you mean hidden_dropout?",
    "megatron.hidden_dropout=0.1": "dropout makes pi_theta differ from pi_old",
    "megatron.num_moe_experts=8": "mixture-of-experts models are not supported",
    "megatron.lora_rank=8": "LoRA is not supported",
    "megatron.tensor_model_parallel_size=2": "is set by parallel.tp; set that instead",
    "rollout.tis_clip=2": "importance weights of tokens have no meaning for a loss of sequence scores",
    "rollout.sync.probe_every=-1": "rollout.sync.probe_every is -1; it must be 0 (off) or above",
    "rollout.sleep_level=3": "rollout.sleep_level is 3; it takes one of 0, 1, 2",
    "rollout.exclude_mismatch=0": "rollout.exclude_mismatch is 0.0; it must be above 0, or null",
    "rollout.engine=transformers rollout.tp=2": "rollout.tp = 2 needs rollout.engine=vllm",
    "rollout.engine=vllm model.dtype=fp64": "model.dtype=fp64 is not known to vLLM",
    "rollout.engine=vllm rollout.tp=5": "rollout.tp = 5 does not divide the model's 12 attention heads",
    "rollout.engine=vllm rollout.kv_cache_mib=100": "does not hold one sequence",
    "rollout.vllm.seed=1": "rollout.vllm.seed is set by trainer.seed; set that instead",
    "oops": "override 'oops' has no '='",
}


@pytest.mark.parametrize(("words", "message"), REFUSED.items(), ids=REFUSED)
def test_refuses(file: Path, words: str, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        config.load(file, words.split())
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_layout_must_divide_the_world() -> None:
    layout = Config(parallel=config.ParallelConfig(tp=2, pp=2))
    assert config.check_world(layout, 8) == 2
    with pytest.raises(ValueError, match="tp 2 x pp 2 x cp 1 = 4 does not divide the 6 processes"):
        config.check_world(layout, 6)
    with pytest.raises(ValueError, match=r"rollout.tp = 4 does not divide the 6 processes; take one of \[1, 2, 3, 6\]"):
        config.check_world(Config(rollout=config.RolloutConfig(tp=4)), 6)


def test_the_smallest_kv_cache_holds_one_sequence(file: Path) -> None:
    """R1-Distill 1.5B in bf16: 2 x 28 layers x 2 KV heads x 128 x 2 bytes = 28,672 a token; 9216 tokens are 72 blocks
    of 128, and one more: 73 x 128 x 28,672 bytes = 255.5 MiB; half of it on each of two ranks."""
    for tp, enough in ((1, 256), (2, 128)):
        words = ["rollout.engine=vllm", f"rollout.tp={tp}"]
        config.load(file, [*words, f"rollout.kv_cache_mib={enough}"])
        with pytest.raises(ValueError, match=f"raise it to at least {enough}"):
            config.load(file, [*words, f"rollout.kv_cache_mib={enough - 1}"])


def test_the_command_line_refuses_before_it_imports_torch(file: Path) -> None:
    code = (
        "import sys; from megatron_real.cli import main; code = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'megatron.core'} & sys.modules.keys(); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "train", str(file), "parallel.tp=8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("megatron-real: parallel.tp = 8 does not divide")
    assert done.stderr.count("\n") == 1


def test_every_field_is_documented() -> None:
    import ast

    for node in ast.walk(ast.parse((ROOT / "megatron_real/config.py").read_text())):
        if isinstance(node, ast.ClassDef) and node.name != "Config":
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    assert isinstance(after, ast.Expr), f"{node.name}.{field.target.id} has no docstring"
