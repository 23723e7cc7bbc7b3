"""`megatron-real eval`: a model's figures on benchmarks, resumable in the middle.

    a chunk of problems -> completions -> labels -> classes of equal answers -> the chunk's file
    all chunks' files   -> a table, results.json, results.csv

A chunk's file appears when it is complete, and the figures are computed from the files alone: an evaluation that was
killed goes on by the same command and ends with the same figures. Seeds depend on the run's seed, the benchmark and the
chunk; with another number of processes other samples are drawn, as good as the first.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from megatron_real.config import Config, LabelConfig, to_dict
from megatron_real.evaluate import Evaluation, summarise
from megatron_real.exchange import Exchange
from megatron_real.labels import Labeller, build_labeller
from megatron_real.labels.answers import final_answer, opened_thinking
from megatron_real.labels.equivalence import Given, answer_classes
from megatron_real.policy.layout import join_world, leave_world
from megatron_real.prompts import load_prompts
from megatron_real.records import POSITIVE, Completion, Prompt, Rollout, Sampling
from megatron_real.rollout import RolloutStage, build_engine
from megatron_real.rollout.engine import Engine, EngineFailed
from megatron_real.rollout.sync import WeightSync
from megatron_real.runs.evaluated import BENCH, Chunk, EvaluationDirectory, average
from megatron_real.runs.progress import Heartbeat
from megatron_real.runs.ranks import Ranks
from megatron_real.weights.conversion import hf_tensors, open_start
from megatron_real.weights.hf import HfWeights
from megatron_real.weights.stored import torch_dtype

# What of labels.* cannot change a verdict.
_LABEL_SPEED = {"workers", "max_failed_share", "permute", "sandbox"}
# Parts of a weights file that its fingerprint reads: enough to tell two checkpoints of one training apart.
_PROBES, _PROBE_BYTES = 64, 1 << 16


class UntrustedFigures(RuntimeError):
    """So many checks failed that the figures say little of the model."""


def run_benchmarks(
    config: Config, files: Mapping[str, str], out: str | Path
) -> dict[str, Evaluation]:
    """Evaluates the model of `config` on each file; writes the results below `out`. Every process of a job runs it.

    Args:
        files: name of the benchmark -> file of its problems.

    Returns:
        The figures by name, on the first rank; the other ranks get none.

    Raises:
        ValueError: weights, data, or an earlier evaluation in `out` do not fit; one sentence.
        UntrustedFigures: everything is written, but the checks of a benchmark failed too often.
    """
    config = dataclasses.replace(
        config, trainer=dataclasses.replace(config.trainer, run_dir=str(out))
    )
    join_world(config.trainer.timeout_minutes)
    rank, directory = dist.get_rank(), EvaluationDirectory(out)
    engine = build_engine(config, say=Console(quiet=rank > 0, soft_wrap=True).print)
    chunks = [
        chunk
        for name, file in files.items()
        for chunk in _chunks(name, _problems(config, engine, file), config)
    ]
    settings = _settings(config, engine, chunks)
    directory.check(settings)
    if rank == 0:
        directory.claim(settings)
    todo = _missing(directory, chunks)
    if todo:
        _answer(config, engine, directory, chunks, todo)
    leave_world()
    if rank > 0:
        return {}
    found = {
        name: summarise(directory.read([c for c in chunks if c.benchmark == name]), vote=True)
        for name in files
    }
    directory.publish(config.model.path, settings, found)
    console = Console(width=None if sys.stdout.isatty() else 120)  # a file takes the whole table
    console.print(table(found))
    for what, path in (
        ("results", directory.json),
        ("", directory.csv),
        ("completions", directory.samples),
    ):
        console.print(f"{what:11s}  {path}", highlight=False, soft_wrap=True)
    _check_trust(found, config.labels.max_failed_share)
    return found


def table(found: Mapping[str, Evaluation]) -> Table:
    """The figures as a person reads them."""
    rows = {name: evaluation.figures() for name, evaluation in found.items()}
    if len(found) > 1:
        rows["average"] = average(found)
    samples = next(iter(found.values())).samples
    columns = {
        "asked": lambda row: f"{row['problems']}",
        "pass@1": lambda row: f"{row['pass_at_1']:.3f}",
        "+-": lambda row: f"{row['standard_error']:.3f}",
        f"pass@{samples}": lambda row: f"{row[f'pass_at_{samples}']:.3f}",
        f"maj@{samples}": lambda row: f"{row['majority']:.3f}",
        "tokens": lambda row: f"{row['response_tokens_mean']:.0f}",
        "cut": lambda row: f"{row['truncated_share']:.1%}",
        "blank": lambda row: f"{row['unanswered_share']:.1%}",
        "failed": lambda row: f"{row['failed_checks']}",
    }
    if samples == 1:
        del columns["maj@1"]  # and pass@1 is there once
    # 80 columns hold this with a name of 15 characters: the headings are short, one space is between.
    shown = Table("benchmark", box=SIMPLE, padding=0)
    for name in columns:
        shown.add_column(name, justify="right")
    for name, row in rows.items():
        if name == "average":
            shown.add_section()
        shown.add_row(name, *(text(row) for text in columns.values()))
    return shown


def _problems(config: Config, engine: Engine, file: str) -> list[Prompt]:
    data = config.data
    problems = load_prompts(
        file, engine.tokenizer, suffix=data.suffix, max_tokens=data.max_prompt_tokens
    )
    return problems[: config.evaluation.max_problems or None]


def _chunks(name: str, problems: Sequence[Prompt], config: Config) -> list[Chunk]:
    size = config.evaluation.chunk_problems
    return [Chunk(name, i // size, problems[i : i + size]) for i in range(0, len(problems), size)]


def _names(chunks: Sequence[Chunk]) -> list[str]:
    return list(dict.fromkeys(chunk.benchmark for chunk in chunks))


def _settings(config: Config, engine: Engine, chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Everything that the figures depend on, by the names under which a user set it."""
    sections = to_dict(config)
    evaluation = {
        f"evaluation.{name}": value
        for name, value in sections["evaluation"].items()
        if name != "every"
    }
    labels = {
        f"labels.{name}": value
        for name, value in sections["labels"].items()
        if name not in _LABEL_SPEED
    }
    return {
        "weights": _fingerprint(_files_of_weights(config)),
        "model.dtype": config.model.dtype,
        **evaluation,
        **labels,
        "rollout.engine": engine.name,
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        "data.suffix": config.data.suffix,
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "trainer.seed": config.trainer.seed,
        **{
            f"{BENCH}{name}": _identity([c for c in chunks if c.benchmark == name])
            for name in _names(chunks)
        },
    }


