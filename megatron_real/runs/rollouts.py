"""Writes and reads rollouts on disk: a parquet file for each step.

It is exact enough to be trained on again; columns.py has its columns. Where several nodes write,
the file is a directory of their parts (parts.py), which the readers here hide.

A chunk is a part of a step that is not finished; it also says what it was drawn under
(rollout/origin.py).

Earlier versions wrote a JSON object a line, in files named .jsonl; those are still read. Loadable
without torch.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray

from megatron_real.records import Completion, Logprobs, Prompt, Rollout
from megatron_real.runs.columns import (
    Questions,
    header_of,
    num_row_groups,
    plain_rows,
    read_questions,
    read_row_group,
    read_table,
    rollout_of,
    rollouts_of,
    write_table,
)
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.parts import Part, part_files

if TYPE_CHECKING:
    from megatron_real.rollout.origin import Origin

_ORIGIN = "drawn_under"
_WHOLE = Part()


def write_rollouts(
    path: Path,
    rollouts: Sequence[Rollout],
    *,
    step: int,
    scores: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    minibatches: Sequence[int] | None = None,
    token_figures: Mapping[str, Sequence[NDArray[Any] | None]] | None = None,
    part: Part = _WHOLE,
) -> None:
    """Writes rollouts of a step.

    The file is replaced as a whole: readers see the old one or the new one.

    Args:
        path: the step's file.
        rollouts: those of the step, or of the part, in order.
        step: its number.
        scores, weights, minibatches: [rollouts] once they are known; null in the file until then.
        token_figures: [rollouts] arrays [n] of log_ratios and token_weights, where they are kept.
        part: of the step; nobody reads it before parts.name_parts has been called.

    Raises:
        ValueError: one of the sequences is not as long as `rollouts`.
    """
    figures = {"score": scores, "weight": weights, "minibatch": minibatches}
    for name, values in {**figures, **(token_figures or {})}.items():
        if values is not None and len(values) != len(rollouts):
            raise ValueError(
                f"{len(values)} values of {name} for {len(rollouts)} rollouts; give one for each"
            )
    with part.open(path) as file:
        write_table(
            file, rollouts, step=step, figures=figures, header={}, token_figures=token_figures
        )


def write_chunk(
    path: Path, rollouts: Sequence[Rollout], *, step: int, origin: Origin, part: Part = _WHOLE
) -> None:
    """Writes a chunk of an unfinished step, or one part of it, and what it was drawn under."""
    header = {_ORIGIN: json.dumps(origin.to_plain())}
    with part.open(path) as file:
        write_table(file, rollouts, step=step, figures={}, header=header)


def read_rollouts(path: Path) -> list[Rollout]:
    """Returns the rollouts of a step's file, which this or an earlier version wrote.

    Raises:
        ValueError: the file, which the message names, is missing or damaged.
    """
    _check_exists(path)
    files = part_files(path)
    rollouts = [rollout for file in files for rollout in _read(file)[1]]
    if not rollouts:
        raise _empty(path)
    # Each part is in order, but they are not in order one after the other.
    if len(files) > 1:
        rollouts.sort(key=lambda rollout: (rollout.group, rollout.sample))
    return rollouts


@dataclass(frozen=True)
class Portion:
    """Successive rollouts of a step's file, which can be read without the others."""

    file: Path
    """The file, or one of its parts."""
    row_group: int
    """Number of the row group."""

    def read(self) -> list[Rollout]:
        """Returns the rollouts.

        Raises:
            ValueError: the file, which the message names, is damaged.
        """
        with _naming(self.file):
            return rollouts_of(read_row_group(self.file, self.row_group))


def portions(path: Path) -> list[Portion]:
    """Returns what a step's file, which this version wrote, can be read in: all of it once.

    Raises:
        ValueError: the file, which the message names, is missing or damaged.
    """
    _check_exists(path)
    all_of_it = []
    for file in part_files(path):
        with _naming(file):
            all_of_it += [Portion(file, number) for number in range(num_row_groups(file))]
    return all_of_it


