"""Files of problems -> rows, whatever of the common schemas they use.

    DeepScaleR, DAPO    prompt = [{role, content}, ...], reward_model = {ground_truth},
                        data_source, extra_info
    simple              problem or question, and answer (or solution's ground_truth)

Reads JSONL, JSON, parquet and the arrow files of a HF dataset saved to disk. Of a folder with
several splits one is named.
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_QUESTION_COLUMNS = ("problem", "question", "prompt")
_ANSWER_COLUMNS = ("answer", "ground_truth", "final_answer")

# What datasets' map() keeps beside a saved dataset: rows of other stages, not of the dataset.
_CACHES = ("cache-", "tmp")
# train-00000-of-00003, or data-00000-of-00002 of a saved dataset.
_SHARD = re.compile(r"(.+?)[-_]\d+[-_]of[-_]\d+$")
# No letter may follow: the file testimony.parquet names no split.
_SPLIT_NAMES = re.compile(
    r"(train|training|test|testing|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE
)


class UnusableRow(ValueError):
    """A row that is skipped and counted.

    The message is the reason, the same for all rows of its kind.
    """


@dataclass(frozen=True)
class Row:
    """One problem."""

    uid: str
    """ "<file stem>/<row number>"."""
    messages: tuple[Mapping[str, Any], ...]
    """Chat messages, the last one the user's. A content is text, or a list of parts that all are
    text."""
    answers: tuple[str, ...]
    """[1..] accepted answers."""
    source: str = ""
    """data_source."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """extra_info, as JSON has it: times are text."""


def read_rows(path: str | Path, *, split: str = "") -> list[Row]:
    """Returns every usable row of a file or saved dataset.

    The others are skipped, counted by reason and logged.

    Args:
        path: file or folder.
        split: which split of a folder that has several.

    Raises:
        ValueError: there is nothing to read, a line is broken, a split is missing or not named, or
            no row is usable.
    """
    path = Path(path)
    rows: list[Row] = []
    skipped: Counter[str] = Counter()
    # Skipped rows count too: a uid has the number of its row in the file.
    for number, raw in enumerate(raw_rows(path, split=split)):
        try:
            rows.append(_row(f"{path.stem}/{number}", raw))
        except UnusableRow as reason:
            skipped[str(reason)] += 1

    reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
    if not rows:
        raise ValueError(
            f"none of the {skipped.total()} rows of {str(path)!r} has a question and an answer "
            f"({reasons or 'it is empty'}); check its columns"
        )
    if skipped:
        num_rows = skipped.total() + len(rows)
        logger.warning("%s: skipped %d of %d rows: %s", path, skipped.total(), num_rows, reasons)

    return rows


def raw_rows(path: Path, *, split: str = "") -> Iterator[Mapping[str, Any]]:
    """Streams every row of a file or saved dataset as it is.

    Raises:
        ValueError: there is nothing to read, a line is broken or no object, or a split is missing
            or not named.
    """
    if path.is_dir():
        files = _files_of_split(path, split)
    elif path.is_file():
        files = [path]
    else:
        raise ValueError(
            f"there is no data file {str(path)!r}; give a JSONL or parquet file, or a saved HF "
            "dataset"
        )

    for file in files:
        for number, row in _numbered_rows(file):
            if not isinstance(row, Mapping):
                raise ValueError(
                    f"{file}:{number} is no object but {json.dumps(row)[:40]}; one object per "
                    "line, of columns and values"
                )
            yield row


def _numbered_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the rows of a file with the number of their line or row, from 1.

    Blank lines are no rows.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        # In batches: as Python objects a large file would not fit in memory.
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    elif path.suffix == ".arrow":
        import pyarrow

        with pyarrow.memory_map(str(path)) as source:
            # A saved dataset has Arrow's form of a stream, and not that of a file.
            batches = pyarrow.ipc.open_stream(source)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    elif path.suffix == ".json" and _is_list(path):
        yield from enumerate(json.loads(path.read_text(encoding="utf-8")), 1)
    else:
        yield from _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields the objects of a JSONL file with the number of their line, from 1.

    Raises:
        ValueError: a line is no JSON, or no text; names it.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number} is no UTF-8 text ({error.reason})") from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}:{number} is no JSON ({error.msg}); one object per line"
                ) from error


def _is_list(path: Path) -> bool:
    """Tells a list of rows from one object per line, which some also call .json."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                return line.lstrip().startswith("[")
    return False


def _files_of_split(directory: Path, split: str) -> list[Path]:
    """Returns the data files of a folder: of its one split, or of the one that is named.

    Raises:
        ValueError: there is none, or there are several splits and none is named, or not the one
            that is.
    """
    every_file = [*sorted(directory.glob("**/*.arrow")), *sorted(directory.glob("**/*.parquet"))]
    files = [file for file in every_file if not file.name.startswith(_CACHES)]
    if not files:
        raise ValueError(
            f"{str(directory)!r} holds no .arrow or .parquet file; give a HF dataset saved to disk"
        )

    by_split: dict[str, list[Path]] = {}
    for file in files:
        by_split.setdefault(_split_of(file, directory), []).append(file)

    if split and split in by_split:
        return by_split[split]

    names = ", ".join(name or "(no name)" for name in by_split)
    if split:
        raise ValueError(f"{str(directory)!r} has no split {split!r}; it has {names}")
    if len(by_split) > 1:
        raise ValueError(
            f"{str(directory)!r} has several splits ({names}); name one, as data.train_split or "
            "data.heldout_split, or give its own folder or file"
        )
    return files


def _split_of(file: Path, directory: Path) -> str:
    """Returns the split that a file is of, by its name or its folder; "" where neither says."""
    shard = _SHARD.match(file.stem)
    stem = file.stem
    if shard:
        stem = shard[1]
        # The shards of a saved dataset are data-00000-of-00002, in a folder of the split's name.
        if stem != "data":
            return stem.rpartition("/")[2]

    split_name = _SPLIT_NAMES.match(stem)
    if split_name:
        return split_name[1]

    folders = file.relative_to(directory).parts[:-1]
    if not folders:
        return ""
    return folders[-1]


def _row(uid: str, raw: Mapping[str, Any]) -> Row:
    """Returns the row in the one schema.

    Raises:
        UnusableRow: it has no question or no answer, or they are no text.
    """
    question = next((raw[column] for column in _QUESTION_COLUMNS if raw.get(column)), None)
    if not question:
        raise UnusableRow("have no question")
    messages = _messages(question)

    # The nested column first: where a row has both, the other may be the whole solution.
    reward = as_object(raw.get("reward_model"))
    answers = _answers(reward.get("ground_truth"))
    if not answers:
        columns = [column for column in _ANSWER_COLUMNS if raw.get(column) is not None]
        if columns:
            answers = _answers(raw[columns[0]])
    if not answers:
        raise UnusableRow("have no answer")

    extra_info = as_object(raw.get("extra_info"))
    metadata = {str(name): _as_json(value) for name, value in extra_info.items()}

    row = Row(uid, messages, answers, str(raw.get("data_source") or ""), metadata)
    # Half a surrogate pair would only fail when the rollout is written, after its step.
    if not is_unicode(json.dumps([row.messages, row.answers], ensure_ascii=False)):
        raise UnusableRow("hold half a surrogate pair, which is no text")
    return row


def _messages(question: Any) -> tuple[Mapping[str, Any], ...]:
    """Returns a question, which is a text or a list of chat messages, as the latter.

    Raises:
        UnusableRow: a message has no role, or is no text.
    """
    if not isinstance(question, Sequence) or isinstance(question, str | bytes):
        question = [{"role": "user", "content": question}]

    messages: list[Mapping[str, Any]] = []
    for message in question:
        if not isinstance(message, Mapping) or "role" not in message:
            raise UnusableRow("have messages without a role")

        content = message.get("content")
        parts = content
        if isinstance(content, str):
            parts = [{"text": content}]
        if not isinstance(parts, Sequence) or isinstance(parts, bytes):
            raise UnusableRow("have a message that is no text")
        # A part that is an image or a sound cannot be asked about.
        for part in parts:
            if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
                raise UnusableRow("have a message that is no text")

        # Only these two: what else a publisher wrote into a message would reach the chat template.
        messages.append({"role": message["role"], "content": content})
    return tuple(messages)


def is_unicode(text: str) -> bool:
    """Returns whether a text can be written.

    JSON may hold half a surrogate pair, and no file can.
    """
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def as_object(value: Any) -> Mapping[str, Any]:
    """Returns an object that some files hold as JSON text; an empty one for everything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return {}
    if not isinstance(value, Mapping):
        return {}
    return value


def _as_json(value: Any) -> Any:
    """Returns the value for a verifier's process, which is asked in JSON."""
    if isinstance(value, Mapping):
        return {str(name): _as_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(entry) for entry in value]
    # A datetime is a date, too.
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def _answers(gold: Any) -> tuple[str, ...]:
    """Returns the accepted answers of a row as text.

    Gold answers come as text, numbers, or lists of them. A float that is a whole number is written
    as one. NaN, bytes and objects are no answers.
    """
    entries = [gold]
    if isinstance(gold, list | tuple):
        entries = list(gold)

    answers: list[str] = []
    for entry in entries:
        if isinstance(entry, float):
            # An empty cell of a column of floats is NaN.
            if not math.isfinite(entry):
                continue
            if entry.is_integer():
                entry = int(entry)
        if isinstance(entry, str | int | float):
            text = str(entry).strip()
            if text:
                answers.append(text)
    return tuple(answers)
