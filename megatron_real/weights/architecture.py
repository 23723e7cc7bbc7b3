"""What a model is, read from its HF config.json: sizes, biases, rotary embedding. Loadable without torch.

A model that this package cannot train exactly is refused here by name, before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_real.weights import WeightsError

SUPPORTED = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
"""HF architecture -> family; what tells one family from another is in `_family_traits`."""

# megatron-core hard-codes these three in RotaryEmbedding._apply_scaling; only the factor is a parameter.
LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Architecture:
    """The numbers that define a dense decoder."""

    family: str
    """`llama`, `qwen2` or `qwen3`."""
    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    ffn_size: int
    """Width of the gated MLP."""
    num_heads: int
    """Query heads."""
    num_kv_heads: int
    """Key-value heads."""
    head_dim: int
    """Size of a head."""
    vocab_size: int
    """Rows of the HF embedding, without Megatron's padding."""
    max_positions: int
    """Longest sequence."""
    tied: bool
    """The output weight is the embedding."""
    qkv_bias: bool
    """Bias on the q, k and v projections."""
    linear_bias: bool
    """Bias on the attention's output projection and in the MLP."""
    qk_norm: bool
    """RMS norm over each head of q and k."""
    norm_eps: float
    """Epsilon of the RMS norms."""
    rope_theta: float
    """Rotary base."""
    rope_factor: float | None
    """llama3 rope scaling factor, None without scaling."""

    @classmethod
    def read(cls, directory: str | Path) -> Architecture:
        """Reads `directory`/config.json.

        Raises:
            WeightsError: no config.json there, or a model that is not supported.
        """
        file = Path(directory) / "config.json"
        if not file.is_file():
            raise WeightsError(f"there is no config.json in {str(directory)!r}; give a directory of HF weights")
        try:
            return cls.from_config(json.loads(file.read_bytes()))
        except (KeyError, TypeError, AttributeError, RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise WeightsError(f"{file} is not the config.json of a language model ({error!r})") from error

    @classmethod
    def from_config(cls, hf: Mapping[str, Any]) -> Architecture:
        """Interprets the values of a config.json, in the spelling of transformers 4 or 5."""
        name = (hf.get("architectures") or ["none"])[0]
        if name not in SUPPORTED:
            raise WeightsError(f"architecture {name} is not supported; supported are {', '.join(sorted(SUPPORTED))}")
        family = SUPPORTED[name]
        _refuse_variants(name, hf)
        rope = hf.get("rope_parameters") or {
            "rope_theta": hf.get("rope_theta", 10000.0),
            **(hf.get("rope_scaling") or {}),
        }
        heads = hf["num_attention_heads"]
        _check_sizes(name, hf)
        return cls(
            family=family,
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            ffn_size=hf["intermediate_size"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or (128 if family == "qwen3" else hf["hidden_size"] // heads),
            vocab_size=hf["vocab_size"],
            max_positions=hf["max_position_embeddings"],
            tied=bool(hf.get("tie_word_embeddings", False)),
            **_family_traits(family, hf),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", hf.get("rope_theta", 10000.0))),
            rope_factor=_rope_factor(name, rope),
        )

    def padded_vocab(self, tp: int) -> int:
        """Vocabulary rows in Megatron: a multiple of 128 on every tensor-parallel rank."""
        multiple = 128 * tp
        return -(-self.vocab_size // multiple) * multiple

    @property
    def num_parameters(self) -> int:
        """Weights of the model, padding aside."""
        qkv = self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        attention = (
            self.hidden_size * qkv + (qkv if self.qkv_bias else 0) + self.head_dim * self.num_heads * self.hidden_size
        )
        layer = attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        layer += (2 * self.hidden_size + 2 * self.ffn_size) if self.linear_bias else 0
        layer += 2 * self.head_dim if self.qk_norm else 0
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def flops_per_token(self, context: float) -> float:
        """FLOPs of one forward pass for one token that attends to `context` tokens on average: twice the weights of
        the matrix products, plus the attention's two products over causal context."""
        matrices = self.num_parameters - self.vocab_size * self.hidden_size * (0 if self.tied else 1)
        return 2.0 * matrices + 4.0 * self.num_layers * self.num_heads * self.head_dim * context


def _family_traits(family: str, hf: Mapping[str, Any]) -> dict[str, bool]:
    every_projection = family == "llama" and bool(hf.get("attention_bias"))
    return {
        "qkv_bias": family == "qwen2" or every_projection,
        "linear_bias": every_projection,
        "qk_norm": family == "qwen3",
    }


def _check_sizes(name: str, hf: Mapping[str, Any]) -> None:
    limits = {
        "num_hidden_layers": 1000,
        "hidden_size": 2**20,
        "intermediate_size": 2**24,
        "num_attention_heads": 2**16,
        "vocab_size": 2**24,
        "max_position_embeddings": 2**40,
    }
    optional = {"num_key_value_heads": 2**16, "head_dim": 2**16}
    for key, limit in {**limits, **{k: v for k, v in optional.items() if hf.get(k) is not None}}.items():
        if type(hf[key]) is not int or not 0 < hf[key] <= limit:
            raise WeightsError(f"{name} with {key} = {hf[key]!r} is not a model; it must lie in 1 to {limit}")
    if hf["num_attention_heads"] % (hf.get("num_key_value_heads") or 1):
        raise WeightsError(
            f"{name}: num_key_value_heads = {hf['num_key_value_heads']} does not divide "
            f"num_attention_heads = {hf['num_attention_heads']}"
        )


def _refuse_variants(name: str, hf: Mapping[str, Any]) -> None:
    """Settings of a supported architecture that would change the computation unseen."""
    refused = {
        "hidden_act": (hf.get("hidden_act", "silu") != "silu", "only silu is supported"),
        "use_sliding_window": (bool(hf.get("use_sliding_window")), "sliding windows are not supported"),
        "layer_types": (
            any(kind != "full_attention" for kind in hf.get("layer_types") or ()),
            "every layer must have full attention",
        ),
        "attention_bias": (
            bool(hf.get("attention_bias")) != bool(hf.get("mlp_bias"))
            or (name != "LlamaForCausalLM" and bool(hf.get("attention_bias"))),
            "megatron-core has biases on all of a layer's projections or on q, k and v alone, so Llama takes "
            "attention_bias and mlp_bias together, Qwen2 and Qwen3 neither",
        ),
        "partial_rotary_factor": (hf.get("partial_rotary_factor", 1.0) != 1.0, "the whole head must be rotated"),
        "quantization_config": (hf.get("quantization_config") is not None, "train from unquantised weights"),
        "attention_dropout": (bool(hf.get("attention_dropout")), "dropout must be 0"),
    }
    for key, (refuse, reason) in refused.items():
        if refuse:
            raise WeightsError(f"{name} with {key} = {hf.get(key)!r} is not supported: {reason}")


def _rope_factor(name: str, rope: Mapping[str, Any]) -> float | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    wrong = {k: rope.get(k) for k, v in LLAMA3_ROPE.items() if rope.get(k) != v}
    if kind != "llama3" or wrong:
        detail = f" with {wrong}" if wrong and kind == "llama3" else ""
        raise WeightsError(
            f"{name} with rope type {kind}{detail} is not supported; "
            f"supported are default and llama3 with {LLAMA3_ROPE}"
        )
    return float(rope["factor"])
