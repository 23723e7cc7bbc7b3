"""The model as Megatron-LM's command-line arguments: written into checkpoints, and read from them.

A checkpoint's tensors do not show its rotary base or epsilon. Its own arguments do, so that a
config.json that says otherwise is refused: the export would be another model.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture


def megatron_args(a: Architecture, **parallel: int) -> argparse.Namespace:
    """Returns the model as Megatron-LM's command-line arguments.

    Args:
        a: the model.
        parallel: sizes of the parallel layout by their argument's name; 1 where not given.
    """
    return argparse.Namespace(
        num_layers=a.num_layers,
        hidden_size=a.hidden_size,
        ffn_hidden_size=a.ffn_size,
        num_attention_heads=a.num_heads,
        # Also where every head has a group of its own, which is plain attention.
        group_query_attention=True,
        num_query_groups=a.num_kv_heads,
        kv_channels=a.head_dim,
        max_position_embeddings=a.max_positions,
        position_embedding_type="rope",
        # Megatron-LM's argument is a whole number.
        rotary_base=int(a.rope_theta),
        use_rope_scaling=a.rope_factor is not None,
        # 8.0 is Megatron-LM's default, which nothing reads without use_rope_scaling.
        rope_scaling_factor=a.rope_factor or 8.0,
        rotary_percent=1.0,
        normalization="RMSNorm",
        norm_epsilon=a.norm_eps,
        swiglu=True,
        add_bias_linear=a.linear_bias,
        add_qkv_bias=a.qkv_bias,
        qk_layernorm=a.qk_norm,
        untie_embeddings_and_output_weights=not a.tied,
        vocab_size=a.vocab_size,
        padded_vocab_size=a.padded_vocab(parallel.get("tensor_model_parallel_size", 1)),
        # The multiple of Architecture.padded_vocab.
        make_vocab_size_divisible_by=128,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, **parallel},
    )


def check_arguments(held: Any, architecture: Architecture, checkpoint: Path) -> None:
    """Compares a checkpoint's own arguments with config.json where its tensors cannot show it.

    Args:
        held: the arguments, an object with attributes or a table; None where there are none.
        architecture: what config.json says.
        checkpoint: for messages.

    Raises:
        WeightsError: they disagree; names every argument that does.
    """
    if isinstance(held, Mapping):
        values = dict(held)
    else:
        values = dict(getattr(held, "__dict__", {}))

    # Of the arguments, those that change the computation and leave names and shapes as they are.
    a = architecture
    expected: dict[str, Any] = {
        "num_attention_heads": a.num_heads,
        "rotary_base": int(a.rope_theta),
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "position_embedding_type": "rope",
        "use_rope_scaling": a.rope_factor is not None,
        "norm_epsilon": a.norm_eps,
        # What earlier versions of Megatron-LM called norm_epsilon.
        "layernorm_epsilon": a.norm_eps,
        "apply_layernorm_1p": False,
        "normalization": "RMSNorm",
        "swiglu": True,
        "squared_relu": False,
        "window_size": None,
    }
    # These are read only together with another argument, and hold any default without it.
    if a.rope_factor is not None:
        expected["rope_scaling_factor"] = a.rope_factor
    if values.get("group_query_attention"):
        expected["num_query_groups"] = a.num_kv_heads
    if values.get("kv_channels") is not None:
        expected["kv_channels"] = a.head_dim
    # Positions are divided by it; None and 1 are the same.
    if values.get("rotary_seq_len_interpolation_factor") is not None:
        expected["rotary_seq_len_interpolation_factor"] = 1

    differing = []
    for name, right in expected.items():
        # Missing in arguments of an earlier Megatron-LM, which did what is now the default.
        value = values.get(name, right)
        if not isinstance(value, (int, float, str, type(None))):
            continue  # an object of a class that is not read

        if not _same(value, right):
            differing.append(f"{name} {value!r} instead of {right!r}")
    if differing:
        raise WeightsError(
            f"{checkpoint} was trained with {', '.join(differing)}, which config.json stands for; "
            f"give the config.json of this checkpoint by --hf-config"
        )


def _same(value: Any, right: Any) -> bool:
    """Whether two arguments are equal, numbers up to the rounding of a decimal spelling."""
    if isinstance(value, float) or isinstance(right, float):
        numbers = isinstance(value, (int, float)) and isinstance(right, (int, float))
        return numbers and abs(value - right) <= 1e-9 * max(abs(value), abs(right))
    return bool(value == right)
