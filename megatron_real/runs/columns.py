"""Turns rollouts into the columns of a parquet file and back, and into plain rows.

Loadable without torch.

Values survive bit for bit. Not kept: the prompt's metadata and the seconds of its check, which
training does not need. Every page of a file has a checksum, so that damage is seen wherever it is.

A text that is not UTF-8, because a model emitted half a surrogate pair, stands in its column with a
replacement character, and exactly in `not_utf8`, a JSON object by column.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from megatron_real.records import (
    UNKNOWN_VERSION,
    Completion,
    Label,
    Logprobs,
    Prompt,
    Rollout,
    Status,
    Verdict,
)

FIGURES = {"score": pyarrow.float64(), "weight": pyarrow.float64(), "minibatch": pyarrow.int32()}
"""What training adds to each rollout; null until it is known."""
TOKEN_FIGURES = ("log_ratios", "token_weights")
"""What training adds to each response token where trainer.keep_token_weights asks for it.

They are log pi - log pi_old at the token's update, and dL / dlog pi. Other files do not have these
columns.
"""

_SCALARS = {
    "uid": pyarrow.string(),
    "group": pyarrow.int32(),
    "sample": pyarrow.int32(),
    "source": pyarrow.string(),
    "prompt": pyarrow.string(),
    "completion": pyarrow.string(),
    "answers": pyarrow.list_(pyarrow.string()),
    "status": pyarrow.string(),
    "label": pyarrow.int8(),
    "reason": pyarrow.string(),
    "reward": pyarrow.float64(),
    "finished": pyarrow.bool_(),
    "refills": pyarrow.int32(),
}
_ROWS_OF_A_GROUP = 512
"""Rollouts that are compressed together: a reader of a few needs no more memory than theirs."""

_OF_A_PROMPT = (
    "group",
    "uid",
    "source",
    "prompt",
    "prompt_token_ids",
    "answers",
    "refills",
    "not_utf8",
)
"""Columns whose values are the same for all samples of a prompt, but for `not_utf8`."""


@dataclass(frozen=True)
class Questions:
    """What all samples of a prompt have in common, by the number of their group."""

    prompts: Mapping[int, Prompt]
    """The prompt."""
    refills: Mapping[int, int]
    """How often the group was drawn anew."""


def write_table(
    file: BinaryIO,
    rollouts: Sequence[Rollout],
    *,
    step: int,
    figures: Mapping[str, Sequence[float] | None],
    header: Mapping[str, str],
    token_figures: Mapping[str, Sequence[NDArray[Any] | None]] | None = None,
) -> None:
    """Writes rollouts as one parquet file.

    Args:
        file: opened for writing.
        rollouts: of one step, in order.
        step: its number.
        figures: [rollouts] by a name of FIGURES, or None where they are not known.
        header: texts that the file says of itself.
        token_figures: [rollouts] arrays [n] by a name of TOKEN_FIGURES, where they are kept.
    """
    columns: dict[str, Any] = {
        "step": pyarrow.array(numpy.full(len(rollouts), step, dtype=numpy.int32))
    }
    # A column is there even where its values are not known yet, so that readers find it
    # in every file.
    for name, dtype in FIGURES.items():
        values = figures.get(name)
        if values is None:
            columns[name] = pyarrow.nulls(len(rollouts), dtype)
        else:
            columns[name] = pyarrow.array(list(values), type=dtype)
    columns |= _scalar_columns([_scalars(rollout) for rollout in rollouts])
    columns |= _token_columns(rollouts)
    for name, arrays in (token_figures or {}).items():
        columns[name] = _lists(arrays, numpy.float32)

    table = pyarrow.table(columns)
    table = table.replace_schema_metadata({**header})

    # Neighbouring floats share their first bytes: split by byte, they compress better.
    floats = [
        f"{field.name}.list.element"
        for field in table.schema
        if pyarrow.types.is_list(field.type) and pyarrow.types.is_floating(field.type.value_type)
    ]
    # What repeats itself is kept once: texts, statuses, token ids.
    repeated = [name for name in _SCALARS if name != "answers"]
    for name in ("token_ids", "prompt_token_ids", "weight_version"):
        repeated.append(f"{name}.list.element")
    pyarrow.parquet.write_table(
        table,
        file,
        row_group_size=_ROWS_OF_A_GROUP,
        compression="zstd",
        use_dictionary=repeated,
        use_byte_stream_split=floats,
        write_page_checksum=True,
    )


def read_table(data: bytes, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """Reads what `write_table` wrote.

    Args:
        data: the file's bytes.
        columns: the names of those to read; None: all.

    Raises:
        ValueError: the bytes are no whole parquet file, or are damaged.
    """
    names = None
    if columns is not None:
        names = list(columns)
    with _damage_is_value_error():
        return pyarrow.parquet.read_table(
            pyarrow.BufferReader(data),
            columns=names,
            page_checksum_verification=True,
            use_threads=False,
        )


def num_row_groups(path: Path) -> int:
    """Returns the number of a file's row groups, which can be read one by one.

    Raises:
        ValueError: the file is no whole parquet file.
    """
    with _damage_is_value_error():
        return int(pyarrow.parquet.ParquetFile(path).num_row_groups)


def read_row_group(path: Path, number: int) -> pyarrow.Table:
    """Reads one row group of a file; nothing else of it is read from the disk.

    Raises:
        ValueError: the file is no whole parquet file, or this part of it is damaged.
    """
    with _damage_is_value_error():
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        return file.read_row_group(number, use_threads=False)


def read_questions(path: Path) -> Questions:
    """Reads the prompts of a file and no completions.

    Raises:
        ValueError: the file is no whole parquet file, a column of prompts is damaged or missing.
    """
    with _damage_is_value_error():
        file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
        table = file.read(list(_OF_A_PROMPT), use_threads=False)
    _check_columns(table, _OF_A_PROMPT)

    # One row of each group says all that its samples have in common.
    _, first_rows = numpy.unique(table.column("group").to_numpy(), return_index=True)
    table = table.take(pyarrow.array(first_rows))
    token_ids = _rows_of(table, "prompt_token_ids")
    prompts = {}
    refills = {}
    for row, ids in zip(table.drop_columns("prompt_token_ids").to_pylist(), token_ids, strict=True):
        if row["not_utf8"]:
            row |= json.loads(row["not_utf8"])
        prompts[row["group"]] = _prompt_of(row, _present(ids).tolist())
        refills[row["group"]] = row["refills"]

    return Questions(prompts, refills)


@contextmanager
def _damage_is_value_error() -> Iterator[None]:
    try:
        yield
    # A wrong checksum is an OSError of pyarrow's.
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(str(error)) from error


def _check_columns(table: pyarrow.Table, names: Sequence[str]) -> None:
    for name in names:
        if name not in table.column_names:
            raise ValueError(f"it has no column {name!r}")


def header_of(table: pyarrow.Table) -> dict[str, str]:
    """Returns the texts that the file says of itself."""
    metadata = table.schema.metadata or {}
    return {name.decode(): value.decode() for name, value in metadata.items()}


def rollouts_of(table: pyarrow.Table) -> list[Rollout]:
    """Returns the rollouts of a table, in order. Their arrays are views of the table's memory.

    Raises:
        ValueError: a column is missing, or has a value that no rollout has.
    """
    of_tokens = ["prompt_token_ids", "token_ids", "logprobs"]
    of_tokens += ["trained", "weight_version", "reference_logprobs"]
    _check_columns(table, ["step", *_SCALARS, "not_utf8", *of_tokens])

    scalars = table.select([*_SCALARS, "not_utf8"]).to_pylist()
    prompts = _rows_of(table, "prompt_token_ids")
    tokens = _rows_of(table, "token_ids")
    logprobs = _rows_of(table, "logprobs")
    trained = _rows_of(table, "trained")
    versions = _rows_of(table, "weight_version")
    references = _rows_of(table, "reference_logprobs")

    rollouts = []
    for i, row in enumerate(scalars):
        if row["not_utf8"]:
            row |= json.loads(row["not_utf8"])
        completion = Completion(
            _present(tokens[i]),
            _present(logprobs[i]),
            row["completion"],
            row["finished"],
            _present(trained[i]),
            _present(versions[i]),
        )
        rollouts.append(rollout_of(row, _present(prompts[i]).tolist(), completion, references[i]))

    return rollouts


def rollout_of(
    row: Mapping[str, Any],
    prompt_token_ids: Sequence[int],
    completion: Completion,
    reference_logprobs: Logprobs | None,
) -> Rollout:
    """Returns a rollout, made of its arrays and the other values of its row, which are checked.

    Args:
        row: values of the columns that have one for each rollout.
        prompt_token_ids: tokens of its prompt.
        completion: what an engine wrote.
        reference_logprobs: of the completion's tokens, nats; None where there are none.

    Raises:
        ValueError: a label or a status that does not exist.
    """
    if row["label"] not in set(Label):
        raise ValueError(f"label {row['label']!r} is not 1, 0 or -1")
    if row["status"] not in set(Status):
        raise ValueError(f"status {row['status']!r} is not one of {', '.join(Status)}")

    prompt = _prompt_of(row, prompt_token_ids)
    verdict = Verdict(
        Status(row["status"]), Label(row["label"]), row["reward"], reason=row.get("reason", "")
    )
    return Rollout(
        prompt,
        row["group"],
        row["sample"],
        completion,
        verdict,
        row.get("refills", 0),
        reference_logprobs,
    )


def _prompt_of(row: Mapping[str, Any], token_ids: Sequence[int]) -> Prompt:
    return Prompt(
        row["uid"], row["prompt"], tuple(token_ids), tuple(row["answers"]), source=row["source"]
    )


def plain_rows(table: pyarrow.Table) -> Iterator[dict[str, Any]]:
    """Yields each rollout as values that JSON can hold: what is not a finite number is None."""
    figures = table.select(["step", *FIGURES]).to_pylist()
    of_tokens = {
        name: _rows_of(table, name) for name in TOKEN_FIGURES if name in table.column_names
    }

    for i, (rollout, known) in enumerate(zip(rollouts_of(table), figures, strict=True)):
        row = known | _scalars(rollout)

        # Of tokens, what says the same of each one is one value; what says nothing is left out.
        completion = rollout.completion
        row["prompt_token_ids"] = list(rollout.prompt.token_ids)
        row["token_ids"] = completion.token_ids.tolist()
        row["logprobs"] = [_finite(p) for p in completion.logprobs.tolist()]
        if not completion.trained.all():
            row["trained"] = completion.trained.astype(int).tolist()

        versions = numpy.unique(completion.weight_version).tolist()
        if len(versions) == 1 and versions != [UNKNOWN_VERSION]:
            row["weight_version"] = versions[0]
        elif len(versions) > 1:
            row["weight_version"] = completion.weight_version.tolist()

        if rollout.reference_logprobs is not None:
            row["reference_logprobs"] = [_finite(p) for p in rollout.reference_logprobs.tolist()]
        for name, arrays in of_tokens.items():
            array = arrays[i]
            if array is not None:
                row[name] = [_finite(value) for value in array.tolist()]
        yield {name: _finite(value) for name, value in row.items()}


def _scalars(rollout: Rollout) -> dict[str, Any]:
    prompt = rollout.prompt
    completion = rollout.completion
    verdict = rollout.verdict
    return {
        "uid": prompt.uid,
        "group": rollout.group,
        "sample": rollout.sample,
        "source": prompt.source,
        "prompt": prompt.text,
        "completion": completion.text,
        "answers": list(prompt.answers),
        "status": verdict.status.value,
        "label": int(verdict.label),
        "reason": verdict.reason,
        "reward": verdict.reward,
        "finished": completion.finished,
        "refills": rollout.refills,
    }


def _scalar_columns(rows: Sequence[dict[str, Any]]) -> dict[str, pyarrow.Array]:
    """Returns the columns with one value for each rollout, and `not_utf8`."""
    exact: list[str | None] = []
    readable = []
    for row in rows:
        changed = {name: _utf8(value) for name, value in row.items()}
        odd = {}
        for name, value in row.items():
            # A NaN is not equal to itself, and no text.
            if changed[name] != value and not isinstance(value, float):
                odd[name] = value

        # As JSON, which escapes what UTF-8 cannot hold.
        written = None
        if odd:
            written = json.dumps(odd)
        exact.append(written)
        readable.append(changed)

    columns = {
        name: pyarrow.array([row[name] for row in readable], type=dtype)
        for name, dtype in _SCALARS.items()
    }
    return {**columns, "not_utf8": pyarrow.array(exact, type=pyarrow.string())}


def _utf8(value: Any) -> Any:
    """Returns the value with whatever UTF-8 cannot express replaced."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, list):
        return [_utf8(item) for item in value]
    return value


