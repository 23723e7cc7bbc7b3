"""What a model is, read from its HF config.json: sizes, biases, rotary embedding.

A model that this package cannot train exactly is refused here by name, before any weight is read.
The module needs no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_real.weights import WeightsError

SUPPORTED = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
"""HF architecture -> family; `Architecture.from_config` says what tells one family from another."""

# megatron-core hard-codes these three in RotaryEmbedding._apply_scaling. Only the factor is a
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
        """Interprets the values of a config.json, in the spelling of transformers 4 or 5.

        Raises:
            WeightsError: the architecture or one of its settings is not supported.
            KeyError, TypeError, AttributeError: a value is missing or of another type.
        """
        # A config may list several classes; transformers loads the first.
        name = (hf.get("architectures") or ["none"])[0]
        if name not in SUPPORTED:
            raise WeightsError(
                f"architecture {name} is not supported; supported are "
                f"{', '.join(sorted(SUPPORTED))}"
            )

        family = SUPPORTED[name]
        _check_sizes(name, hf)
        _refuse_variants(name, hf)
        rope = _rope(name, hf)

        num_heads = hf["num_attention_heads"]
        head_dim = hf.get("head_dim")
        if not head_dim and family == "qwen3":
            head_dim = 128  # the default of transformers' Qwen3Config
        elif not head_dim:
            head_dim = hf["hidden_size"] // num_heads

        # Only Llama's bias is a setting: Qwen2 has it on q, k and v, Qwen3 nowhere.
        every_projection = family == "llama" and bool(hf.get("attention_bias"))
        return cls(
            family=family,
            num_layers=hf["num_hidden_layers"],
            hidden_size=hf["hidden_size"],
            ffn_size=hf["intermediate_size"],
            num_heads=num_heads,
            num_kv_heads=hf.get("num_key_value_heads") or num_heads,
            head_dim=head_dim,
            vocab_size=hf["vocab_size"],
            max_positions=hf["max_position_embeddings"],
            tied=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or every_projection,
            linear_bias=every_projection,
            qk_norm=family == "qwen3",
            norm_eps=_positive(name, "rms_norm_eps", hf.get("rms_norm_eps", 1e-6)),
            rope_theta=_positive(name, "rope_theta", rope["rope_theta"]),
            rope_factor=_rope_factor(name, rope),
        )

    def padded_vocab(self, tp: int) -> int:
        """Returns the vocabulary rows in Megatron: a multiple of 128 on each of `tp` ranks."""
        # 128 is the default of Megatron's --make-vocab-size-divisible-by.
        multiple = 128 * tp
        return -(-self.vocab_size // multiple) * multiple

    @property
    def rope_frequencies(self) -> list[float]:
        """Radians a position of each pair of a head's elements, the rope's scaling applied.

        llama3's scaling divides the frequency of long waves by the factor, leaves short ones as
        they are, and goes over from one to the other on a ramp between them. (transformers'
        modeling_rope_utils.py, _compute_llama3_parameters.)
        """
        plain = [self.rope_theta ** (-i / self.head_dim) for i in range(0, self.head_dim, 2)]
        if self.rope_factor is None:
            return plain

        low = LLAMA3_ROPE["low_freq_factor"]
        high = LLAMA3_ROPE["high_freq_factor"]
        scaled = []
        for frequency in plain:
            # Waves that the original context holds: few of a long wave, many of a short one.
            waves = LLAMA3_ROPE["original_max_position_embeddings"] * frequency / (2 * math.pi)
            ramp = min(max((waves - low) / (high - low), 0.0), 1.0)
            # On the ramp, a mixture of both frequencies.
            scaled.append((1 - ramp) * frequency / self.rope_factor + ramp * frequency)
        return scaled

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the model, without the vocabulary's padding."""
        qkv_rows = self.head_dim * (self.num_heads + 2 * self.num_kv_heads)
        qkv = self.hidden_size * qkv_rows
        # Norms and biases are counted too: the number must equal that of the model cards.
        if self.qkv_bias:
            qkv += qkv_rows
        output_projection = self.head_dim * self.num_heads * self.hidden_size
        # Gate, up and down; and the norms before the attention and before the MLP.
        mlp = 3 * self.hidden_size * self.ffn_size
        norms = 2 * self.hidden_size

        layer = qkv + output_projection + mlp + norms
        if self.linear_bias:
            # Of the output projection and down, and of gate and up.
            layer += 2 * self.hidden_size + 2 * self.ffn_size
        if self.qk_norm:
            layer += 2 * self.head_dim

        embeddings = self.vocab_size * self.hidden_size
        if not self.tied:
            embeddings *= 2
        final_norm = self.hidden_size
        return self.num_layers * layer + embeddings + final_norm

    def can_cut_kv_heads(self, tp: int) -> bool:
        """Whether `tp` ranks get equally many key-value heads each, or copies where they are few.

        With more ranks than heads, every rank holds a copy of one.
        """
        return self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0

    def kv_bytes_per_token(self, *, tp: int, width: int) -> int:
        """Returns the bytes of one token's keys and values on one of `tp` ranks of an engine.

        Args:
            tp: tensor-parallel ranks. With more of them than key-value heads, every rank holds a
                copy of one head.
            width: bytes of one number.
        """
        heads = max(self.num_kv_heads // tp, 1)
        # 2: a key and a value.
        return 2 * self.num_layers * heads * self.head_dim * width

    def flops_per_token(self, context: float) -> float:
        """Returns the FLOPs of one forward pass for one token.

        That is twice the parameters of the matrix products, plus the attention's two products over
        the context.

        Args:
            context: how many tokens it attends to, on average.
        """
        # Looking a token up is no product: of two separate tables, only the output layer counts.
        matrices = self.num_parameters
        if not self.tied:
            matrices -= self.vocab_size * self.hidden_size
        # The attention's products, of queries with keys and of weights with values, have
        # 2 FLOPs each.
        return 2.0 * matrices + 4.0 * self.num_layers * self.num_heads * self.head_dim * context


def read_config(directory: str | Path) -> dict[str, Any]:
    """Returns the table in `directory`/config.json.

    Raises:
        WeightsError: there is none, it cannot be read, or it is not a table in JSON.
    """
    try:
        return read_table(Path(directory) / "config.json")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise WeightsError(
            f"there is no config.json in {str(directory)!r}; give a directory of HF weights"
        ) from error


def read_table(file: Path) -> dict[str, Any]:
    """Returns the table in a JSON file of a model's directory.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        WeightsError: it cannot be read, or is not a table in JSON.
    """
    try:
        values = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror})") from error
    # A nesting of thousands of brackets is what raises RecursionError.
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON ({error}); download it again") from error

    if not isinstance(values, dict):
        raise WeightsError(f"{file} holds no table of values; download it again")

    return values


