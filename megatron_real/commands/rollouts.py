"""`megatron-real rollouts`: a run's rollouts, as JSON lines for programs or as text for people.

JSON lines (docs/checkpoints.md), and one step to be read, group by group:

    megatron-real rollouts RUN_DIR [--steps 12 20-29 ...] [--without-tokens]
    megatron-real rollouts RUN_DIR --step 40 --label wrong | less

It reads only, and needs neither torch nor a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from megatron_real.commands.terminal import input_checks
from megatron_real.records import Label, Status
from megatron_real.report.browser import token_decoder, visible
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import read_rows

SUMMARY = "print a run's rollouts, as JSON lines or to be read"
EXAMPLES = """\
examples:
  megatron-real rollouts runs/my-run --step 40 --label wrong | less
  megatron-real rollouts runs/my-run --step 40 --sort weight --limit 20
  megatron-real rollouts runs/my-run --step 40 --shade weight | less -R
  megatron-real rollouts runs/my-run --steps 12 --without-tokens | head -3
  megatron-real rollouts runs/my-run --steps 1-9 | jq 'select(.label == 0)'
"""

LABELS = {"right": Label.POSITIVE, "wrong": Label.NEGATIVE, "excluded": Label.EXCLUDED}
"""The words for labels, as in the report."""
SHADES = {"logprob": "logprobs", "ratio": "log_ratios", "weight": "token_weights"}
"""What tokens are shaded by -> the column that has it."""

_TOKEN_COLUMNS = (
    "prompt_token_ids",
    "token_ids",
    "logprobs",
    "reference_logprobs",
    "log_ratios",
    "token_weights",
    "trained",
    "weight_version",
)
_SORTS: Mapping[str, Callable[[Mapping[str, Any]], float | None]] = {
    "reward": lambda row: row["reward"],
    "length": lambda row: len(row["token_ids"]),
    "score": lambda row: row["score"],
    "weight": lambda row: None if row["weight"] is None else abs(row["weight"]),
}
# log 2: the token became twice or half as likely.
_FULL = {"logprob": 5.0, "ratio": math.log(2)}
"""The figure of the strongest colour (nats); of a weight it is the largest one of the group."""
# Backgrounds of a terminal with 256 colours, from weak to strong: blue for what became or is made
# likelier, else orange.
_UP = (17, 18, 19, 20, 26)
_DOWN = (52, 94, 130, 166, 202)


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="the run's directory")
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--steps",
        nargs="+",
        metavar="STEP",
        help="as JSON lines: steps, such as 12 or 20-29; default: all",
    )
    steps.add_argument("--step", metavar="STEP", help="to be read: one step, group by group")
    parser.add_argument("--label", choices=LABELS, help="only rollouts of this label")
    parser.add_argument(
        "--status",
        choices=[status.value for status in Status],
        metavar="STATUS",
        help=f"only rollouts that ended so: {', '.join(status.value for status in Status)}",
    )
    parser.add_argument(
        "--search", default="", metavar="TEXT", help="only where prompt or answer has this text"
    )
    parser.add_argument(
        "--sort", choices=_SORTS, help="largest first, weights by size; default: by group"
    )
    parser.add_argument(
        "--limit", type=int, default=0, metavar="N", help="at most so many rollouts"
    )
    parser.add_argument(
        "--shade",
        choices=SHADES,
        help=(
            "with --step: colour each token by its log-prob, its ratio to the old policy or its "
            "weight in the loss"
        ),
    )
    parser.add_argument(
        "--without-tokens", action="store_true", help="leave out token ids and their figures"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the rollouts, or returns 2 and says in one sentence why not."""
    with input_checks():
        if options.limit < 0:
            raise ValueError(f"--limit is {options.limit}; it must be at least 0 (all)")
        if options.shade and options.step is None:
            raise ValueError("--shade colours what is to be read; give --step too")

        directory = RunDirectory(options.run_dir)
        asked_for = options.steps
        if options.step is not None:
            asked_for = [options.step]
        steps = _steps(directory, asked_for)
        # A generator: a step's file is read when its rows are wanted, which `head` may never do.
        rows = _selected(
            (row for step in steps for row in read_rows(directory.saved_rollouts(step))), options
        )

        if options.step is not None:
            _print_text(list(rows), directory, options)
            return 0

        for row in rows:
            if options.without_tokens:
                row = {name: row[name] for name in row if name not in _TOKEN_COLUMNS}
            # ASCII alone: a model may emit half a surrogate pair, or control a terminal.
            print(json.dumps(row))
    return 0


