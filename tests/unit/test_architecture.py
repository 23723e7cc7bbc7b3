"""What is read from config.json, and what is refused there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture

QWEN_1_5B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
    "vocab_size": 151936, "max_position_embeddings": 131072, "rms_norm_eps": 1e-6,
    "rope_theta": 10000, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_the_config_of_r1_distill_qwen_1_5b_is_read_as_published() -> None:
    architecture = Architecture.from_config(QWEN_1_5B)
    assert architecture.head_dim == 128
    assert architecture.qkv_bias is True
    assert architecture.tied is False
    assert architecture.rope_factor is None
    assert (
        architecture.num_parameters == 1_777_088_000
    )  # the published checkpoint's tensors added up
    assert [architecture.padded_vocab(tp) for tp in (1, 2, 4)] == [151936, 152064, 152064]


def test_a_kv_cache_counts_the_heads_as_they_are() -> None:
    """R1-Distill 1.5B in bf16: 2 x 28 layers x 2 KV heads x 128 x 2 bytes = 28,672 a token; one
    head on each of 2 ranks, and a copy of one on each of 4. Qwen3's heads have 128 numbers where
    config.json does not say, although hidden_size / num_attention_heads may be 64 (Qwen3-0.6B: 1024
    / 16): 2 x 28 x 8 x 128 x 2 = 114,688.
    """
    qwen = Architecture.from_config(QWEN_1_5B)
    assert [qwen.kv_bytes_per_token(tp=tp, width=2) for tp in (1, 2, 4)] == [28672, 14336, 14336]
    assert [tp for tp in range(1, 7) if qwen.can_cut_kv_heads(tp)] == [1, 2, 4, 6]
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}
    qwen3 = Architecture.from_config({**QWEN_1_5B, **sizes, "architectures": ["Qwen3ForCausalLM"]})
    assert qwen3.kv_bytes_per_token(tp=1, width=2) == 114_688


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
    ],
    ids=["transformers4", "transformers5"],
)
def test_llama3_rope_settings_are_read_in_both_spellings(rope: dict[str, Any]) -> None:
    architecture = Architecture.from_config(
        {**QWEN_1_5B, "architectures": ["LlamaForCausalLM"], **rope}
    )
    assert architecture.rope_theta == 5e5
    assert architecture.rope_factor == 8.0
    assert architecture.qkv_bias is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"architectures": ["MixtralForCausalLM"]},
            "supported are LlamaForCausalLM, Qwen2ForCausalLM",
        ),
        ({"use_sliding_window": True, "max_window_layers": 0}, "sliding windows"),
        ({"hidden_act": "gelu"}, "only silu"),
        ({"attention_dropout": 0.1}, "dropout must be 0"),
        ({"quantization_config": {}}, "unquantised"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope type yarn"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2}},
            "low_freq_factor",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type linear"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "the same rope"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 1.0},
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000, **LLAMA3},
            },
            "disagree in factor, rope_type",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "whole head must be rotated"),
        ({"partial_rotary_factor": 0.5}, "whole head must be rotated"),
        ({"use_sliding_window": True, "max_window_layers": 27}, "sliding windows"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "full attention"),
        (
            {"architectures": ["Qwen3ForCausalLM"], "attention_bias": True},
            "Qwen3 neither",
        ),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6' is not a model"),
        ({"rms_norm_eps": 0}, "rms_norm_eps = 0 is not a model"),
        ({"rope_theta": "10000"}, "rope_theta = '10000' is not a model"),
        ({"rope_theta": float("nan")}, "rope_theta = nan is not a model"),
        ({"vocab_size": "32"}, "vocab_size = '32' is not a model"),
    ],
    ids=str,
)
def test_a_config_that_is_not_supported_is_refused_by_name(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Architecture.from_config({**QWEN_1_5B, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"attention_bias": True, "mlp_bias": True},
        {"use_sliding_window": True, "max_window_layers": 28},
        {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": None},
        {"use_sliding_window": True, "layer_types": ["full_attention"] * 28},
        {"rope_scaling": {"type": "linear", "factor": 1.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 1, "rope_theta": 10000}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": None},
        {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": 1.0}},
        {"hidden_act": "swish"},
    ],
    ids=str,
)
def test_settings_that_change_nothing_are_accepted(change: dict[str, Any]) -> None:
    """transformers computes the same model with these settings and without them."""
    plain = Architecture.from_config(QWEN_1_5B)
    assert Architecture.from_config({**QWEN_1_5B, **change}) == plain


def test_a_config_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    for content, message in (
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds no table"),
        (b'{"architectures": ["Qwen2ForCausalLM"]}', "not the config.json of a language model"),
        (b'{"architectures": 7}', "not the config.json of a language model"),
    ):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(WeightsError, match=message):
            Architecture.read(tmp_path)

    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"there is no config.json"):
        Architecture.read(tmp_path)

    (tmp_path / "config.json").mkdir()
    with pytest.raises(WeightsError, match=r"config.json cannot be read \(Is a directory\)"):
        Architecture.read(tmp_path)
