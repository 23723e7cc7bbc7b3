"""Converted checkpoints against megatron-core's own loader, megatron-core's checkpoints against our export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_real.config import BatchConfig, Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig
from megatron_real.weights.conversion import hf_to_megatron, megatron_to_hf
from megatron_real.weights.hf import HfWeights
from tests.distributed import conversion_jobs
from tests.distributed.world import World

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
# A row of the table of supported models, scaled down.
MODELS = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": ("llama", {"tie_word_embeddings": True, "num_attention_heads": 4, "head_dim": 16}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (4, 1, 1), (4, 2, 1), (1, 2, 2), (2, 2, 2), (4, 2, 2)]
TOKENS = torch.randint(0, 101, (512,), generator=torch.Generator().manual_seed(7)).tolist()


def model_of(tiny_model: Callable[..., Path], name: str) -> Path:
    family, sizes = MODELS[name]
    sizes = {"num_key_value_heads": 4, "num_hidden_layers": 4, "max_position_embeddings": 1024, **sizes}
    return tiny_model(family, dtype="float32", **sizes)


def config_of(path: Path, *, tp: int, pp: int, vpp: int, dtype: str = "fp32") -> Config:
    return Config(
        model=ModelConfig(path=str(path), dtype=dtype, layers="local"),  # type: ignore[arg-type]
        data=DataConfig(max_prompt_tokens=64),
        rollout=RolloutConfig(num_prompts=1, group_size=2, max_response_tokens=512, temperature=1.0),
        batch=BatchConfig(minibatch_prompts=1, max_tokens=1024),
        parallel=ParallelConfig(tp=tp, pp=pp, vpp=vpp, sp=False),
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_megatron_loads_what_we_convert(
    world: World, tiny_model: Callable[..., Path], tmp_path: Path, name: str, layout: tuple[int, int, int]
) -> None:
    tp, pp, vpp = layout
    path = model_of(tiny_model, name)
    out = hf_to_megatron(path, tmp_path / "megatron", tp_chunks=2 if tp > 1 else 1).out
    config = config_of(path, tp=tp, pp=pp, vpp=vpp)
    answers = world.run(
        conversion_jobs.logprobs_by_megatron, tp * pp, config=config, checkpoint=str(out / "release"), tokens=TOKENS
    )
    found = torch.tensor(next(a for a in answers if a is not None))
    assert (found - hf_logprobs(path)).abs().max() < 2e-5


def hf_logprobs(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        logprobs = model(tokens[None]).logits[0].log_softmax(-1)
    return logprobs[:-1].gather(1, tokens[1:, None])[:, 0]


@pytest.mark.parametrize(
    ("tp", "pp", "vpp", "dp", "dtype"), [(2, 2, 1, 2, "bf16"), (2, 2, 2, 1, "fp32"), (4, 1, 1, 1, "fp32")]
)
def test_trained_checkpoints_export(
    world: World, tiny_model: Callable[..., Path], tmp_path: Path, tp: int, pp: int, vpp: int, dp: int, dtype: str
) -> None:
    path = model_of(tiny_model, "qwen2-tied" if pp == 2 else "qwen3")
    config = config_of(path, tp=tp, pp=pp, vpp=vpp, dtype=dtype)
    saved = tmp_path / "iter_0000003"
    gathered = world.run(conversion_jobs.save_by_megatron, tp * pp * dp, config=config, out=str(saved), steps=3)[0]
    out = megatron_to_hf(saved, tmp_path / "hf", hf_config=path).out
    exported = HfWeights(out)
    assert exported.tensors.keys() == gathered.keys()
    before = HfWeights(path)
    for name, tensor in gathered.items():
        assert torch.equal(exported.read(name), tensor), name
        assert not torch.equal(exported.read(name).float(), before.read(name)), f"{name} was not trained"


def test_a_dtype_is_asked_for(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    path = model_of(tiny_model, "qwen2")
    out = hf_to_megatron(path, tmp_path / "megatron", dtype="BF16").out
    assert dataclasses.asdict(megatron_to_hf(out, tmp_path / "hf"))["dtype"] == "BF16"