def _selected(
    rows: Iterable[Mapping[str, Any]], options: argparse.Namespace
) -> Iterator[Mapping[str, Any]]:
    """Yields the rows that the filters leave, in the order that is asked for."""
    # Nothing to search for is in every text.
    text = options.search.casefold()
    matching: Iterator[Mapping[str, Any]] = (
        row
        for row in rows
        if (options.label is None or row["label"] == LABELS[options.label])
        and (options.status is None or row["status"] == options.status)
        and (text in row["completion"].casefold() or text in row["prompt"].casefold())
    )

    if options.sort:
        key = _SORTS[options.sort]

        def last_without_figure(row: Mapping[str, Any]) -> float:
            value = key(row)
            if value is None:
                return -math.inf
            return value

        matching = iter(sorted(matching, key=last_without_figure, reverse=True))

    for number, row in enumerate(matching):
        if options.limit and number >= options.limit:
            return
        yield row


def _print_text(
    rows: Sequence[Mapping[str, Any]], directory: RunDirectory, options: argparse.Namespace
) -> None:
    """Prints rollouts under their prompts.

    Characters that a terminal would act on are replaced by visible ones.
    """
    # In whatever the terminal or the file can hold.
    encoding = sys.stdout.encoding or "ascii"

    def write(text: str) -> None:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))

    if not rows:
        write("no rollout of this step is as asked for\n")
        return

    decode = None
    if options.shade:
        if not any(row.get(SHADES[options.shade]) for row in rows):
            raise ValueError(
                f"{directory.path} has no {options.shade} of single tokens in this step; a run "
                "keeps them with trainer.keep_token_weights=true"
            )
        # A run without a readable config.yaml is told the same as one without a tokenizer.
        with suppress(ValueError):
            decode = token_decoder(directory.read_config("its tokenizer is not known"))
        if decode is None:
            raise ValueError(
                "--shade needs the tokenizer.json of the run's model, which "
                f"{directory.config} does not lead to"
            )

    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            gold = "  or  ".join(_shown(answer) for answer in row["answers"])
            write(f"=== step {row['step']}, group {group}: {_shown(str(row['uid']))}\n")
            write(f"{_indented(_shown(row['prompt']))}\n    gold: {gold}\n")
        write(f"\n--- {_headline(row)}\n")
        if decode is None:
            write(f"{_indented(_shown(row['completion']))}\n")
        else:
            same_group = [sibling for sibling in rows if sibling["group"] == group]
            write(f"{_shaded(row, same_group, options.shade, decode)}\n")

    write(f"\n{len(rows)} rollouts\n")


def _shown(text: str) -> str:
    return visible(text, max_text=sys.maxsize)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.split("\n"))


def _headline(row: Mapping[str, Any]) -> str:
    label = next(word for word, label in LABELS.items() if label == row["label"])
    figures = []
    for name in ("reward", "score", "weight"):
        if name not in row:
            continue
        # Not every rollout has a reward, and none has a score before it was trained on.
        figure = "-"
        if row[name] is not None:
            figure = f"{row[name]:.4g}"
        figures.append(f"{name} {figure}")
    headline = (
        f"sample {row['sample']}: {label}, {row['status']}; {', '.join(figures)}, "
        f"{len(row['token_ids'])} tokens"
    )

    if not row["finished"]:
        headline += ", cut at the limit"
    if row.get("reason"):
        headline += f"; {_shown(row['reason'])}"
    return headline


def _shaded(
    row: Mapping[str, Any],
    group: Sequence[Mapping[str, Any]],
    shade: str,
    decode: Callable[[Sequence[int]], list[str]],
) -> str:
    """Returns the answer, each token on a background as strong as its figure."""
    column = SHADES[shade]
    # A rollout that was not trained on has no figures: its tokens stay without a colour.
    figures = row.get(column) or [None] * len(row["token_ids"])

    full = _FULL.get(shade)
    if full is None:
        weights = (weight for sibling in group for weight in sibling.get(column) or ())
        sizes = (abs(weight) for weight in weights if weight is not None)
        full = max(sizes, default=0.0)

    parts = []
    for text, value in zip(decode(row["token_ids"]), figures, strict=True):
        shown = _shown(text)
        # One of five shades, and none for what is next to nothing.
        strength = 0
        if value is not None and full:
            strength = round(min(1.0, abs(value) / full) * 5)
        if strength:
            # The gradient of the loss lowers what it is positive of.
            is_raised = value > 0 and shade == "ratio"
            if shade == "weight":
                is_raised = value < 0
            shades = _DOWN
            if is_raised:
                shades = _UP
            # 97 is white text, 48;5;N background N of 256, and 0 ends both.
            shown = f"\x1b[97;48;5;{shades[strength - 1]}m{shown}\x1b[0m"
        parts.append(shown)

    return _indented("".join(parts))


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
    for part in wanted:
        first, _, last = part.partition("-")
        try:
            steps += range(int(first), int(last or first) + 1)
        except ValueError as error:
            raise ValueError(
                f"--steps {part!r} is no step; give numbers such as 12 or 20-29"
            ) from error

    for step in steps:
        if step not in saved:
            raise ValueError(
                f"{directory.path} has no rollouts of step {step}; it has {len(saved)} steps "
                f"between {saved[0]} and {saved[-1]}"
            )
    return steps
