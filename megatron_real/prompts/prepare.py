"""Published files -> prepared files of one schema, clear of duplicates and of the benchmarks'
questions.

read        each source's rows, from disk or the hub; unusable rows are dropped and counted by reason
unique      of equal questions of a training set one stays, and none where their answers disagree
leaks       training questions that are a benchmark's, or near one, are dropped (or kept, when asked to)
write       NAME.jsonl for each source, leaks.jsonl, and report.json with every count
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_real.disk import write_whole
from megatron_real.labels.golds import why_unmatchable
from megatron_real.labels.normal_form import read
from megatron_real.prompts.overlap import Index, Match, identity
from megatron_real.prompts.rows import raw_rows
from megatron_real.prompts.sources import BY_NAME, SOURCES, Source, Unusable, prepared

_PATTERNS = ("*.parquet", "*.jsonl", "*.json")
_ROWS_A_LINE = 250_000


@dataclass
class Counts:
    """What became of one source's rows: read = kept + the sum of dropped."""

    published: int
    """Questions that the publisher, or the paper, counts."""
    read: int = 0
    """Rows read."""
    kept: int = 0
    """Rows written."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows dropped, by reason."""
    unmatchable: int = 0
    """Rows kept whose gold answer no completion is likely to match: prose and the like."""
    repeated: int = 0
    """Questions of a benchmark that it asks more than once; they stay."""


@dataclass(frozen=True)
class Leak:
    """A training question that a benchmark asks."""

    train: str
    """ "<source>/<row of the published file>"."""
    benchmark: str
    """The same, of the benchmark."""
    share: float
    """1.0: the same question; less: near it (overlap.py)."""
    train_question: str
    """For a person to judge."""
    benchmark_question: str
    """For a person to judge."""


@dataclass(frozen=True)
class Prepared:
    """What was written."""

    counts: dict[str, Counts]
    """By source."""
    leaks: list[Leak]
    """Training rows that a benchmark asks."""
    unchecked: tuple[str, ...]
    """Benchmarks that were not among the sources, so that nothing was compared with them."""


def prepare(
    sources: Mapping[str, str],
    out: Path,
    *,
    keep_leaks: bool = False,
    gram_size: int = 8,
    gram_share: float = 0.6,
    say: Callable[[str], None] = lambda line: None,
) -> Prepared:
    """Prepares the named sources. Files appear as a whole, when everything is known.

    Args:
        sources: name of the table -> file, folder or hub dataset; "" for the table's own hub
            dataset.
        keep_leaks: report them only.
        gram_size, gram_share: of near duplicates, see overlap.py.
        say: takes a line of progress.

    Raises:
        ValueError: a name is unknown, or a source cannot be read or has no usable row; one
            sentence.
    """
    unknown = [name for name in sources if name not in BY_NAME]
    if unknown:
        raise ValueError(f"there is no source {unknown[0]!r}; known are {', '.join(BY_NAME)}")
    counts = {name: Counts(published=BY_NAME[name].rows) for name in sources}
    rows: dict[str, list[dict[str, Any]]] = {}
    for name, where in sources.items():
        say(f"{name}: reading {where or BY_NAME[name].hub}")
        rows[name] = _read(BY_NAME[name], where, counts[name], say)
    benchmarks = {
        _uid(row): _asked(row)
        for name in sources
        if BY_NAME[name].split == "test"
        for row in rows[name]
    }
    index = Index(benchmarks, size=gram_size, share=gram_share)
    leaks: list[Leak] = []
    for name in sources:
        if BY_NAME[name].split == "train":
            say(
                f"{name}: comparing {len(rows[name])} questions with {len(benchmarks)} of the benchmarks"
            )
            found = {_uid(row): (row, index.closest(_asked(row))) for row in rows[name]}
            leaking = {
                uid: (row, match) for uid, (row, match) in found.items() if match is not None
            }
            leaks += [_leak(uid, row, match, benchmarks) for uid, (row, match) in leaking.items()]
            if not keep_leaks:
                rows[name] = [row for uid, (row, _) in found.items() if uid not in leaking]
                counts[name].dropped.update(_reason(match) for _, match in leaking.values())
        counts[name].kept = len(rows[name])
        counts[name].unmatchable = sum(_is_unmatchable(row) for row in rows[name])
    unchecked = tuple(s.name for s in SOURCES if s.split == "test" and s.name not in sources)
    done = Prepared(counts, leaks, unchecked)
    _write_all(
        out, rows, done, sources=sources, keep_leaks=keep_leaks, grams=(gram_size, gram_share)
    )
    return done


