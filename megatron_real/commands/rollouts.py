"""`megatron-real rollouts`: a run's rollouts as JSON lines.

    megatron-real rollouts RUN_DIR [--steps 12 20-29 ...] [--without-tokens]

A line has the prompt, the completion, its label, reward, score, weight and tokens
(docs/checkpoints.md). The command reads only, and needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from megatron_real.commands.terminal import refuse
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import read_rows

SUMMARY = "print a run's rollouts as JSON lines"
EXAMPLES = """\
examples:
  megatron-real rollouts runs/my-run --steps 12 --without-tokens | head -3
  megatron-real rollouts runs/my-run --steps 1-100 | jq 'select(.label == 0) | .completion'
"""

_TOKEN_COLUMNS = (
    "prompt_token_ids",
    "token_ids",
    "logprobs",
    "reference_logprobs",
    "trained",
    "weight_version",
)


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's directory")
    parser.add_argument(
        "--steps", nargs="+", metavar="STEP", help="steps, such as 12 or 20-29; default: all"
    )
    parser.add_argument(
        "--without-tokens", action="store_true", help="leave out token ids and their log-probs"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the rollouts, or returns 2 and says in one sentence why not."""
    try:
        directory = RunDirectory(options.run_dir)
        for step in _steps(directory, options.steps):
            for row in read_rows(directory.saved_rollouts(step)):
                if options.without_tokens:
                    row = {name: row[name] for name in row if name not in _TOKEN_COLUMNS}
                # ASCII alone: a model may emit half a surrogate pair, or control a terminal.
                print(json.dumps(row))
    except ValueError as error:
        return refuse(error)
    return 0


def _steps(directory: RunDirectory, wanted: Sequence[str] | None) -> list[int]:
    """Returns the steps to print.

    Args:
        directory: of the run.
        wanted: words such as 12 or 20-29; None: all that the run has saved.

    Raises:
        ValueError: the run has none, or not all of those that are wanted.
    """
    saved = directory.saved_steps()
    if not saved:
        raise ValueError(
            f"{directory.path} has no rollouts of a finished step; give the directory of a run "
            f"that has"
        )
    if wanted is None:
        return saved

    steps: list[int] = []
    for words in wanted:
        first, _, last = words.partition("-")
        try:
            steps += range(int(first), int(last or first) + 1)
        except ValueError as error:
            raise ValueError(
                f"--steps {words!r} is no step; give numbers such as 12 or 20-29"
            ) from error
    for step in steps:
        if step not in saved:
            raise ValueError(
                f"{directory.path} has no rollouts of step {step}; it has {len(saved)} steps "
                f"between {saved[0]} and {saved[-1]}"
            )
    return steps
