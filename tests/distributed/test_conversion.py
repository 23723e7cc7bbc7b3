"""Converted checkpoints under megatron-core's own loader, megatron-core's
checkpoints under our export.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_real.config import (
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
)
from megatron_real.conversion.convert import LegacyLayout, hf_to_megatron, megatron_to_hf
from megatron_real.weights.hf import HfWeights
from tests.amount import core, cover, on_first_version, thinned
from tests.distributed import conversion_jobs
from tests.distributed.layouts import Dtype
from tests.distributed.world import World

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
# The rows of the table of models in docs/conversion.md, scaled down.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama2": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head-dim": ("llama", {"head_dim": 16, "num_attention_heads": 8}),
    "smollm2": (
        "llama",
        {"tie_word_embeddings": True, "num_attention_heads": 12, "hidden_size": 48},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3-tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
}
# (TP, PP, VPP)
LAYOUTS = [
    (1, 1, 1),
    (2, 1, 1),
    (1, 2, 1),
    (2, 2, 1),
    (4, 1, 1),
    (4, 2, 1),
    (1, 2, 2),
    (2, 2, 2),
    (4, 2, 2),
]
NUM_TOKENS = 512
BOUND = 2e-5
"""Largest difference of two fp32 logits that rounding explains."""
HAS_MEGATRON_LM = importlib.util.find_spec("megatron.training") is not None
TOKENS = torch.randint(
    0, 101, (NUM_TOKENS + 1,), generator=torch.Generator().manual_seed(7)
).tolist()


def model_of(tiny_model: Callable[..., Path], name: str) -> Path:
    family, sizes = MODELS[name]
    shared = {"num_key_value_heads": 4, "num_hidden_layers": 4, "max_position_embeddings": 1024}
    return tiny_model(family, dtype="float32", **{**shared, **sizes})


def config_of(path: Path, *, tp: int, pp: int, vpp: int, dtype: Dtype = "fp32") -> Config:
    return Config(
        model=ModelConfig(path=str(path), dtype=dtype, layers="local"),
        data=DataConfig(max_prompt_tokens=64),
        rollout=RolloutConfig(
            num_prompts=1, group_size=2, max_response_tokens=NUM_TOKENS, temperature=1.0
        ),
        batch=BatchConfig(minibatch_prompts=1, max_tokens=1200),
        parallel=ParallelConfig(tp=tp, pp=pp, vpp=vpp),
    )


def transformers_logits(path: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([TOKENS[:-1]])).logits[0]
    return logits


@pytest.mark.parametrize(("name", "layout"), thinned(cover(list(MODELS), LAYOUTS), kept=4))
def test_logits_of_a_converted_checkpoint(
    world: World,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    name: str,
    layout: tuple[int, int, int],
) -> None:
    """megatron-core's loader and ours fill the same parameters,
    and the logits are transformers'.
    """
    tp, pp, vpp = layout
    path = model_of(tiny_model, name)
    out = hf_to_megatron(path, tmp_path / "megatron", tp_chunks=2 if tp > 1 else 1).out
    config = config_of(path, tp=tp, pp=pp, vpp=vpp)

    logits = logits_of(world, config, out / "release")

    expected = transformers_logits(path)
    assert (logits - expected).abs().max() < BOUND
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def logits_of(world: World, config: Config, checkpoint: Path) -> torch.Tensor:
    size = config.parallel.tp * config.parallel.pp
    answers = world.run(
        conversion_jobs.logits_of_checkpoint,
        size,
        config=config,
        checkpoint=str(checkpoint),
        tokens=TOKENS,
    )
    return torch.tensor(next(answer for answer in answers if answer is not None))


def test_logits_tell_models_apart(
    world: World, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """The control: the same weights with another rope pass every check of bytes
    and fail this one.
    """
    path = model_of(tiny_model, "llama3-rope")
    plain = model_of(tiny_model, "llama2")
    weights = HfWeights(path)
    assert all(torch.equal(weights.read(n), HfWeights(plain).read(n)) for n in weights.names)

    out = hf_to_megatron(path, tmp_path / "megatron").out
    logits = logits_of(world, config_of(path, tp=1, pp=1, vpp=1), out / "release")
    assert (logits - transformers_logits(plain)).abs().max() > 100 * BOUND


@pytest.mark.parametrize(
    ("name", "layout"),
    thinned(
        cover(["qwen2-tied", "llama-biases", "qwen3"], [(1, 1), (2, 2), (4, 1), (1, 4)]), kept=2
    ),
)
def test_the_older_format_loads_strictly(
    world: World,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    name: str,
    layout: tuple[int, int],
) -> None:
    tp, pp = layout
    path = model_of(tiny_model, name)
    out = hf_to_megatron(
        path, tmp_path / "megatron", layout=LegacyLayout(tp=tp, pp=pp, layers="local")
    ).out
    logits = logits_of(world, config_of(path, tp=tp, pp=pp, vpp=1), out / "release")
    assert (logits - transformers_logits(path)).abs().max() < BOUND


# (model, TP, PP, VPP, DP, dtype)
TRAINED = [
    ("qwen2-tied", 2, 2, 1, 2, "bf16"),
    ("qwen3", 2, 2, 2, 1, "fp32"),
    ("qwen2", 4, 1, 1, 1, "fp32"),
]


@pytest.mark.parametrize(
    "trained", core(TRAINED, TRAINED[:2] if on_first_version() else TRAINED[:1]), ids=str
)
def test_trained_checkpoints_export(
    world: World,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    trained: tuple[str, int, int, int, int, Dtype],
) -> None:
    """What megatron-core saves after optimizer steps, optimizer included,
    exports equal to the gathered parameters.
    """
    name, tp, pp, vpp, dp, dtype = trained
    path = model_of(tiny_model, name)
    config = config_of(path, tp=tp, pp=pp, vpp=vpp, dtype=dtype)
    saved = tmp_path / "iter_0000003"

    gathered = world.run(
        conversion_jobs.save_by_megatron, tp * pp * dp, config=config, out=str(saved), steps=3
    )[0]
    exported = HfWeights(megatron_to_hf(saved, tmp_path / "hf", hf_config=path).out)

    before = HfWeights(path)
    assert exported.tensors.keys() == gathered.keys() == before.tensors.keys()
    for tensor_name, tensor in gathered.items():
        assert torch.equal(exported.read(tensor_name), tensor), tensor_name
        is_trained = not torch.equal(tensor.float(), before.read(tensor_name))
        assert is_trained, tensor_name


@pytest.mark.skipif(
    not HAS_MEGATRON_LM, reason="this megatron-core comes without Megatron-LM's training package"
)
@pytest.mark.parametrize(
    ("ckpt_format", "layout"),
    [("torch_dist", None), ("torch", LegacyLayout(layers="local"))],
    ids=["dist", "torch"],
)
def test_megatron_lm_loads_a_converted_checkpoint(
    world: World,
    tiny_model: Callable[..., Path],
    tmp_path: Path,
    ckpt_format: str,
    layout: LegacyLayout | None,
) -> None:
    """Its load_checkpoint, strict, finds the release, the model's arguments and every weight."""
    path = model_of(tiny_model, "qwen2")
    out = hf_to_megatron(path, tmp_path / "megatron", layout=layout).out
    (held,) = world.run(
        conversion_jobs.load_by_megatron_lm,
        1,
        path=str(path),
        checkpoint=str(out),
        ckpt_format=ckpt_format,
    )

    weights = HfWeights(path)
    assert held.keys() == weights.tensors.keys()
    assert all(torch.equal(tensor, weights.read(name)) for name, tensor in held.items())
