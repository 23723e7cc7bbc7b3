"""What a model is, read from its HF config.json: sizes, biases, rotary embedding.

Loadable without torch.

A model that this package cannot train exactly is refused here by name, before any weight is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_real.weights import WeightsError

SUPPORTED = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
"""HF architecture -> family; what tells one family from another is in `_family_traits`."""

# megatron-core hard-codes these three in RotaryEmbedding._apply_scaling; only the factor is a
# parameter.
LLAMA3_ROPE = {
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}


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
        hf = read_config(directory)
        try:
            return cls.from_config(hf)
        except (KeyError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{Path(directory) / 'config.json'} is not the config.json of a language model "
                f"({error!r})"
            ) from error

    @classmethod
    def from_config(cls, hf: Mapping[str, Any]) -> Architecture:
        """Interprets the values of a config.json, in the spelling of transformers 4 or 5."""
        name = (hf.get("architectures") or ["none"])[0]
        if name not in SUPPORTED:
            raise WeightsError(
                f"architecture {name} is not supported; supported are {', '.join(sorted(SUPPORTED))}"
            )
        family = SUPPORTED[name]
        _check_sizes(name, hf)
        _refuse_variants(name, hf)
        rope = _rope(name, hf)
        heads = hf["num_attention_heads"]
        return cls(
            family=family,
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            ffn_size=hf["intermediate_size"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim")
            or (128 if family == "qwen3" else hf["hidden_size"] // heads),
            vocab_size=hf["vocab_size"],
            max_positions=hf["max_position_embeddings"],
            tied=bool(hf.get("tie_word_embeddings", False)),
            **_family_traits(family, hf),
            norm_eps=_positive(name, "rms_norm_eps", hf.get("rms_norm_eps", 1e-6)),
            rope_theta=_positive(name, "rope_theta", rope["rope_theta"]),
            rope_factor=_rope_factor(name, rope),
        )

    def padded_vocab(self, tp: int) -> int:
        """Vocabulary rows in Megatron: a multiple of 128 on every tensor-parallel rank."""
        multiple = 128 * tp
        return -(-self.vocab_size // multiple) * multiple

    @property
    def rope_frequencies(self) -> list[float]:
        """Radians a position of each pair of a head's elements, the rope's scaling applied."""
        pairs = range(0, self.head_dim, 2)
        plain = [self.rope_theta ** (-i / self.head_dim) for i in pairs]
        if self.rope_factor is None:
            return plain
        return [_llama3_frequency(frequency, self.rope_factor) for frequency in plain]

    @property
    def num_parameters(self) -> int:
        """Weights of the model, padding aside."""
        qkv = self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        attention = (
            self.hidden_size * qkv
            + (qkv if self.qkv_bias else 0)
            + self.head_dim * self.num_heads * self.hidden_size
        )
        layer = attention + 3 * self.hidden_size * self.ffn_size + 2 * self.hidden_size
        layer += (2 * self.hidden_size + 2 * self.ffn_size) if self.linear_bias else 0
        layer += 2 * self.head_dim if self.qk_norm else 0
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def can_cut_kv_heads(self, tp: int) -> bool:
        """Whether `tp` ranks get equally many key-value heads each, or, where there are too few, a
        copy of one each.
        """
        return self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0

    def kv_bytes_per_token(self, *, tp: int, width: int) -> int:
        """Bytes of one token's keys and values on one of `tp` ranks of an engine, in numbers of
        `width` bytes.

        With more ranks than key-value heads, every rank holds a copy of one.
        """
        heads = max(self.num_kv_heads // tp, 1)
        return 2 * self.num_layers * heads * self.head_dim * width

    def flops_per_token(self, context: float) -> float:
        """FLOPs of one forward pass for one token that attends to `context` tokens on average:
        twice the weights of the matrix products, plus the attention's two products over causal
        context.
        """
        matrices = self.num_parameters - self.vocab_size * self.hidden_size * (
            0 if self.tied else 1
        )
        return 2.0 * matrices + 4.0 * self.num_layers * self.num_heads * self.head_dim * context


def read_config(directory: str | Path) -> dict[str, Any]:
    """Returns the table in `directory`/config.json.

    Raises:
        WeightsError: there is none, it cannot be read, or it is not a table in JSON.
    """
    file = Path(directory) / "config.json"
    try:
        values = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WeightsError(
            f"there is no config.json in {str(directory)!r}; give a directory of HF weights"
        ) from error
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file} holds no table of values; download it again")
    return values


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
    for key, limit in optional.items():
        if hf.get(key) is not None:
            limits[key] = limit
    for key, limit in limits.items():
        if type(hf[key]) is not int or not 0 < hf[key] <= limit:
            raise WeightsError(
                f"{name} with {key} = {hf[key]!r} is not a model; it must lie in 1 to {limit}"
            )
    if hf["num_attention_heads"] % (hf.get("num_key_value_heads") or 1):
        raise WeightsError(
            f"{name}: num_key_value_heads = {hf['num_key_value_heads']} does not divide "
            f"num_attention_heads = {hf['num_attention_heads']}"
        )


def _positive(name: str, key: str, value: Any) -> float:
    """The number `value`, where it is one, finite and above 0."""
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise WeightsError(f"{name} with {key} = {value!r} is not a model; it must be above 0")
    return float(value)


def _refuse_variants(name: str, hf: Mapping[str, Any]) -> None:
    """Settings of a supported architecture that would change the computation unseen.

    A setting is refused only where transformers computes otherwise because of it: Qwen2 has its
    biases whatever `attention_bias` says, and a window that no layer uses changes nothing.
    """
    # transformers' other name of silu (ACT2FN in its activations.py).
    activation = hf.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        _refuse(name, "hidden_act", activation, "only silu is supported")
    if _uses_window(hf):
        _refuse(
            name,
            "use_sliding_window",
            hf["use_sliding_window"],
            "sliding windows are not supported",
        )
    layer_types = hf.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types):
        _refuse(name, "layer_types", layer_types, "every layer must have full attention")
    attention_bias, mlp_bias = bool(hf.get("attention_bias")), bool(hf.get("mlp_bias"))
    # Qwen2's biases are fixed. Qwen3's attention_bias adds one to the output projection too.
    if (name == "LlamaForCausalLM" and attention_bias != mlp_bias) or (
        name == "Qwen3ForCausalLM" and attention_bias
    ):
        _refuse(
            name,
            "attention_bias",
            hf.get("attention_bias"),
            "megatron-core has biases on all of a layer's projections or on q, k and v alone, so "
            "Llama takes attention_bias and mlp_bias together, Qwen3 neither",
        )
    if hf.get("quantization_config") is not None:
        reason = "train from unquantised weights"
        _refuse(name, "quantization_config", hf["quantization_config"], reason)
    if hf.get("attention_dropout"):
        _refuse(name, "attention_dropout", hf["attention_dropout"], "dropout must be 0")


def _refuse(name: str, key: str, value: Any, reason: str) -> None:
    raise WeightsError(f"{name} with {key} = {value!r} is not supported: {reason}")


def _uses_window(hf: Mapping[str, Any]) -> bool:
    """Whether transformers gives a layer a sliding window: those from max_window_layers on."""
    if not hf.get("use_sliding_window") or hf.get("layer_types"):
        return False  # layer_types, where it is given, says it layer by layer
    # 28 is transformers' default of max_window_layers, 4096 of sliding_window.
    first = hf.get("max_window_layers", 28)
    return hf.get("sliding_window", 4096) is not None and first < hf["num_hidden_layers"]


def _rope(name: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's parameters, in the spelling of transformers 4 or 5.

    transformers 4 reads rope_theta and rope_scaling. transformers 5 reads rope_parameters, but
    lets rope_scaling replace them whole: where both are there, they must agree.
    """
    scaling, rope = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        _refuse(name, "rope_parameters", rope, "every layer must have the same rope")
    if scaling and rope:
        differing = [key for key in scaling if key in rope and scaling[key] != rope[key]]
        if _kind(scaling) != _kind(rope):
            differing.append("rope_type")
        if differing:
            raise WeightsError(
                f"{name} has both rope_scaling and rope_parameters, and they disagree in "
                f"{', '.join(dict.fromkeys(differing))}; keep the one that is right"
            )
    rope = {"rope_theta": hf.get("rope_theta", 10000.0), **scaling, **rope}
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        _refuse(name, "partial_rotary_factor", partial, "the whole head must be rotated")
    return rope


def _kind(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type") or rope.get("type") or "default"


def _llama3_frequency(frequency: float, factor: float) -> float:
    """llama3's scaling: long waves by `factor`, short ones not, a ramp between them.

    (transformers' modeling_rope_utils.py, _compute_llama3_parameters.)
    """
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    waves = LLAMA3_ROPE["original_max_position_embeddings"] * frequency / (2 * math.pi)
    ramp = min(max((waves - low) / (high - low), 0.0), 1.0)
    return (1 - ramp) * frequency / factor + ramp * frequency


def _rope_factor(name: str, rope: Mapping[str, Any]) -> float | None:
    kind = _kind(rope)
    # Both divide frequencies by the factor, so that 1 is no scaling.
    if kind == "default" or (kind in ("linear", "llama3") and rope.get("factor") == 1):
        return None
    wrong = {k: rope.get(k) for k, v in LLAMA3_ROPE.items() if rope.get(k) != v}
    if kind != "llama3" or wrong:
        detail = f" with {wrong}" if wrong and kind == "llama3" else ""
        raise WeightsError(
            f"{name} with rope type {kind}{detail} is not supported; "
            f"supported are default and llama3 with {LLAMA3_ROPE}"
        )
    return _positive(name, "rope factor", rope.get("factor"))