def _identity(chunks: Sequence[Chunk]) -> str:
    digest = hashlib.sha256()
    for problem in (p for chunk in chunks for p in chunk.problems):
        digest.update(repr((problem.uid, problem.token_ids, problem.answers)).encode())
    return digest.hexdigest()[:16]


def _files_of_weights(config: Config) -> Sequence[Path]:
    if config.model.weights:
        return sorted(path for path in Path(config.model.weights).rglob("*") if path.is_file())
    return HfWeights(config.model.path).files


def _fingerprint(files: Sequence[Path]) -> str:
    """Identity of weights by their files' sizes and parts of their bytes: gigabytes are not read for it."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for probe in range(_PROBES):
                file.seek(max(size - _PROBE_BYTES, 0) * probe // (_PROBES - 1))
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()[:16]


def _missing(directory: EvaluationDirectory, chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks that are left, as the first rank sees them: file systems of other nodes lag behind."""
    there = [[directory.has(chunk) for chunk in chunks]]
    dist.broadcast_object_list(there, src=0)
    return [chunk for chunk, done in zip(chunks, there[0], strict=True) if not done]


def _answer(
    config: Config,
    engine: Engine,
    directory: EvaluationDirectory,
    chunks: Sequence[Chunk],
    todo: Sequence[Chunk],
) -> None:
    """Answers, verifies and keeps the chunks that are left."""
    rank, evaluation = dist.get_rank(), config.evaluation
    console = Console(quiet=rank > 0, soft_wrap=True)
    if len(todo) < len(chunks):
        console.print(
            f"{len(chunks) - len(todo)} of {len(chunks)} chunks are there already; going on"
        )
    sampling = Sampling(
        evaluation.samples,
        evaluation.temperature,
        config.rollout.max_response_tokens,
        evaluation.top_p,
    )
    architecture, weights = open_start(config.model.path, config.model.weights)
    probe, dtype = todo[0].problems[0], torch_dtype(config.model.dtype)
    sync = WeightSync(
        engine, config.rollout.sync, tied=architecture.tied, probe=probe, temperature=1.0
    )
    sync.run((name, tensor.to(dtype)) for name, tensor in hf_tensors(weights, architecture))
    # Failed checks are judged at the end, so that the verdict does not depend on where a run was cut.
    ranks = Ranks.of_all(timedelta(minutes=config.trainer.timeout_minutes))
    with build_labeller(dataclasses.replace(config.labels, max_failed_share=1.0)) as labeller:
        stage = RolloutStage(
            engine,
            labeller,
            rank=rank,
            world=ranks.world,
            retries=config.rollout.retries,
            exchange=Exchange(rank, ranks.world, ranks.group),
        )
        say = functools.partial(console.print, highlight=False, markup=False)
        with (
            _progress(console, sum(len(c.problems) for c in chunks)) as done,
            Heartbeat(lambda: str(stage.generation or ""), say),
        ):
            done(sum(len(c.problems) for c in chunks) - sum(len(c.problems) for c in todo))
            for chunk in todo:
                started = time.monotonic()
                seed = _seed(config.trainer.seed, chunk)
                rollouts = stage.label(
                    chunk.problems, stage.generate(chunk.problems, sampling, seed=seed)
                )
                lost = [r.verdict.reason for r in rollouts if r.verdict.status == "lost"]
                if lost:  # an engine's failure must not be kept as wrong answers
                    raise EngineFailed(
                        f"{len(lost)} completions of {chunk.benchmark} were lost ({lost[0]}); start again"
                    )
                rollouts = stage.exchange.to_first(rollouts)
                if rank == 0:
                    directory.write(chunk, rollouts, _answers(rollouts, labeller, config.labels))
                done(len(chunk.problems))
                _say(console, chunk, rollouts, time.monotonic() - started)
    engine.finish_inference()