def _read(
    source: Source, where: str, counts: Counts, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The usable rows; of equal training questions one, or none where their answers disagree."""
    first: dict[tuple[str, ...], dict[str, Any]] = {}
    copies: Counter[tuple[str, ...]] = Counter()
    disagree: set[tuple[str, ...]] = set()
    every: list[dict[str, Any]] = []
    for raw in _published_rows(source, where):
        counts.read += 1
        if counts.read % _ROWS_A_LINE == 0:
            say(f"{source.name}: {counts.read:,} rows, {len(first):,} questions")
        try:
            row = prepared(source, raw, counts.read - 1)
        except Unusable as reason:
            counts.dropped[str(reason)] += 1
            continue
        key = identity(_asked(row))
        copies[key] += 1
        kept = first.setdefault(key, row)
        if _gold(kept) != _gold(row):
            disagree.add(key)
        if source.split == "test":
            every.append(row)
    if not first:
        reasons = (
            ", ".join(f"{n} {reason}" for reason, n in counts.dropped.items()) or "it is empty"
        )
        raise ValueError(
            f"{where or source.hub} has no usable row for {source.name} ({reasons}); check its columns"
        )
    if source.split == "test":
        counts.repeated = len(every) - len(first)
        return every
    counts.dropped["answers of equal questions disagree"] += sum(copies[key] for key in disagree)
    counts.dropped["duplicate"] += sum(copies[key] - 1 for key in copies if key not in disagree)
    counts.dropped += Counter()  # forgets the reasons that did not occur
    return [row for key, row in first.items() if key not in disagree]


def _published_rows(source: Source, where: str) -> Iterator[Mapping[str, Any]]:
    on_hub = not where or (where.count("/") == 1 and not Path(where).exists())
    for path in _files(_download(source, where or source.hub) if on_hub else Path(where)):
        yield from raw_rows(path)


def _files(path: Path) -> list[Path]:
    """A file or a saved dataset as it is; of another folder the data files of one kind."""
    if not path.is_dir() or any(path.glob("**/*.arrow")):
        return [path]
    found = [sorted(path.glob(f"**/{pattern}")) for pattern in _PATTERNS]
    return next((files for files in found if files), [path])


def _download(source: Source, hub: str) -> Path:
    """The files of a hub dataset, in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    patterns = source.files if hub == source.hub else _PATTERNS
    try:
        return Path(snapshot_download(hub, repo_type="dataset", allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"cannot get the dataset {hub} from the hub ({type(error).__name__}); where there is no network, copy its "
            f"files here and give {source.name}=FILE"
        ) from error


def _asked(row: Mapping[str, Any]) -> str:
    return str(row["prompt"][-1]["content"])


def _gold(row: Mapping[str, Any]) -> str:
    """The answers in their normal form, to see whether two rows agree: 1/2 and 0.5 do."""
    golds = row["reward_model"]["ground_truth"]
    return repr([read(gold) for gold in (golds if isinstance(golds, list) else [golds])])


def _is_unmatchable(row: Mapping[str, Any]) -> bool:
    golds = row["reward_model"]["ground_truth"]
    return all(why_unmatchable(gold) for gold in (golds if isinstance(golds, list) else [golds]))


def _uid(row: Mapping[str, Any]) -> str:
    return f"{row['data_source']}/{row['extra_info']['index']}"


def _reason(match: Match) -> str:
    return "asked by a benchmark" if match.share == 1 else "near a benchmark's question"


def _leak(uid: str, row: Mapping[str, Any], match: Match, benchmarks: Mapping[str, str]) -> Leak:
    return Leak(uid, match.name, round(match.share, 4), _asked(row), benchmarks[match.name])


def _write_all(
    out: Path,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    done: Prepared,
    *,
    sources: Mapping[str, str],
    keep_leaks: bool,
    grams: tuple[int, float],
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, kept in rows.items():
        _write(out / f"{name}.jsonl", kept)
    _write(out / "leaks.jsonl", [asdict(leak) for leak in done.leaks])
    report = {
        "sources": {
            n: {"from": w or BY_NAME[n].hub, **vars(done.counts[n])} for n, w in sources.items()
        },
        "leaks": {
            "found": len(done.leaks),
            "kept": keep_leaks,
            "gram_size": grams[0],
            "gram_share": grams[1],
        },
        "benchmarks_not_compared": list(done.unchecked),
    }
    write_whole(out / "report.json", json.dumps(report, indent=2) + "\n")


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
