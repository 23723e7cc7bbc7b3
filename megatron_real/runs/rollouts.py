"""Rollouts on disk: one JSON object per line, exact enough to be trained on again."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_real.records import Completion, Prompt, Rollout, Verdict


def write_rollouts(
    path: Path, rollouts: Sequence[Rollout], *, scores: Sequence[float] = (), weights: Sequence[float] = ()
) -> None:
    """Writes all rollouts of a step; scores and weights once they are known. The file is replaced as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for i, rollout in enumerate(rollouts):
            row = _row(rollout) | {"score": _number(scores, i), "weight": _number(weights, i)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.rename(path)


def read_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of a file written by `write_rollouts`.

    Raises:
        ValueError: the file is missing, or a line is broken; names it.
    """
    if not path.is_file():
        raise ValueError(f"there are no saved rollouts at {path}; rollout.replay takes the directory of a finished run")
    rollouts = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rollouts.append(_rollout(json.loads(line)))
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"{path}:{number} is not a saved rollout ({error!r}); the file may be cut") from error
    return rollouts


def _row(rollout: Rollout) -> dict[str, Any]:
    prompt, completion, verdict = rollout.prompt, rollout.completion, rollout.verdict
    return {
        "uid": prompt.uid,
        "group": rollout.group,
        "sample": rollout.sample,
        "prompt": prompt.text,
        "completion": completion.text,
        "answers": list(prompt.answers),
        "status": verdict.status,
        "label": verdict.label,
        "reward": verdict.reward,
        "source": prompt.source,
        "finished": completion.finished,
        "prompt_token_ids": list(prompt.token_ids),
        "token_ids": list(completion.token_ids),
        "logprobs": list(completion.logprobs),
    }


def _rollout(row: dict[str, Any]) -> Rollout:
    prompt = Prompt(
        row["uid"], row["prompt"], tuple(row["prompt_token_ids"]), tuple(row["answers"]), source=row["source"]
    )
    completion = Completion(tuple(row["token_ids"]), tuple(row["logprobs"]), row["completion"], row["finished"])
    return Rollout(prompt, row["group"], row["sample"], completion, Verdict(row["status"], row["label"], row["reward"]))


def _number(values: Sequence[float], i: int) -> float | None:
    """JSON has no NaN."""
    return values[i] if i < len(values) and math.isfinite(values[i]) else None