def _check_sizes(name: str, hf: Mapping[str, Any]) -> None:
    """Raises WeightsError where a size of a config.json is no whole number of a sane magnitude.

    Plans and allocations are computed from these numbers before any tensor contradicts them.
    """
    # Far above any model there is, and far below what would overflow or exhaust memory.
    limits = {
        "num_hidden_layers": 1000,
        "hidden_size": 2**20,
        "intermediate_size": 2**24,
        "num_attention_heads": 2**16,
        "vocab_size": 2**24,
        "max_position_embeddings": 2**40,
    }
    for optional in ("num_key_value_heads", "head_dim"):
        if hf.get(optional) is not None:
            limits[optional] = 2**16

    for key, limit in limits.items():
        # type, not isinstance: true is no size.
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
    """Returns the number `value`, which must be one, finite and above 0."""
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise WeightsError(f"{name} with {key} = {value!r} is not a model; it must be above 0")
    return float(value)


def _refuse_variants(name: str, hf: Mapping[str, Any]) -> None:
    """Refuses settings of a supported architecture that would change the computation unseen.

    A setting is refused only where transformers computes otherwise because of it: Qwen2 has its
    biases whatever `attention_bias` says, and a window that no layer uses changes nothing.
    """
    # swish is transformers' other name of silu (ACT2FN in its activations.py).
    activation = hf.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        _refuse(name, "hidden_act", activation, "only silu is supported")

    layer_types = hf.get("layer_types") or []
    window = hf.get("use_sliding_window")
    # Where layer_types is given, it says layer by layer which has a window. Otherwise those from
    # max_window_layers on have one. 28 and 4096 are transformers' defaults.
    if window and not layer_types:
        first_window_layer = hf.get("max_window_layers", 28)
        has_size = hf.get("sliding_window", 4096) is not None
        if has_size and first_window_layer < hf["num_hidden_layers"]:
            _refuse(name, "use_sliding_window", window, "sliding windows are not supported")
    if any(layer_type != "full_attention" for layer_type in layer_types):
        _refuse(name, "layer_types", layer_types, "every layer must have full attention")

    attention_bias = hf.get("attention_bias")
    llama_has_one_bias = name == "LlamaForCausalLM" and (
        bool(attention_bias) != bool(hf.get("mlp_bias"))
    )
    # Qwen2's biases are fixed. Qwen3's attention_bias adds one to the output projection too.
    qwen3_has_bias = name == "Qwen3ForCausalLM" and bool(attention_bias)
    if llama_has_one_bias or qwen3_has_bias:
        _refuse(
            name,
            "attention_bias",
            attention_bias,
            "megatron-core has biases on all of a layer's projections or on q, k and v alone, so "
            "Llama takes attention_bias and mlp_bias together, Qwen3 neither",
        )

    if hf.get("quantization_config") is not None:
        reason = "train from unquantised weights"
        _refuse(name, "quantization_config", hf["quantization_config"], reason)
    if hf.get("attention_dropout"):
        _refuse(name, "attention_dropout", hf["attention_dropout"], "dropout must be 0")


