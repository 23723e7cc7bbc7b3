"""Rollouts on disk: one JSON object per line, exact enough to be trained on again.

Floats survive bit for bit (Python writes the shortest decimal that reads back the same). Not kept: the prompt's
metadata and the seconds of its check, which training does not need.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from megatron_real.disk import whole_file
from megatron_real.records import EXCLUDED, NEGATIVE, POSITIVE, Completion, Prompt, Rollout, Status, Verdict


def write_rollouts(
    path: Path,
    rollouts: Sequence[Rollout],
    *,
    step: int,
    scores: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    minibatches: Sequence[int] | None = None,
) -> None:
    """Writes all rollouts of a step. The file is replaced as a whole: readers see the old one or the new one.

    Args:
        scores, weights, minibatches: [rollouts] once they are known; null in the file until then, and where not finite.

    Raises:
        ValueError: one of them is not as long as `rollouts`.
    """
    columns = {"score": scores, "weight": weights, "minibatch": minibatches}
    for name, values in columns.items():
        if values is not None and len(values) != len(rollouts):
            raise ValueError(f"{len(values)} values of {name} for {len(rollouts)} rollouts; give one for each")
    with whole_file(path, errors="surrogatepass") as file:  # a model may emit half a surrogate pair
        for i, rollout in enumerate(rollouts):
            found = {name: None if values is None else _finite(values[i]) for name, values in columns.items()}
            row = {"step": step, **found, **_row(rollout)}
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")


def read_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of a file written by `write_rollouts`.

    Raises:
        ValueError: the file is missing, or a line is broken; names it.
    """
    if not path.is_file():
        raise ValueError(f"there are no saved rollouts at {path}; {_saved_steps(path.parent)}")
    rollouts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rollouts.append(_rollout(json.loads(line.decode("utf-8", "surrogatepass"))))
        except (ValueError, KeyError, TypeError) as error:  # ValueError covers broken JSON and broken UTF-8
            raise ValueError(
                f"{path}:{number} is not a saved rollout ({type(error).__name__}: {error}); the file may be cut"
            ) from error
    if not rollouts:
        raise ValueError(f"{path} is empty; it holds no rollout to train on")
    return rollouts


def _saved_steps(folder: Path) -> str:
    steps = sorted(int(p.stem.removeprefix("step-")) for p in folder.glob("step-*.jsonl"))
    if not steps:
        return "rollout.replay takes the directory of an earlier run"
    return f"that run saved steps {steps[0]} to {steps[-1]}, so set trainer.steps to at most {steps[-1]}"


def _row(rollout: Rollout) -> dict[str, Any]:
    prompt, completion, verdict = rollout.prompt, rollout.completion, rollout.verdict
    return {
        "uid": prompt.uid,
        "group": rollout.group,
        "sample": rollout.sample,
        "source": prompt.source,
        "prompt": prompt.text,
        "completion": completion.text,
        "answers": list(prompt.answers),
        "status": verdict.status,
        "label": verdict.label,
        "reason": verdict.reason,
        "reward": None if verdict.reward is None else _finite(verdict.reward),
        "finished": completion.finished,
        "refills": rollout.refills,
        "prompt_token_ids": list(prompt.token_ids),
        "token_ids": list(completion.token_ids),
        "logprobs": [_finite(p) for p in completion.logprobs],
    }


def _rollout(row: dict[str, Any]) -> Rollout:
    token_ids, logprobs = row["token_ids"], row["logprobs"]
    if len(token_ids) != len(logprobs):
        raise ValueError(f"{len(token_ids)} token_ids but {len(logprobs)} logprobs")
    if row["label"] not in (POSITIVE, NEGATIVE, EXCLUDED):
        raise ValueError(f"label {row['label']!r} is not {POSITIVE}, {NEGATIVE} or {EXCLUDED}")
    if row["status"] not in get_args(Status):
        raise ValueError(f"status {row['status']!r} is not one of {', '.join(get_args(Status))}")
    prompt = Prompt(
        row["uid"], row["prompt"], _ints(row["prompt_token_ids"]), tuple(row["answers"]), source=row["source"]
    )
    completion = Completion(
        _ints(token_ids),
        tuple(math.nan if p is None else float(p) for p in logprobs),
        row["completion"],
        bool(row["finished"]),
    )
    verdict = Verdict(row["status"], row["label"], row["reward"], reason=row.get("reason", ""))
    return Rollout(prompt, row["group"], row["sample"], completion, verdict, row.get("refills", 0))


def _ints(values: Sequence[Any]) -> tuple[int, ...]:
    wrong = next((v for v in values if type(v) is not int), None)
    if wrong is not None:
        raise ValueError(f"token id {wrong!r} is not a whole number")
    return tuple(values)


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
