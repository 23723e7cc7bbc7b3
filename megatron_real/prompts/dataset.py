"""Rows -> rendered, tokenised prompts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_real.prompts.rows import Row, read_rows
from megatron_real.records import Prompt

logger = logging.getLogger(__name__)


def load_prompts(path: str | Path, tokenizer: Any, *, suffix: str = "", max_tokens: int) -> list[Prompt]:
    """Reads rows, renders them by the tokenizer's chat template and drops those that are too long, counting them.

    Args:
        path: JSONL or parquet file, or saved HF dataset.
        tokenizer: transformers tokenizer; without a chat template the messages are joined as they are.
        suffix: appended to the last message, after a space.
        max_tokens: longest prompt that is kept.

    Raises:
        ValueError: no row is usable, or every prompt is too long.
    """
    prompts = [_prompt(row, tokenizer, suffix) for row in read_rows(path)]
    kept = [p for p in prompts if len(p.token_ids) <= max_tokens]
    if not kept:
        raise ValueError(f"all {len(prompts)} prompts of {str(path)!r} exceed data.max_prompt_tokens = {max_tokens}")
    if len(kept) < len(prompts):
        dropped = len(prompts) - len(kept)
        logger.warning("%s: dropped %d of %d prompts longer than %d tokens", path, dropped, len(prompts), max_tokens)
    return kept


def _prompt(row: Row, tokenizer: Any, suffix: str) -> Prompt:
    text = _render(row.messages, tokenizer, suffix)
    # The template has already written the special tokens: adding them again would double the first one.
    token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Prompt(row.uid, text, token_ids, row.answers, row.source, row.metadata)


def _render(messages: Sequence[Mapping[str, str]], tokenizer: Any, suffix: str) -> str:
    chat = [dict(message) for message in messages]
    if suffix:
        chat[-1]["content"] = f"{chat[-1]['content']} {suffix}"
    if getattr(tokenizer, "chat_template", None):
        text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return text
    return "\n".join(message["content"] for message in chat)
