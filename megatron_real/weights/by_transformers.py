"""What transformers makes of an HF directory, with its refusals in one sentence.

transformers has acceptance rules of its own, which change between its versions: a config that is
fine for us may be one that its validators reject. The converters never come here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import Architecture


def load_model(directory: str | Path, dtype: torch.dtype) -> Any:
    """Returns transformers' model with the weights of the directory.

    Raises:
        WeightsError: transformers cannot load it, or reads another rotary embedding than we do.
    """
    with _refusals(directory, "model"):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    _check_rope(model, directory)
    return model


def new_model(directory: str | Path, dtype: torch.dtype) -> Any:
    """Returns transformers' model of the directory's config.json, with random weights.

    Raises:
        WeightsError: transformers cannot build it, or reads another rotary embedding than we do.
    """
    with _refusals(directory, "config.json"):
        config = AutoConfig.from_pretrained(directory)
        # from_config reads no weights and runs no code of the directory's.
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _check_rope(model, directory)
    return model


def load_tokenizer(directory: str | Path, *, trust_remote_code: bool, plain: bool = False) -> Any:
    """Returns transformers' tokenizer of the directory.

    Args:
        directory: HF directory.
        trust_remote_code: run the directory's own Python files.
        plain: take tokenizer.json as it is, not the class of the model's family.

    Raises:
        WeightsError: transformers cannot load it.
    """
    with _refusals(directory, "tokenizer"):
        if plain:
            return PreTrainedTokenizerFast.from_pretrained(directory)
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)


def _check_rope(model: Any, directory: str | Path) -> None:
    """Compares the rotary frequencies that transformers made with those of config.json.

    They are a buffer, not a weight, so that nothing else would show that a version of
    transformers does not know the spelling of the config (4 ignores what 5 writes).
    """
    computed = model.model.rotary_emb.inv_freq.double().cpu()
    expected = torch.tensor(Architecture.read(directory).rope_frequencies, dtype=torch.float64)

    # float32 rounds to 1e-7; another base or factor is off by more than this.
    same_shape = computed.shape == expected.shape
    if not same_shape or not torch.allclose(computed, expected, rtol=1e-4, atol=0):
        raise WeightsError(
            f"transformers {version('transformers')} does not read the rotary embedding that "
            f"{Path(directory) / 'config.json'} describes (frequencies {computed[:3].tolist()} "
            f"instead of {expected[:3].tolist()}); take another version of transformers"
        )


@contextmanager
def _refusals(directory: str | Path, part: str) -> Iterator[None]:
    """Within, whatever transformers raises becomes a WeightsError of one sentence."""
    try:
        yield
    # Its validators raise classes of their own, and a strange file can fail anywhere in it.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise WeightsError(
            f"transformers {version('transformers')} cannot load the {part} of {str(directory)!r} "
            f"({type(error).__name__}: {reason})"
        ) from error
