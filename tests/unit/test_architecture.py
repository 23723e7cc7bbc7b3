"""What is read from config.json, and what is refused there."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_real.weights.architecture import Architecture

QWEN_1_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_r1_distill_qwen_1_5b() -> None:
    found = Architecture.from_config(QWEN_1_5B)
    assert (found.head_dim, found.qkv_bias, found.tied, found.rope_factor) == (128, True, False, None)
    assert found.num_parameters == 1_777_088_000  # the published checkpoint's tensors added up
    assert [found.padded_vocab(tp) for tp in (1, 2, 4)] == [151936, 152064, 152064]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
    ids=["transformers4", "transformers5"],
)
def test_llama3_rope_in_both_spellings(rope: dict[str, Any]) -> None:
    found = Architecture.from_config({**QWEN_1_5B, "architectures": ["LlamaForCausalLM"], **rope})
    assert (found.rope_theta, found.rope_factor, found.qkv_bias) == (5e5, 8.0, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "supported are LlamaForCausalLM, Qwen2ForCausalLM"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"attention_dropout": 0.1}, "dropout must be 0"),
        ({"quantization_config": {}}, "unquantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope type yarn"),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2}}, "low_freq_factor"),
    ],
    ids=str,
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture.from_config({**QWEN_1_5B, **change})
