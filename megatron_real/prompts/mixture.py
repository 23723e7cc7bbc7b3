"""Several training sets as one list of prompts, in which each has the share of its weight."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_real.records import Prompt

logger = logging.getLogger(__name__)


def mixed(
    sets: Mapping[str, Sequence[Prompt]], weights: Mapping[str, float], *, seed: int
) -> list[Prompt]:
    """Returns one epoch of a mixture, which the cursor shuffles and resumes like any other list.

    The set that is longest for its weight is there once; the others are repeated as often as their
    shares ask, the last repetition in part, of a seeded choice. So every prompt is in every epoch.

    Args:
        sets: [1..] prompts by the name of their set, which becomes the first part of their uid.
        weights: > 0, by the same names.
        seed: of the last repetitions.
    """
    total = math.fsum(weights[name] for name in sets)
    shares = {name: weights[name] / total for name in sets}
    # The length at which the set that is longest for its weight comes exactly once.
    length = max(len(prompts) / shares[name] for name, prompts in sets.items())

    epoch: list[Prompt] = []
    for name, prompts in sets.items():
        own = [dataclasses.replace(prompt, uid=f"{name}/{prompt.uid}") for prompt in prompts]
        # max: rounding must not drop a prompt of the longest set.
        num_prompts = max(round(shares[name] * length), len(own))
        num_repetitions, rest = divmod(num_prompts, len(own))
        epoch += own * num_repetitions
        # A generator for each set: a set that is added does not change the choice of the others.
        epoch += random.Random(f"{seed}-{name}").sample(own, rest)
    return epoch


def pass_rates(path: Path) -> dict[str, float]:
    """Returns the share of correct completions of each problem of an evaluation.

    Args:
        path: OUT/samples/NAME of `megatron-real eval`, or one of its files.

    Raises:
        ValueError: there are none, or a line is no completion; names it.
    """
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))

    if not files or not files[0].is_file():
        raise ValueError(
            f"data.pass_rates = {str(path)!r} has no completions; give OUT/samples/NAME of "
            "megatron-real eval"
        )

    correct: dict[str, list[bool]] = defaultdict(list)
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
                correct[row["problem"]].append(bool(row["correct"]))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{file}:{number} is no completion of an evaluation ({error})"
                ) from error

    return {problem: sum(labels) / len(labels) for problem, labels in correct.items()}


def sometimes_solved(prompts: Sequence[Prompt], rates: Mapping[str, float]) -> list[Prompt]:
    """Returns the prompts that were solved sometimes, and those that were not asked.

    The others, always or never solved, teach nothing: the log says how many there are.

    Args:
        prompts: of one training set.
        rates: share of correct completions by uid.

    Raises:
        ValueError: no prompt was asked, or none is left.
    """
    asked = [prompt for prompt in prompts if prompt.uid in rates]
    if not asked:
        raise ValueError(
            "data.pass_rates knows none of the training prompts; evaluate the same file, whose "
            "name begins their uid"
        )

    # One that was not asked may well be of use.
    kept = [prompt for prompt in prompts if 0 < rates.get(prompt.uid, 0.5) < 1]
    if not kept:
        raise ValueError("data.pass_rates leaves no prompt: each was always or never solved")

    num_never = sum(rates[prompt.uid] == 0 for prompt in asked)
    num_always = sum(rates[prompt.uid] == 1 for prompt in asked)
    logger.info("left out %d prompts never solved and %d always solved", num_never, num_always)
    return kept
