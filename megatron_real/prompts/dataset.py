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


# Templates of Llama 3.x write the date. One that moved would make other prompts of the same data on
# another day, so that neither a run nor an evaluation could go on. It is the date that those
# templates fall back to.
_TEMPLATE_DATE = datetime.datetime(2024, 7, 26)


def load_prompts(
    path: str | Path, tokenizer: Any, *, split: str = "", suffix: str = "", max_tokens: int
) -> list[Prompt]:
    """Reads rows, renders them by the tokenizer's chat template and drops those that are too long.

    The log says how many were dropped, and how many gold answers no completion is likely to match.

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

    # With several answers, a single one that can be matched is enough.
    unmatchable = [prompt for prompt in prompts if all(map(why_unmatchable, prompt.answers))]
    if unmatchable:
        logger.warning(
            "%s: %d of %d problems have a gold answer that no completion is likely to match, the "
            "first %s (%.60r); see `megatron-real labels golds`",
            path,
            len(unmatchable),
            len(prompts),
            unmatchable[0].uid,
            unmatchable[0].answers[0],
        )

    kept = [prompt for prompt in prompts if len(prompt.token_ids) <= max_tokens]
    if not kept:
        raise ValueError(
            f"all {len(prompts)} prompts of {str(path)!r} exceed data.max_prompt_tokens = "
            f"{max_tokens}"
        )

    if len(kept) < len(prompts):
        logger.warning(
            "%s: dropped %d of %d prompts longer than %d tokens",
            path,
            len(prompts) - len(kept),
            len(prompts),
            max_tokens,
        )

    return kept


def _prompt(row: Row, tokenizer: Any, suffix: str) -> Prompt:
    """Renders and tokenises one row.

    Raises:
        ValueError: the chat template refuses it.
    """
    try:
        text = _render(row.messages, tokenizer, suffix)
    except TemplateError as error:
        roles = ", ".join(str(message["role"]) for message in row.messages)
        raise ValueError(
            f"the model's chat template refuses the row {row.uid} with the roles {roles} "
            f"({error}); change its messages"
        ) from error

    # The template has already written the special tokens: adding them again would double the first
    # one.
    token_ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Prompt(row.uid, text, token_ids, row.answers, row.source, row.metadata)


def _render(messages: Sequence[Mapping[str, Any]], tokenizer: Any, suffix: str) -> str:
    """Returns the text of a chat, up to where the model's answer begins."""
    # Down to the parts: the suffix must not get into the row itself.
    chat = [copy.deepcopy(dict(message)) for message in messages]
    if suffix:
        content = chat[-1]["content"]
        if isinstance(content, str):
            chat[-1]["content"] = f"{content} {suffix}"
        else:  # a list of parts
            chat[-1]["content"] = [*content, {"type": "text", "text": f" {suffix}"}]

    # The tokenizer of a base model may have none.
    if getattr(tokenizer, "chat_template", None):
        rendered: str = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=True, strftime_now=_TEMPLATE_DATE.strftime
        )
        return rendered

    texts: list[str] = []
    for message in chat:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content)
        texts.append(content)
    return "\n".join(texts)
