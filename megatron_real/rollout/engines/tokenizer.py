"""The model's tokenizer, the tokens that end a response, and the record of a completion.

They are the same for every engine.
"""

from __future__ import annotations

import itertools
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
from megatron_real.weights.architecture import read_config, read_table
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
    """Loads the transformers tokenizer of the model's HF directory.

    It cuts texts as tokenizer.json says. Some versions of transformers build a family's own
    tokenizer around the vocabulary and leave out what tokenizer.json says (transformers issue
    45488; 5.19 does so for every Qwen2 directory). A model would then train on tokens that it has
    never seen. In that case the file is taken as it is.

    Raises:
        WeightsError: transformers cannot load it, or cannot be made to cut texts in that way.
    """
    directory = Path(model.path)
    tokenizer = by_transformers(directory, trust_remote_code=model.trust_remote_code)
    difference = _difference(tokenizer, directory)
    if not difference:
        return tokenizer

    # The class that takes tokenizer.json as it is, and no code of the family's.
    plain = by_transformers(directory, trust_remote_code=False, plain=True)
    if _difference(plain, directory):
        raise WeightsError(f"{difference}; take another version of transformers")
    logger.warning("%s; the file is taken as it is", difference)
    return plain


def _difference(tokenizer: Any, directory: Path) -> str:
    """Says where the tokenizer disagrees with tokenizer.json; empty where it does not.

    The file is read by the tokenizers library, for which it is made.
    """
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
    """Returns every token that ends a response: the tokenizer's, and the generation config's.

    Without a generation config, config.json takes its place, as in transformers.

    Raises:
        WeightsError: a file cannot be read, or there is no such token.
    """
    try:
        generation_config = read_table(Path(path) / "generation_config.json")
    except FileNotFoundError:
        generation_config = read_config(Path(path))

    # One token or a list of them. Base models often name another one than their tokenizer.
    listed = generation_config.get("eos_token_id")
    several = listed if isinstance(listed, list) else [listed]
    eos = [token for token in dict.fromkeys([tokenizer_eos, *several]) if token is not None]

    if not eos:
        raise WeightsError(
            f"neither the tokenizer nor the generation config of {path!r} names an "
            "end-of-sequence token"
        )

    # `type` and not isinstance: True would pass for the token 1.
    if any(type(token) is not int or token < 0 for token in eos):
        raise WeightsError(f"{path!r} names {listed!r} as eos_token_id, which are no token numbers")
    return eos


def completion_of(
    tokens: Sequence[int], logprobs: Sequence[float], tokenizer: Any, eos: Container[int]
) -> Completion:
    """Returns the record of what an engine sampled.

    It is finished where the last token ends a response.
    """
    assert len(tokens) == len(logprobs), "one log-prob for each sampled token"
    # A response that was cut off by its length has another last token.
    finished = len(tokens) > 0 and tokens[-1] in eos
    return Completion(tokens, logprobs, decoded(tokens, tokenizer), finished)


def decoded(tokens: Sequence[int], tokenizer: Any) -> str:
    """Returns the text of a response without special tokens, but with the marks of thinking.

    Some tokenizers call the marks special that open and close thinking. Without them a box within
    the thinking would count as the answer.
    """
    special = set(tokenizer.all_special_tokens)
    marks = {}
    for mark in itertools.chain.from_iterable(THINKING_MARKS):
        if mark in special:
            marks[tokenizer.convert_tokens_to_ids(mark)] = mark

    # The text between two marks is decoded as a whole: tokens alone may be parts of a character.
    pieces: list[str] = []
    start = 0
    for end, token in enumerate(tokens):
        if token in marks:
            pieces.append(tokenizer.decode(tokens[start:end], skip_special_tokens=True))
            pieces.append(marks[token])
            start = end + 1
    pieces.append(tokenizer.decode(tokens[start:], skip_special_tokens=True))

    return "".join(pieces)
