"""Published files -> prepared files of one schema, without duplicates and benchmarks' questions.

read        each source's rows, from disk or the hub; unusable ones are dropped, counted by reason
unique      of equal questions of a training set one stays, and none where their answers disagree
leaks       training questions that are a benchmark's, or near one, are dropped (or kept, if asked)
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
from megatron_real.labels.pool import Check, VerifierPool
from megatron_real.prompts.overlap import Index, identity
from megatron_real.prompts.rows import raw_rows
from megatron_real.prompts.sources import BY_NAME, SOURCES, PublishedDataset, Unusable, prepared

# In this order: of a folder with files of several kinds, those of the first kind are read.
_PATTERNS = ("*.parquet", "*.jsonl", "*.json")
# Rows between two lines of progress.
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
        out: folder of the prepared files.
        keep_leaks: report them only.
        gram_size: tokens of an n-gram, by which near duplicates are found (overlap.py).
        gram_share: share of the n-grams from which two questions are near.
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

    # All benchmarks are known before any training set is compared, whatever the order of sources.
    benchmarks: dict[str, str] = {}
    for name in sources:
        if BY_NAME[name].split == "test":
            benchmarks.update({_uid(row): _question(row) for row in rows[name]})
    index = Index(benchmarks, size=gram_size, share=gram_share)

    leaks: list[Leak] = []
    for name in sources:
        if BY_NAME[name].split != "train":
            continue
        say(
            f"{name}: comparing {len(rows[name])} questions with {len(benchmarks)} of the "
            "benchmarks"
        )
        clear: list[dict[str, Any]] = []

        for row in rows[name]:
            match = index.closest(_question(row))
            if match is None:
                clear.append(row)
                continue
            share = round(match.share, 4)
            asked = benchmarks[match.name]
            leaks.append(Leak(_uid(row), match.name, share, _question(row), asked))
            if keep_leaks:
                clear.append(row)
            elif match.share == 1:
                counts[name].dropped["asked by a benchmark"] += 1
            else:
                counts[name].dropped["near a benchmark's question"] += 1
        rows[name] = clear

    for name in sources:
        counts[name].kept = len(rows[name])
        for row in rows[name]:
            counts[name].unmatchable += all(map(why_unmatchable, _golds(row)))

    unchecked = tuple(s.name for s in SOURCES if s.split == "test" and s.name not in sources)
    result = Prepared(counts, leaks, unchecked)

    # Nothing is written before everything is known: a bad source leaves older files as they are.
    out.mkdir(parents=True, exist_ok=True)
    for name, kept in rows.items():
        _write_lines(out / f"{name}.jsonl", kept)
    _write_lines(out / "leaks.jsonl", [asdict(leak) for leak in leaks])

    report = {
        "sources": {
            name: {"from": where or BY_NAME[name].hub, **vars(counts[name])}
            for name, where in sources.items()
        },
        "leaks": {
            "found": len(leaks),
            "kept": keep_leaks,
            "gram_size": gram_size,
            "gram_share": gram_share,
        },
        "benchmarks_not_compared": list(unchecked),
    }
    write_whole(out / "report.json", json.dumps(report, indent=2) + "\n")
    return result


def _read(
    source: PublishedDataset, where: str, counts: Counts, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Reads the usable rows of a source, and counts the others.

    Of equal training questions it returns one, or none where their answers disagree.

    Raises:
        ValueError: the source cannot be read, or has no usable row.
    """
    first_row: dict[tuple[str, ...], dict[str, Any]] = {}
    num_copies: Counter[tuple[str, ...]] = Counter()
    other_golds: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    benchmark_rows: list[dict[str, Any]] = []

    for raw in _published_rows(source, where):
        counts.read += 1
        if counts.read % _ROWS_A_LINE == 0:
            say(f"{source.name}: {counts.read:,} rows, {len(first_row):,} questions")
        try:
            row = prepared(source, raw, counts.read - 1)
        except Unusable as reason:
            # By its words, which are the same for all rows of a kind.
            counts.dropped[str(reason)] += 1
            continue

        key = identity(_question(row))
        num_copies[key] += 1
        # Of equal questions the first stays; those after it are compared with it.
        first = first_row.setdefault(key, row)
        # By their normal forms: \dfrac12 and \frac{1}{2} agree. What differs there is compared at
        # the end, by algebra.
        if repr(list(map(read, _golds(first)))) != repr(list(map(read, _golds(row)))):
            other_golds.setdefault(key, set()).add(tuple(_golds(row)))
        if source.split == "test":
            benchmark_rows.append(row)

    if not first_row:
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.dropped.items())
        raise ValueError(
            f"{where or source.hub} has no usable row for {source.name} "
            f"({reasons or 'it is empty'}); check its columns"
        )

    if source.split == "test":
        # A benchmark is what its publisher says it is, repetitions included.
        counts.repeated = len(benchmark_rows) - len(first_row)
        return benchmark_rows

    # Sorted, since a set has another order in each process.
    pairs = [
        (key, tuple(_golds(first_row[key])), others)
        for key, golds in other_golds.items()
        for others in sorted(golds)
    ]
    agree = _agree([(golds, others) for _, golds, others in pairs])
    # One pair of answers that disagree takes the question out.
    disagreeing = {key for (key, _, _), is_same in zip(pairs, agree, strict=True) if not is_same}

    num_disagreeing = sum(num_copies[key] for key in disagreeing)
    if num_disagreeing:
        counts.dropped["answers of equal questions disagree"] += num_disagreeing
    num_duplicates = sum(n - 1 for key, n in num_copies.items() if key not in disagreeing)
    if num_duplicates:
        counts.dropped["duplicate"] += num_duplicates

    return [row for key, row in first_row.items() if key not in disagreeing]


