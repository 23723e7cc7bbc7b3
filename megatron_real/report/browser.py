"""The rollouts that a page carries: whole groups, of evenly spaced steps, within a limit of bytes.

Nothing of a rollout is interpreted here. Characters that a terminal or a browser would act on, NUL
and changes of the direction of writing among them, are replaced by visible ones.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_real.report.variants import Run
from megatron_real.runs.rollouts import read_rows

MAX_STEPS = 40
"""Steps of a run whose rollouts are read, where the user asks for none."""
MAX_TEXT = 4000
"""Characters of a prompt or an answer that are kept.

Three quarters are from its beginning, the rest from its end.
"""
MAX_SHADED = 400
"""Tokens of an answer that are kept with their figures."""

# Fixed: two reports of a run show the same groups.
_SEED = 0
# From U+2400 on, Unicode has pictures of the control characters in their own order.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
_VISIBLE |= {0x7F: 0x2421}
# Halves of surrogate pairs, which no browser can show and some cannot copy.
_VISIBLE |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)
_DIRECTIONS = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
# The second set of control characters: a terminal takes U+009B for ESC [.
_NAMED = [*_DIRECTIONS, *range(0x80, 0xA0)]
_TABLE: dict[int, int | str] = {**_VISIBLE, **{code: f"<U+{code:04X}>" for code in _NAMED}}


@dataclass(frozen=True)
class Sample:
    """The part of a run's rollouts that a page carries."""

    run: str
    """Its name."""
    groups: Sequence[Mapping[str, Any]]
    """Each with its step, prompt, gold answers and rollouts; plain values for JSON."""
    num_rollouts: int
    """Number of rollouts in `groups`."""
    num_read: int
    """Number of rollouts of the steps that were read."""
    num_steps: int
    """Number of steps that were read."""
    num_saved_steps: int
    """Number of steps whose rollouts are on disk."""


def sample_of(run: Run, *, max_bytes: int, steps: Sequence[int] = ()) -> Sample:
    """Chooses the groups of a run that a page carries.

    They are drawn at random with a fixed seed, an equal share of bytes for each step.

    Args:
        run: the run.
        max_bytes: how many bytes of JSON they may take.
        steps: the steps to show; none for at most MAX_STEPS of all, the first and the last among
            them.

    Raises:
        ValueError: a step has no rollouts on disk, or its file is damaged.
    """
    saved = run.records.steps()
    missing = [step for step in steps if step not in saved]
    if missing:
        kept = "it has none"
        if saved:
            kept = f"it has steps {saved[0]} to {saved[-1]}"
        raise ValueError(f"{run.name} has no rollouts of step {missing[0]} on disk; {kept}")

    shown_steps = list(steps) or spaced(saved, MAX_STEPS)
    # Once for all steps: a tokenizer's file may have many megabytes.
    decode = token_decoder(run.config)
    groups: list[Mapping[str, Any]] = []
    num_read = 0
    left = max_bytes

    for i, step in enumerate(shown_steps):
        # What earlier steps did not use is shared by the later ones.
        share = left / (len(shown_steps) - i)
        rows = list(read_rows(run.records.directory.saved_rollouts(step)))
        num_read += len(rows)
        for group in _groups(rows, decode, seed=step):
            size = len(json.dumps(group))
            # A later group of the step may be short enough: one long group must not end the step.
            if size > share:
                continue
            share -= size
            left -= size
            groups.append(group)

    num_rollouts = sum(len(group["rollouts"]) for group in groups)
    return Sample(run.name, groups, num_rollouts, num_read, len(shown_steps), len(saved))


def spaced(steps: Sequence[int], limit: int) -> list[int]:
    """Returns at most `limit` of the steps, evenly spaced, the first and the last among them."""
    if len(steps) <= limit:
        return list(steps)
    # Rounding hits both ends: i = 0 is the first step, i = limit - 1 the last.
    return [steps[round(i * (len(steps) - 1) / (limit - 1))] for i in range(limit)]


def visible(text: str, max_text: int = MAX_TEXT) -> str:
    """Returns a text whose control characters can be seen; a long one is cut in the middle.

    Args:
        text: what a model wrote.
        max_text: how many characters are kept.
    """
    if len(text) > max_text:
        head = text[: max_text * 3 // 4]
        tail = text[-max_text // 4 :]
        text = f"{head}\n[... {len(text) - max_text:,} characters are left out ...]\n{tail}"
    return text.translate(_TABLE)


def _groups(
    rows: Sequence[Mapping[str, Any]], decode: Any, *, seed: int
) -> Iterator[Mapping[str, Any]]:
    """Yields the groups of a step in random order, which is the same at every report."""
    members: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        members.setdefault(row["group"], []).append(row)

    order = list(members)
    random.Random(_SEED + seed).shuffle(order)
    for group in order:
        first = members[group][0]
        # What a model or a data file wrote goes through `visible`; the rest are our own numbers.
        yield {
            "step": first["step"],
            "group": group,
            "uid": visible(str(first["uid"])),
            "prompt": visible(first["prompt"]),
            "gold": [visible(answer) for answer in first["answers"]],
            "rollouts": [_rollout(row, decode) for row in members[group]],
        }


def _rollout(row: Mapping[str, Any], decode: Any) -> dict[str, Any]:
    """Returns what is shown of a rollout, with its tokens where they can be decoded."""
    rollout = {
        "sample": row["sample"],
        "text": visible(row["completion"]),
        "status": str(row["status"]),
        "label": int(row["label"]),
        "reason": visible(row.get("reason") or ""),
        "reward": _rounded(row.get("reward")),
        "score": _rounded(row.get("score")),
        "weight": _rounded(row.get("weight")),
        "length": len(row["token_ids"]),
        "finished": bool(row["finished"]),
    }

    # Of the answer's beginning only: a token's figures take several times the bytes of its text.
    if decode is not None:
        rollout["tokens"] = [visible(text) for text in decode(row["token_ids"][:MAX_SHADED])]
        rollout["logprobs"] = [_rounded(p, 2) for p in row["logprobs"][:MAX_SHADED]]
        # None where the step was not trained on yet, or the run keeps no figures of single tokens.
        if row.get("token_weights") is not None:
            rollout["ratios"] = [_rounded(r, 3) for r in row["log_ratios"][:MAX_SHADED]]
            # To digits rather than decimals: weights are small, and only their ratios matter.
            rollout["weights"] = [
                None if _rounded(weight) is None else float(f"{weight:.3g}")
                for weight in row["token_weights"][:MAX_SHADED]
            ]

    return rollout


def token_decoder(config: Mapping[str, Any]) -> Callable[[Sequence[int]], list[str]] | None:
    """Returns a function from token ids to the text of each, by the tokenizer of a run's model.

    A character of several tokens is shown as replacement characters.

    Args:
        config: the run's configuration.

    Returns:
        None where the tokenizer is gone or cannot be read.
    """
    file = Path(str(config.get("model", {}).get("path", ""))) / "tokenizer.json"
    if not file.is_file():
        return None

    try:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # the library raises plain Exception; the report then has no shading
        return None

    def decode(token_ids: Sequence[int]) -> list[str]:
        # One by one: a text that is decoded as a whole cannot be cut at the borders of its tokens.
        single_tokens = [[token] for token in token_ids]
        return list(tokenizer.decode_batch(single_tokens, skip_special_tokens=False))

    return decode


def _rounded(value: float | None, digits: int = 5) -> float | None:
    """Rounds to decimals; None for NaN and infinity, which JSON does not have."""
    if value is None or not math.isfinite(value):
        return None
    return round(float(value), digits)
