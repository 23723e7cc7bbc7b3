"""The model's tokenizer, the tokens that end a response, and what a completion is: the same for every engine."""

from __future__ import annotations

import json
import logging
from collections.abc import Container, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megatron_real.config import ModelConfig
from megatron_real.labels.answers import THINKING_MARKS
from megatron_real.records import Completion
from megatron_real.weights import WeightsError
from megatron_real.weights.architecture import read_config
from megatron_real.weights.by_transformers import load_tokenizer as by_transformers

logger = logging.getLogger(__name__)

# Where pre-tokenizers of this field differ: digits, runs of spaces, newlines, contractions, LaTeX,
# letters beyond ASCII.
_PROBES = (
    "In 1999, 12345678 + 9 = 12345687.",
    "  two  spaces   and\ttabs\n\n  indented\n",
    "It's what they'd say: \\boxed{\\frac{1}{2}}",
    "na\u00efve \u00dcber \u4f60\u597d",
    "58+67=125",
)


def load_tokenizer(model: ModelConfig) -> Any:
    """The transformers tokenizer of the model's HF directory, which cuts texts as tokenizer.json says.

    Some versions of transformers build a family's own tokenizer around the vocabulary and leave
    out what tokenizer.json says (transformers 45488; 5.19 does so for every Qwen2 directory). A
    model would then train on tokens that it has never seen. There the file is taken as it is.

    Raises:
        WeightsError: transformers cannot load it, or cannot be made to cut texts in that way.
    """
    directory = Path(model.path)
    tokenizer = by_transformers(directory, trust_remote_code=model.trust_remote_code)
    difference = _difference(tokenizer, directory)
    if not difference:
        return tokenizer
    plain = by_transformers(directory, trust_remote_code=False, plain=True)
    if _difference(plain, directory):
        raise WeightsError(f"{difference}; take another version of transformers")
    logger.warning("%s; the file is taken as it is", difference)
    return plain


def _difference(tokenizer: Any, directory: Path) -> str:
    """Where the tokenizer disagrees with tokenizer.json, read by the library that it is for."""
    file = directory / "tokenizer.json"
    if not file.is_file():
        return ""
    try:
        own = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for all that is wrong
        raise WeightsError(f"{file} is not a tokenizer ({error}); download it again") from error
    for text in _PROBES:
        expected = own.encode(text, add_special_tokens=False).ids
        # A vocabulary that cannot spell the text says nothing of how it is cut.
        if own.decode(expected, skip_special_tokens=False) != text:
            continue
        ids = tokenizer.encode(text, add_special_tokens=False)
        if ids != expected:
            return (
                f"transformers {version('transformers')} cuts {text!r} into {ids[:12]} where "
                f"{file} says {expected[:12]}"
            )
    return ""


def eos_ids(path: str, tokenizer_eos: int | None) -> list[int]:
    """Every token that ends a response: the tokenizer's, and those of the generation config.

    Without a generation config they are those of config.json, as in transformers.

    Raises:
        WeightsError: a file cannot be read, or there is no such token.
    """
    listed = _generation_config(Path(path)).get("eos_token_id")
    many = listed if isinstance(listed, list) else [listed]
    eos = [token for token in dict.fromkeys([tokenizer_eos, *many]) if token is not None]
    if not eos:
        raise WeightsError(
            f"neither the tokenizer nor the generation config of {path!r} names an end-of-sequence token"
        )
    if any(type(token) is not int or token < 0 for token in eos):
        raise WeightsError(f"{path!r} names {listed!r} as eos_token_id, which are no token numbers")
    return eos


def _generation_config(directory: Path) -> dict[str, Any]:
    file = directory / "generation_config.json"
    try:
        values = json.loads(file.read_bytes())
    except FileNotFoundError:
        return read_config(directory)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise WeightsError(f"{file} holds no table of values; download it again")
    return values


def completion_of(
    tokens: Sequence[int], logprobs: Sequence[float], tokenizer: Any, eos: Container[int]
) -> Completion:
    """The record of what an engine sampled: finished where the last token ends a response."""
    assert len(tokens) == len(logprobs), "one log-prob for each sampled token"
    finished = len(tokens) > 0 and tokens[-1] in eos
    return Completion(
        tokens,
        logprobs,
        decoded(tokens, tokenizer),
        finished,
    )


def decoded(tokens: Sequence[int], tokenizer: Any) -> str:
    """Returns the text of a response without special tokens, except for those that open or close thinking.

    Some tokenizers call these special. Without them a box within the thinking would count as the answer.
    """
    every = [mark for pair in THINKING_MARKS for mark in pair]
    special = set(tokenizer.all_special_tokens)
    marks = {tokenizer.convert_tokens_to_ids(mark): mark for mark in every if mark in special}
    pieces: list[str] = []
    start = 0
    for end in [i for i, token in enumerate(tokens) if token in marks]:
        pieces += [_without_special(tokens[start:end], tokenizer), marks[tokens[end]]]
        start = end + 1
    return "".join([*pieces, _without_special(tokens[start:], tokenizer)])


def _without_special(tokens: Sequence[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
