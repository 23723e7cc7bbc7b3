"""What examples/smollm2.sh needs beside the project: its problems, a lenient verifier,
and answers side by side.

    python examples/smollm2_sums.py problems --out runs/smollm2/data
    python examples/smollm2_sums.py compare --before runs/smollm2/before \\
        --after runs/smollm2/run/after

The task is the sum of two two-digit numbers. One worked example in the chat shows the form of an
answer, `13 + 24 = 37`, and the strict verifier of training (labels.verifier=exact) wants that form
letter by letter. `lenient` only wants the right number at the end of whatever was said, so that
learning the form is told apart from learning the sums:
labels.verifier=examples/smollm2_sums.py:lenient.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HELD_OUT = 400
SHOWN = 10
TRUSTED = True  # labels.verifier: `lenient` reads text and runs none of it (docs/sandbox.md)

Pair = tuple[int, int]


def lenient(text: str, answers: Sequence[str], _metadata: Mapping[str, Any]) -> bool:
    """The last number in the text is the last one of a gold answer."""
    number = _last_number(text)
    return number is not None and number in {_last_number(answer) for answer in answers}


def _last_number(text: str) -> str | None:
    # 12.5 is one number; a full stop after 125 is no part of it.
    numbers = re.findall(r"[0-9]+(?:[.,][0-9]+)*", text)
    if not numbers:
        return None
    return str(numbers[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Makes the example's problems, and compares evaluations of them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    problems = commands.add_parser("problems", help="writes train.jsonl and heldout.jsonl")
    problems.add_argument("--out", type=Path, required=True, help="directory to write")
    compare = commands.add_parser("compare", help="prints figures and answers side by side")
    compare.add_argument(
        "--before", type=Path, required=True, help="directory with evaluations strict/ and lenient/"
    )
    compare.add_argument("--after", type=Path, required=True, help="the same, of the trained model")
    options = parser.parse_args()
    if options.command == "problems":
        write_problems(options.out)
    else:
        print(side_by_side(options.before, options.after))


def write_problems(out: Path) -> None:
    """All sums of two two-digit numbers.

    A held-out pair's mirror, 67 + 58 of 58 + 67, is in neither file.
    """
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(0).shuffle(pairs)
    heldout = list({frozenset(pair): pair for pair in pairs}.values())[:HELD_OUT]
    kept_apart = {frozenset(pair) for pair in heldout}

    out.mkdir(parents=True, exist_ok=True)
    _write(out / "heldout.jsonl", heldout)
    _write(out / "train.jsonl", [pair for pair in pairs if frozenset(pair) not in kept_apart])


def _write(path: Path, pairs: Sequence[Pair]) -> None:
    rows = [
        {"prompt": chat(pair), "answer": answer(pair), "data_source": "two_digit_sums"}
        for pair in pairs
    ]
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    partial.replace(path)


def chat(pair: Pair) -> list[dict[str, str]]:
    """The question after one worked example.

    The system message is there because the model's own one is longer.
    """
    return [
        {"role": "system", "content": "You calculate."},
        {"role": "user", "content": "13 + 24"},
        {"role": "assistant", "content": "13 + 24 = 37"},
        {"role": "user", "content": f"{pair[0]} + {pair[1]}"},
    ]


def answer(pair: Pair) -> str:
    return f"{pair[0]} + {pair[1]} = {sum(pair)}"


def side_by_side(before: Path, after: Path) -> str:
    """pass@1 under both verifiers, then the first answer to each of a few held-out problems."""
    lines = [f"{'held-out pass@1':18s}{'before':24s}after"]
    for verifier in ("strict", "lenient"):
        lines.append(
            f"{verifier:18s}{_pass_at_1(before / verifier):24s}{_pass_at_1(after / verifier)}"
        )

    lines += ["", f"{'answers':18s}{'before':24s}after"]
    answers = zip(_first_answers(before / "strict"), _first_answers(after / "strict"), strict=True)
    for (sum_, first), (_, second) in answers:
        lines.append(f"{sum_:18s}{first:24.22s}{second:.22s}")
    return "\n".join(lines)


def _pass_at_1(evaluation: Path) -> str:
    results = json.loads((evaluation / "results.json").read_text(encoding="utf-8"))
    figures = results["benchmarks"]["heldout"]
    return f"{figures['pass_at_1']:.3f} +- {figures['standard_error']:.3f}"


def _first_answers(evaluation: Path) -> list[tuple[str, str]]:
    """Returns (right answer, the model's answer on one line) for each of the first problems."""
    file = evaluation / "samples/heldout/chunk-0000.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["sample"] == 0][:SHOWN]
    return [(row["golds"][0], " ".join(row["completion"].split())) for row in rows]


if __name__ == "__main__":
    main()