def _token_columns(rollouts: Sequence[Rollout]) -> dict[str, pyarrow.Array]:
    """Returns the columns with a value for each token."""
    completions = [rollout.completion for rollout in rollouts]
    references = [rollout.reference_logprobs for rollout in rollouts]

    # float64 for the exactness tests' policies; a column has one dtype.
    reference_dtype: type[numpy.generic] = numpy.float32
    for logprobs in references:
        if logprobs is not None and logprobs.dtype == numpy.float64:
            reference_dtype = numpy.float64

    prompts = [numpy.array(r.prompt.token_ids, dtype=numpy.int32) for r in rollouts]
    return {
        "prompt_token_ids": _lists(prompts, numpy.int32),
        "token_ids": _lists([c.token_ids for c in completions], numpy.int32),
        "logprobs": _lists([c.logprobs for c in completions], numpy.float32),
        "trained": _lists([c.trained for c in completions], numpy.bool_),
        "weight_version": _lists([c.weight_version for c in completions], numpy.int32),
        "reference_logprobs": _lists(references, reference_dtype),
    }


def _lists(arrays: Sequence[NDArray[Any] | None], dtype: type[numpy.generic]) -> pyarrow.ListArray:
    """Returns a column whose rows are these arrays; null where there is none."""
    lengths = [0 if array is None else len(array) for array in arrays]
    offsets = numpy.zeros(len(arrays) + 1, dtype=numpy.int32)
    numpy.cumsum(lengths, out=offsets[1:])

    present = [array.astype(dtype, copy=False) for array in arrays if array is not None]
    # numpy.concatenate refuses an empty list.
    values = numpy.zeros(0, dtype=dtype)
    if present:
        values = numpy.concatenate(present)
    # An empty list and no list are two things: an empty response has the former.
    absent = pyarrow.array([array is None for array in arrays], type=pyarrow.bool_())
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values), mask=absent)


def _rows_of(table: pyarrow.Table, name: str) -> list[NDArray[Any] | None]:
    """Returns [rows] the arrays of a column of lists, without a copy but for masks."""
    rows: list[NDArray[Any] | None] = []
    for part in table.column(name).chunks:
        # `offsets` point into `values`, which knows of no slices and nulls; flatten()
        # leaves those out.
        offsets = part.offsets.to_numpy()
        values = part.values.to_numpy(zero_copy_only=False)
        # The table's memory belongs to all of its rollouts.
        values.setflags(write=False)
        valid = part.is_valid().to_numpy(zero_copy_only=False)
        for i in range(len(part)):
            rows.append(values[offsets[i] : offsets[i + 1]] if valid[i] else None)

    return rows


def _present(array: NDArray[Any] | None) -> NDArray[Any]:
    if array is None:
        raise ValueError("a rollout has no tokens")
    return array


def _finite(value: Any) -> Any:
    # JSON has no NaN and no infinity.
    return None if isinstance(value, float) and not math.isfinite(value) else value
