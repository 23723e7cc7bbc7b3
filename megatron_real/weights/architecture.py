"""What a model is, read from its HF config.json: sizes, biases, rotary embedding. Loadable without torch.

A model that this package cannot train exactly is refused here by name, before any weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED = {"Qwen2ForCausalLM": "qwen2", "LlamaForCausalLM": "llama"}
"""HF architecture -> family."""

# megatron-core hard-codes these three in RotaryEmbedding._apply_scaling; only the factor is a parameter.
LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Architecture:
    """The numbers that define a dense decoder."""

    family: str
    """`qwen2` or `llama`."""
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
            ValueError: no config.json there, or a model that is not supported.
        """
        file = Path(directory) / "config.json"
        if not file.is_file():
            raise ValueError(f"there is no config.json in {str(directory)!r}; give a directory of HF weights")
        return cls.from_config(json.loads(file.read_text()))

    @classmethod
    def from_config(cls, hf: Mapping[str, Any]) -> Architecture:
        """Interprets the values of a config.json, in the spelling of transformers 4 or 5."""
        name = (hf.get("architectures") or ["none"])[0]
        if name not in SUPPORTED:
            raise ValueError(f"architecture {name} is not supported; supported are {', '.join(sorted(SUPPORTED))}")
        family = SUPPORTED[name]
        _refuse_variants(name, hf)
        rope = hf.get("rope_parameters") or {
            "rope_theta": hf.get("rope_theta", 10000.0),
            **(hf.get("rope_scaling") or {}),
        }
        heads = hf["num_attention_heads"]
        return cls(
            family=family,
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            ffn_size=hf["intermediate_size"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            vocab_size=hf["vocab_size"],
            max_positions=hf["max_position_embeddings"],
            tied=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2",
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
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def flops_per_token(self, context: float) -> float:
        """FLOPs of one forward pass for one token that attends to `context` tokens on average: twice the weights of
        the matrix products, plus the attention's two products over causal context."""
        matrices = self.num_parameters - self.vocab_size * self.hidden_size * (0 if self.tied else 1)
        return 2.0 * matrices + 4.0 * self.num_layers * self.num_heads * self.head_dim * context


def _refuse_variants(name: str, hf: Mapping[str, Any]) -> None:
    """Settings of a supported architecture that would change the computation unseen."""
    refused = {
        "hidden_act": (hf.get("hidden_act", "silu") != "silu", "only silu is supported"),
        "use_sliding_window": (bool(hf.get("use_sliding_window")), "sliding windows are not supported"),
        "attention_bias": (bool(hf.get("attention_bias")) and name == "LlamaForCausalLM", "biases are Qwen2's only"),
        "mlp_bias": (bool(hf.get("mlp_bias")), "MLP biases are not supported"),
        "quantization_config": (hf.get("quantization_config") is not None, "train from unquantised weights"),
        "attention_dropout": (bool(hf.get("attention_dropout")), "dropout must be 0"),
    }
    for key, (refuse, reason) in refused.items():
        if refuse:
            raise ValueError(f"{name} with {key} = {hf[key]!r} is not supported: {reason}")


def _rope_factor(name: str, rope: Mapping[str, Any]) -> float | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    wrong = {k: rope.get(k) for k, v in LLAMA3_ROPE.items() if rope.get(k) != v}
    if kind != "llama3" or wrong:
        detail = f" with {wrong}" if wrong and kind == "llama3" else ""
        raise ValueError(
            f"{name} with rope type {kind}{detail} is not supported; "
            f"supported are default and llama3 with {LLAMA3_ROPE}"
        )
    return float(rope["factor"])