def _agree(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[bool]:
    """Returns of each pair of gold answers whether the verifier of a run takes one for the other.

    Each accepted answer of one side must be right by those of the other: 1/2 and 0.5 agree, 3 and
    [3, 4] agree. Verifiers have processes of their own, with limits of time and memory: algebra
    on a published answer may take for ever. What they cannot compare disagrees.
    """
    if not pairs:
        return []

    # Both ways: 3 is right by [3, 4], and 4 is not right by [3].
    checks = []
    owners = []
    for i, pair in enumerate(pairs):
        for side, (answers, golds) in enumerate((pair, pair[::-1])):
            for answer in answers:
                checks.append(Check(f"\\boxed{{{answer}}}", tuple(golds)))
                owners.append((i, side))
    with VerifierPool("math_verify", workers=1, timeout_seconds=10, memory_mib=1024) as pool:
        statuses = [outcome.status for outcome in pool.run(checks)]

    wrong = {owner for owner, status in zip(owners, statuses, strict=True) if status != "ok"}
    # Either direction is enough.
    return [(i, 0) not in wrong or (i, 1) not in wrong for i in range(len(pairs))]


def _published_rows(source: PublishedDataset, where: str) -> Iterator[Mapping[str, Any]]:
    """Streams the rows of a file, a folder or a hub dataset as they are published.

    Raises:
        ValueError: the hub cannot be reached, or there is nothing to read.
    """
    # A word with one slash is a hub's dataset, unless there is such a path.
    is_on_hub = not where or (where.count("/") == 1 and not Path(where).exists())
    path = Path(where)
    if is_on_hub:
        path = _download(source, where or source.hub)

    # A file or a saved dataset as it is; of another folder the data files of one kind.
    files = [path]
    if path.is_dir() and not any(path.glob("**/*.arrow")):
        for pattern in _PATTERNS:
            matching = sorted(path.glob(f"**/{pattern}"))
            if matching:
                files = matching
                break

    for file in files:
        yield from raw_rows(file)


def _download(source: PublishedDataset, hub: str) -> Path:
    """Returns the folder of a hub dataset in the hub's own cache, downloaded where it is not there.

    Raises:
        ValueError: it cannot be had.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # Of a dataset that the table knows only the files it names: it may hold other splits too.
    patterns: tuple[str, ...] = _PATTERNS
    if hub == source.hub:
        patterns = source.files

    try:
        return Path(snapshot_download(hub, repo_type="dataset", allow_patterns=list(patterns)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(
            f"cannot get the dataset {hub} from the hub ({type(error).__name__}); where there is "
            f"no network, copy its files here and give {source.name}=FILE"
        ) from error


def _question(row: Mapping[str, Any]) -> str:
    return str(row["prompt"][-1]["content"])


def _golds(row: Mapping[str, Any]) -> list[str]:
    golds = row["reward_model"]["ground_truth"]
    if isinstance(golds, list):
        return golds
    return [golds]


def _uid(row: Mapping[str, Any]) -> str:
    return f"{row['data_source']}/{row['extra_info']['index']}"


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
