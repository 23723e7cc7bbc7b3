"""Rows -> rendered, tokenised prompts."""

from __future__ import annotations

import copy
import datetime
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from megatron_real.labels.golds import why_unmatchable
from megatron_real.prompts.rows import Row, read_rows
from megatron_real.records import Prompt

logger = logging.getLogger(__name__)


def load_prompts(
    path: str | Path, tokenizer: Any, *, split: str = "", suffix: str = "", max_tokens: int
) -> list[Prompt]:
    """Reads rows, renders them by the tokenizer's chat template and drops those that are too long,
    counting them.

    Args:
        path: JSONL or parquet file, or saved HF dataset.
        tokenizer: transformers tokenizer; without a chat template the messages are joined as they
            are.
        split: which split of a folder that has several.
        suffix: appended to the last message, after a space.
        max_tokens: longest prompt that is kept.

    Raises:
        ValueError: no row is usable, the chat template refuses a row, or every prompt is too long.
    """
    prompts = [_prompt(row, tokenizer, suffix) for row in read_rows(path, split=split)]
    _count_unmatchable(path, prompts)
    kept = [p for p in prompts if len(p.token_ids) <= max_tokens]
    if not kept:
        raise ValueError(
            f"all {len(prompts)} prompts of {str(path)!r} exceed data.max_prompt_tokens = {max_tokens}"
        )
    if len(kept) < len(prompts):
        dropped = len(prompts) - len(kept)
        logger.warning(
            "%s: dropped %d of %d prompts longer than %d tokens",
            path,
            dropped,
            len(prompts),
            max_tokens,
        )
    return kept


def _count_unmatchable(path: str | Path, prompts: Sequence[Prompt]) -> None:
    """Warns of golds that no completion can match, by their normal form; `megatron-real labels
    golds` lists them.
    """
    hopeless = [p for p in prompts if all(why_unmatchable(answer) for answer in p.answers)]
    if hopeless:
        logger.warning(
            "%s: %d of %d problems have a gold answer that no completion is likely to match, the first %s (%.60r); see "
            "`megatron-real labels golds`",
            path,
            len(hopeless),
            len(prompts),
            hopeless[0].uid,
            hopeless[0].answers[0],
        )


def _prompt(row: Row, tokenizer: Any, suffix: str) -> Prompt:
    try:
        text = _render(row.messages, tokenizer, suffix)
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in row.messages)
        raise ValueError(
            f"the model's chat template refuses the row {row.uid} with the roles {roles} ({error}); change its messages"
        ) from error
    # The template has already written the special tokens: adding them again would double the first
    # one.
    token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Prompt(row.uid, text, token_ids, row.answers, row.source, row.metadata)


# Templates of Llama 3.x write the date. One that moved would make other prompts of the same data on
# another day, so that neither a run nor an evaluation could go on. It is the date that those
# templates fall back to.
_TEMPLATE_DATE = datetime.datetime(2024, 7, 26)


def _render(messages: Sequence[Mapping[str, Any]], tokenizer: Any, suffix: str) -> str:
    chat = [copy.deepcopy(dict(message)) for message in messages]
    if suffix:
        _append(chat[-1], suffix)
    if getattr(tokenizer, "chat_template", None):
        text: str = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, strftime_now=_TEMPLATE_DATE.strftime
        )
        return text
    return "\n".join(_text(message["content"]) for message in chat)


def _append(message: dict[str, Any], suffix: str) -> None:
    """Adds the suffix after a space, to the last part where a content has parts."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = f"{content} {suffix}"
    else:
        message["content"] = [*content, {"type": "text", "text": f" {suffix}"}]


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