def _seed(seed: int, chunk: Chunk) -> int:
    digest = hashlib.blake2b(
        f"{seed} {chunk.benchmark} {chunk.number}".encode(), digest_size=6
    ).digest()
    return int.from_bytes(digest, "little")


def _answers(
    rollouts: Sequence[Rollout], labeller: Labeller, labels: LabelConfig
) -> list[tuple[str | None, int | None]]:
    """[rollouts] what each gave as its answer, and the class of equal answers to its problem.

    A truncated completion does not vote. Only math_verify compares by algebra; elsewhere equal means the same normal
    form (labels/normal_form.py).
    """
    given = [
        Given(
            text=_text(r, labels),
            correct=r.label == POSITIVE,
            comparable=labels.verifier == "math_verify" and r.verdict.status in ("ok", "wrong"),
        )
        for r in rollouts
    ]

    def same(one: str, other: str) -> bool:
        asked = Prompt(uid="", text="", token_ids=(), answers=(one,))
        (verdict,) = labeller(
            [(asked, Completion((0,), (0.0,), f"</think>\\boxed{{{other}}}", finished=True))]
        )
        return verdict.label == POSITIVE

    classes: dict[int, int | None] = {}
    for group in dict.fromkeys(r.group for r in rollouts):
        members = [i for i, r in enumerate(rollouts) if r.group == group]
        one_gold = len(rollouts[members[0]].prompt.answers) == 1
        classes |= dict(
            zip(
                members,
                answer_classes([given[i] for i in members], same, one_gold=one_gold),
                strict=True,
            )
        )
    return [(one.text, classes[i]) for i, one in enumerate(given)]


def _text(rollout: Rollout, labels: LabelConfig) -> str | None:
    """The answer, as the verifier reads it; a truncated completion has none.

    A verifier of a user's own is given the whole text, so that an answer may stand outside of a box there.
    """
    if not rollout.completion.finished:
        return None
    answer = final_answer(
        opened_thinking(rollout.prompt.text) + rollout.completion.text,
        require_think=labels.require_think,
        require_boxed=labels.require_boxed and ":" not in labels.verifier,
    )
    return answer.text if answer else None


@contextmanager
def _progress(console: Console, problems: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; elsewhere the lines of `_say` are all."""
    columns = (
        TextColumn("problems"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=problems)
        yield lambda count: bar.advance(task, count)


def _say(console: Console, chunk: Chunk, rollouts: Sequence[Rollout], seconds: float) -> None:
    tokens = sum(r.completion.num_trained for r in rollouts)
    correct = sum(r.label == POSITIVE for r in rollouts) / len(rollouts)
    console.print(
        f"{chunk.benchmark} chunk {chunk.number}: {len(chunk.problems)} problems, {len(rollouts)} completions, "
        f"{correct:.3f} correct, {tokens / seconds:,.0f} tokens/s, {seconds:.1f} s",
        highlight=False,
    )


def _check_trust(found: Mapping[str, Evaluation], max_failed_share: float) -> None:
    for name, evaluation in found.items():
        share = evaluation.failed_checks / (evaluation.problems * evaluation.samples)
        if share > max_failed_share:
            raise UntrustedFigures(
                f"{share:.0%} of the checks of {name} failed and count as wrong, more than labels.max_failed_share = "
                f"{max_failed_share}; raise labels.timeout_seconds, and look into the completions"
            )