def read_prompts(path: Path) -> Questions:
    """Returns the prompts of a step's file, which this version wrote, and reads no completions.

    Raises:
        ValueError: the file, which the message names, is missing, empty or damaged.
    """
    _check_exists(path)
    prompts: dict[int, Prompt] = {}
    refills: dict[int, int] = {}
    for file in part_files(path):
        with _naming(file):
            part = read_questions(file)
        prompts |= part.prompts
        refills |= part.refills
    if not prompts:
        raise _empty(path)
    return Questions(prompts, refills)


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yields each rollout of a step's file as a JSON object.

    It has the rollout's score, weight and minibatch where they are known.

    Raises:
        ValueError: the file, which the message names, is damaged.
    """
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            yield _row_of(path, number, line)
        return
    # Each part is in order, so that a merge needs no more than one row of each.
    parts = [_rows_of_part(file) for file in part_files(path)]
    # The same order as that of a file that one node has written.
    yield from heapq.merge(*parts, key=lambda row: (row["group"], row["sample"]))


def _rows_of_part(file: Path) -> Iterator[dict[str, Any]]:
    with _naming(file):
        yield from plain_rows(read_table(file.read_bytes()))


def read_minibatches(path: Path) -> list[tuple[int, int | None]]:
    """Returns the group of each rollout of a step's file, and the update that trained on it.

    The update is its number within the step; None where there is none.

    Raises:
        ValueError: the file, which the message names, is damaged.
    """
    if path.suffix == ".jsonl":
        rows = list(read_rows(path))
    else:
        rows = []
        for file in part_files(path):
            with _naming(file):
                rows += read_table(file.read_bytes(), ["group", "minibatch"]).to_pylist()
    if not rows:
        raise _empty(path)
    return [(row["group"], row.get("minibatch")) for row in rows]


def read_chunk(path: Path) -> tuple[Origin | None, list[Rollout]]:
    """Reads a chunk, or one part of it.

    Returns:
        What it was drawn under, None where it does not say so; and its rollouts.

    Raises:
        ValueError: the file, which the message names, is damaged.
    """
    plain, rollouts = _read(path)
    if plain is None:
        return None, rollouts

    # Here, because it needs torch.
    from megatron_real.rollout.origin import Origin

    try:
        return Origin.from_plain(plain), rollouts
    except ValueError:
        # Another version of this program wrote it: that is as good as not said.
        return None, rollouts


def _read(path: Path) -> tuple[Mapping[str, Any] | None, list[Rollout]]:
    """Returns what a file was drawn under, None where it does not say so, and its rollouts."""
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        plain, rollouts = _read_lines(path, data)
    else:
        with _naming(path):
            table = read_table(data)
            header = header_of(table)
            plain = json.loads(header[_ORIGIN]) if _ORIGIN in header else None
            rollouts = rollouts_of(table)
    return plain, rollouts


def _empty(path: Path) -> ValueError:
    return ValueError(f"{path} is empty; it holds no rollout to train on")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Within it, a ValueError becomes one that says that this file is damaged."""
    try:
        yield
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is not a whole file of rollouts ({reason}); it may be cut"
        ) from error


def _check_exists(path: Path) -> None:
    if path.exists():
        return
    remedy = "rollout.replay takes the directory of an earlier run"
    # The path of a dump's or a run's file is RUN/rollouts/step-STEP.parquet.
    steps = RunDirectory(path.parent.parent).saved_steps()
    if steps:
        remedy = (
            f"that run saved steps {steps[0]} to {steps[-1]}, so set trainer.steps to at most "
            f"{steps[-1]}"
        )
    raise ValueError(f"there are no saved rollouts at {path}; {remedy}")


# Files of earlier versions: a JSON object a line. The first line of a chunk is what it was drawn
# under.


def _read_lines(path: Path, data: bytes) -> tuple[Mapping[str, Any] | None, list[Rollout]]:
    rows = [_row_of(path, number, line) for number, line in enumerate(data.splitlines(), 1)]
    plain = None
    # The number of the first line with a rollout, for messages.
    first = 1
    if rows and _ORIGIN in rows[0]:
        # No rollout has a key of this name.
        plain = rows.pop(0)[_ORIGIN]
        first = 2

    rollouts = []
    for number, row in enumerate(rows, first):
        try:
            rollouts.append(_rollout_of_line(row))
        except (ValueError, KeyError, TypeError) as error:
            raise _broken(path, number, error) from error

    return plain, rollouts


def _row_of(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        # surrogatepass: JSON of earlier versions could hold halves of surrogate pairs.
        row = json.loads(line.decode("utf-8", "surrogatepass"))
    # Broken JSON and broken UTF-8 both raise one.
    except ValueError as error:
        raise _broken(path, number, error) from error
    if not isinstance(row, dict):
        raise _broken(path, number, TypeError(f"{row!r} is not an object"))
    return row


def _broken(path: Path, number: int, error: Exception) -> ValueError:
    return ValueError(
        f"{path}:{number} is not a saved rollout ({type(error).__name__}: {error}); the file may "
        "be cut"
    )


def _rollout_of_line(row: Mapping[str, Any]) -> Rollout:
    completion = Completion(
        _ints(row["token_ids"]),
        # JSON has no NaN: earlier versions wrote null in its place.
        [_number(p) for p in row["logprobs"]],
        row["completion"],
        bool(row["finished"]),
    )

    reference: Logprobs | None = None
    if row.get("reference_logprobs") is not None:
        reference = numpy.array(
            [_number(p) for p in row["reference_logprobs"]], dtype=numpy.float64
        )
        narrow = reference.astype(numpy.float32)
        # Only a model that computes in float64 has values that float32 cannot hold.
        if numpy.array_equal(narrow, reference, equal_nan=True):
            reference = narrow
        if len(reference) != len(completion.token_ids):
            raise ValueError(
                f"{len(completion.token_ids)} token_ids but {len(reference)} reference_logprobs"
            )

    return rollout_of(row, _ints(row["prompt_token_ids"]), completion, reference)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _ints(values: Sequence[Any]) -> tuple[int, ...]:
    # type() and not isinstance(): True is an int, too.
    wrong = next((v for v in values if type(v) is not int), None)
    if wrong is not None:
        raise ValueError(f"token id {wrong!r} is not a whole number")
    return tuple(values)
