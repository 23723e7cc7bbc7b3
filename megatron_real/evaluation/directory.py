"""The layout of an evaluation's directory, and what must agree for an interrupted one to go on.

settings.json                     what the figures depend on
samples/aime24/chunk-0003.jsonl   every completion of 64 problems, by default
results.json, results.csv         the figures
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_real.disk import whole_file, write_whole
from megatron_real.evaluation.figures import Evaluation, Judged, judged
from megatron_real.records import Prompt, Rollout

BENCH = "problems of "
"""Beginning of the names of settings that are a benchmark's own."""


@dataclass(frozen=True)
class Chunk:
    """Problems of one benchmark that are answered together."""

    benchmark: str
    """Name of the benchmark."""
    number: int
    """From 0, in the order of the benchmark's problems."""
    problems: Sequence[Prompt]
    """[1..] the problems."""


class EvaluationDirectory:
    """Paths and files of one evaluation. The first rank writes; every rank may read."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.settings = self.path / "settings.json"
        self.samples = self.path / "samples"
        self.json = self.path / "results.json"
        self.csv = self.path / "results.csv"

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuses to go on with an evaluation that was begun with other settings.

        Raises:
            ValueError: names the first setting that differs, and both values.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; give another --out")
        if not self.settings.is_file():
            return

        before = json.loads(self.settings.read_text(encoding="utf-8"))
        # Lists for tuples, as in the file.
        settings = json.loads(json.dumps(settings))
        for name, was in before.items():
            # Another benchmark may join, and one that was there may be left out.
            if name.startswith(BENCH) and name not in settings:
                continue
            now = settings.get(name)
            if was != now:
                raise ValueError(
                    f"{self.path} was begun with {name} = {was!r}, and now it is {now!r}; figures "
                    "of both would be mixed: use the same, or give another --out"
                )

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Keeps the settings for `check`."""
        # Kept beside the new ones: benchmarks of an earlier start stay named.
        before = {}
        if self.settings.is_file():
            before = json.loads(self.settings.read_text(encoding="utf-8"))

        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.settings, json.dumps({**before, **settings}, indent=2) + "\n")

    def has(self, chunk: Chunk) -> bool:
        """Returns whether the chunk is complete."""
        return self._file(chunk).is_file()

    def write(
        self,
        chunk: Chunk,
        rollouts: Sequence[Rollout],
        answers: Sequence[tuple[str | None, int | None]],
    ) -> None:
        """Keeps a complete chunk.

        Args:
            chunk: which one.
            rollouts: every sample of its problems.
            answers: [rollouts] what each gave as its answer, and the class of answers it belongs
                to.
        """
        rows = []
        for rollout, (answer, answer_class) in zip(rollouts, answers, strict=True):
            row = dict(vars(judged(rollout, answer_class)))
            row["sample"] = rollout.sample
            row["answer"] = answer
            row["golds"] = list(rollout.prompt.answers)
            row["completion"] = rollout.completion.text
            rows.append(row)

        # ASCII: a model may emit half a surrogate pair.
        write_whole(self._file(chunk), "".join(json.dumps(row) + "\n" for row in rows))

    def read(self, chunks: Sequence[Chunk]) -> list[Judged]:
        """Returns the completions of complete chunks.

        Raises:
            ValueError: a file is broken; names it.
        """
        fields = Judged.__dataclass_fields__
        completions = []
        for chunk in chunks:
            path = self._file(chunk)
            try:
                rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
                # A row has more than that, for people.
                completions += [Judged(**{name: row[name] for name in fields}) for row in rows]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} is broken ({type(error).__name__}: {error}); delete it to go on"
                ) from error
        return completions

    def publish(
        self, model: str, settings: Mapping[str, Any], evaluations: Mapping[str, Evaluation]
    ) -> None:
        """Writes results.json and results.csv.

        Args:
            model: what was evaluated.
            settings: what the figures depend on.
            evaluations: name of a benchmark -> its figures.
        """
        benchmarks = {name: _finite(e.figures()) for name, e in evaluations.items()}
        mean = _finite(average(evaluations))
        results = {
            "model": model,
            "settings": dict(settings),
            "benchmarks": benchmarks,
            "average": mean,
        }

        write_whole(self.json, json.dumps(results, indent=2) + "\n")

        rows = {**benchmarks, "average": mean}
        # Benchmarks with other numbers of samples have other figures: all columns, in their order.
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        with whole_file(self.csv, newline="") as file:
            table = csv.DictWriter(file, ["benchmark", *columns], lineterminator="\n")
            table.writeheader()
            for name, row in rows.items():
                table.writerow({"benchmark": name, **row})

    def _file(self, chunk: Chunk) -> Path:
        return self.samples / chunk.benchmark / f"chunk-{chunk.number:04d}.jsonl"


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    # JSON has no NaN and no infinity: they become null.
    finite: dict[str, float | None] = dict.fromkeys(figures)
    finite |= {name: value for name, value in figures.items() if math.isfinite(value)}
    return finite


def average(evaluations: Mapping[str, Evaluation]) -> dict[str, float]:
    """Returns the average of the benchmarks, each counting alike however many problems it has.

    This is the paper's average. Its standard error is that of a mean of independent figures.
    Problems and failed checks are sums.
    """
    rows = [evaluation.figures() for evaluation in evaluations.values()]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    sums = {name: math.fsum(row[name] for row in rows) for name in names}
    means = {name: total / len(rows) for name, total in sums.items()}
    error = math.sqrt(math.fsum(row["standard_error"] ** 2 for row in rows)) / len(rows)
    counts = {name: int(sums[name]) for name in ("problems", "failed_checks")}
    return means | counts | {"samples": rows[0]["samples"], "standard_error": error}