def _refuse(name: str, key: str, value: Any, reason: str) -> NoReturn:
    raise WeightsError(f"{name} with {key} = {value!r} is not supported: {reason}")


def _rope(name: str, hf: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rotary embedding's parameters, from the spelling of transformers 4 or 5.

    transformers 4 reads rope_theta and rope_scaling. transformers 5 reads rope_parameters, but
    lets rope_scaling replace them whole: where both are there, they must agree.
    """
    scaling = hf.get("rope_scaling") or {}
    parameters = hf.get("rope_parameters") or {}
    if any(isinstance(value, Mapping) for value in parameters.values()):
        _refuse(name, "rope_parameters", parameters, "every layer must have the same rope")

    if scaling and parameters:
        differing = [
            key for key in scaling if key in parameters and scaling[key] != parameters[key]
        ]
        if _rope_type(scaling) != _rope_type(parameters):
            differing.append("rope_type")
        if differing:
            raise WeightsError(
                f"{name} has both rope_scaling and rope_parameters, and they disagree in "
                f"{', '.join(dict.fromkeys(differing))}; keep the one that is right"
            )

    rope = {"rope_theta": hf.get("rope_theta", 10000.0), **scaling, **parameters}
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        _refuse(name, "partial_rotary_factor", partial, "the whole head must be rotated")
    return rope


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_factor(name: str, rope: Mapping[str, Any]) -> float | None:
    """Returns the factor of llama3's scaling, None without scaling; refuses every other kind."""
    rope_type = _rope_type(rope)
    if rope_type == "default":
        return None
    # Both divide frequencies by the factor, so that 1 is no scaling.
    if rope_type in ("linear", "llama3") and rope.get("factor") == 1:
        return None

    wrong = {key: rope.get(key) for key, value in LLAMA3_ROPE.items() if rope.get(key) != value}
    if rope_type != "llama3" or wrong:
        detail = ""
        if rope_type == "llama3":
            detail = f" with {wrong}"
        raise WeightsError(
            f"{name} with rope type {rope_type}{detail} is not supported; "
            f"supported are default and llama3 with {LLAMA3_ROPE}"
        )

    return _positive(name, "rope factor", rope.get("factor"))
