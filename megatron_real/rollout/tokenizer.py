"""The model's tokenizer, the tokens that end a response, and what a completion is: the same for every engine."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from megatron_real.config import ModelConfig
from megatron_real.records import Completion


def load_tokenizer(model: ModelConfig) -> Any:
    """The transformers tokenizer of the model's HF directory."""
    return AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)


def eos_ids(path: str, tokenizer_eos: int | None) -> list[int]:
    """Every token that ends a response: the generation config may name more than the tokenizer does."""
    try:
        configured = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # the directory has no generation_config.json
        configured = None
    listed = configured if isinstance(configured, list) else [configured]
    eos = [token for token in dict.fromkeys([tokenizer_eos, *listed]) if token is not None]
    if not eos:
        raise ValueError(f"neither the tokenizer nor the generation config of {path!r} names an end-of-sequence token")
    return eos


def completion_of(tokens: Sequence[int], logprobs: Sequence[float], tokenizer: Any, eos: Container[int]) -> Completion:
    """The record of what an engine sampled: finished where the last token ends a response."""
    assert len(tokens) == len(logprobs), "one log-prob for each sampled token"
    finished = len(tokens) > 0 and tokens[-1] in eos
    return Completion(tuple(tokens), tuple(logprobs), str(tokenizer.decode(tokens, skip_special_tokens=True)), finished)
