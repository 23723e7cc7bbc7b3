"""Files of problems -> rows, whatever of the common schemas they use.

    DeepScaleR, DAPO    prompt = [{role, content}, ...], reward_model = {ground_truth}, data_source, extra_info
    simple              problem or question, and answer (or solution's ground_truth)

Reads JSONL, JSON, parquet and the arrow files of a HF dataset saved to disk.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_QUESTION_COLUMNS = ("problem", "question", "prompt")
_ANSWER_COLUMNS = ("answer", "ground_truth", "final_answer")


@dataclass(frozen=True)
class Row:
    """One problem."""

    uid: str
    """ "<file stem>/<row number>"."""
    messages: tuple[Mapping[str, str], ...]
    """Chat messages, the last one the user's."""
    answers: tuple[str, ...]
    """[1..] accepted answers."""
    source: str = ""
    """data_source."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """extra_info."""


def read_rows(path: str | Path) -> list[Row]:
    """Every usable row of a file or saved dataset; rows without question or answer are skipped, counted and logged.

    Raises:
        ValueError: there is nothing to read, a line is broken, or no row is usable.
    """
    path = Path(path)
    rows, skipped = [], 0
    for number, raw in enumerate(raw_rows(path)):
        row = _row(f"{path.stem}/{number}", raw)
        if row is None:
            skipped += 1
        else:
            rows.append(row)
    if not rows:
        raise ValueError(f"none of the {skipped} rows of {str(path)!r} has a question and an answer; check its columns")
    if skipped:
        logger.warning(
            "%s: skipped %d of %d rows that have no question or no answer", path, skipped, skipped + len(rows)
        )
    return rows


def raw_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Every row of a file or saved dataset as it is, streamed.

    Raises:
        ValueError: there is nothing to read, or a line is broken.
    """
    if path.is_dir():
        yield from _arrow_rows(path)
    elif not path.is_file():
        raise ValueError(f"there is no data file {str(path)!r}; give a JSONL or parquet file, or a saved HF dataset")
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    elif path.suffix == ".json" and _first_character(path) == "[":
        yield from json.loads(path.read_text(encoding="utf-8"))
    else:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number} is no JSON ({error.msg}); one object per line") from error


def _first_character(path: Path) -> str:
    """Tells a list of rows from one object per line, which some also call .json."""
    with path.open(encoding="utf-8") as text:
        return next((line.lstrip()[0] for line in text if line.strip()), "")


def _arrow_rows(directory: Path) -> Iterator[Mapping[str, Any]]:
    import pyarrow

    files = sorted(directory.glob("**/*.arrow")) + sorted(directory.glob("**/*.parquet"))
    if not files:
        raise ValueError(f"{str(directory)!r} holds no .arrow or .parquet file; give a HF dataset saved to disk")
    for file in files:
        if file.suffix == ".parquet":
            yield from raw_rows(file)
        else:
            with pyarrow.memory_map(str(file)) as source:
                yield from pyarrow.ipc.open_stream(source).read_all().to_pylist()


def _row(uid: str, raw: Mapping[str, Any]) -> Row | None:
    question = next((raw[c] for c in _QUESTION_COLUMNS if raw.get(c)), None)
    messages = question if isinstance(question, list) else [{"role": "user", "content": question}] if question else []
    answers = _answers((raw.get("reward_model") or {}).get("ground_truth"))
    answers = answers or _answers(next((raw[c] for c in _ANSWER_COLUMNS if raw.get(c) is not None), None))
    if not messages or not answers:
        return None
    return Row(uid, tuple(messages), answers, str(raw.get("data_source") or ""), raw.get("extra_info") or {})


def _answers(gold: Any) -> tuple[str, ...]:
    """Gold answers come as text, numbers, or lists of them; a float that is a whole number is written as one."""
    listed = gold if isinstance(gold, (list, tuple)) else [gold]
    whole = [int(g) if isinstance(g, float) and g.is_integer() else g for g in listed if g is not None]
    return tuple(text for text in (str(g).strip() for g in whole) if text)
