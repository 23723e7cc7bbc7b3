"""`megatron-real eval`: a model's figures on benchmarks, resumable in the middle.

    a chunk of problems -> completions -> labels -> classes of equal answers -> the chunk's file
    all chunks' files   -> a table, results.json, results.csv

A chunk's file appears when it is complete, and the figures are computed from the files alone: an
evaluation that was killed goes on by the same command and ends with the same figures. Seeds depend
on the run's seed, the benchmark and the chunk; with another number of processes other samples are
drawn, as good as the first.
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
from megatron_real.conversion.convert import hf_tensors, open_start
from megatron_real.errors import ExpectedEnd
from megatron_real.evaluation.directory import BENCH, Chunk, EvaluationDirectory, average
from megatron_real.evaluation.figures import Evaluation, summarise
from megatron_real.labels import Labeller, build_labeller
from megatron_real.labels.answers import final_answer, opened_thinking
from megatron_real.labels.equivalence import GivenAnswer, answer_classes
from megatron_real.parallel.collective import shared
from megatron_real.parallel.exchange import Exchange
from megatron_real.parallel.groups import join_world, leave_world
from megatron_real.parallel.ranks import Ranks
from megatron_real.progress import Heartbeat
from megatron_real.prompts import load_prompts
from megatron_real.records import POSITIVE, Completion, Prompt, Rollout
from megatron_real.rollout import RolloutStage, build_engine, takes_over
from megatron_real.rollout.engines.engine import Engine, EngineFailed
from megatron_real.rollout.sampling import evaluation_sampling
from megatron_real.rollout.sync import WeightSync
from megatron_real.weights.hf import HfWeights
from megatron_real.weights.stored import torch_dtype

# What of labels.* cannot change a verdict.
_LABEL_SPEED = {"workers", "max_failed_share", "permute", "sandbox"}
# Parts of a weights file that its fingerprint reads: enough to tell two checkpoints of one training
# apart.
_PROBES = 64
_PROBE_BYTES = 1 << 16


class UntrustedFigures(ExpectedEnd, RuntimeError):
    """So many checks failed that the figures say little of the model."""


def run_benchmarks(
    config: Config, files: Mapping[str, str], out: str | Path
) -> dict[str, Evaluation]:
    """Evaluates the model of `config` on each file, and writes the results below `out`.

    Every process of a job runs it.

    Args:
        config: model, engine, verifier and sampling.
        files: name of the benchmark -> file of its problems.
        out: directory of the results.

    Returns:
        The figures by name, on the first rank; the other ranks get none.

    Raises:
        ValueError: weights, data, or an earlier evaluation in `out` do not fit; one sentence.
        UntrustedFigures: everything is written, but the checks of a benchmark failed too often.
    """
    trainer = dataclasses.replace(config.trainer, run_dir=str(out))
    config = dataclasses.replace(config, trainer=trainer)

    # In this order: an engine needs the process group, and prompts need the engine's tokenizer.
    join_world(config.trainer.timeout_minutes)
    rank = dist.get_rank()
    directory = EvaluationDirectory(out)
    engine = build_engine(config, say=Console(quiet=rank > 0, soft_wrap=True).print)

    size = config.evaluation.chunk_problems
    chunks_of = {}
    for name, file in files.items():
        problems = load_prompts(
            file,
            engine.tokenizer,
            suffix=config.data.suffix,
            max_tokens=config.data.max_prompt_tokens,
        )
        # 0 takes all of them.
        problems = problems[: config.evaluation.max_problems or None]
        begins = range(0, len(problems), size)
        chunks_of[name] = [Chunk(name, i // size, problems[i : i + size]) for i in begins]

    chunks = [chunk for of_benchmark in chunks_of.values() for chunk in of_benchmark]

    settings = _settings(config, engine, chunks_of)
    # On every rank, which all read the same file: no rank begins what another refuses.
    directory.check(settings)
    if rank == 0:
        directory.claim(settings)
    # What is left, as the first rank sees it: file systems of other nodes lag behind.
    there = shared([directory.has(chunk) for chunk in chunks], group=dist.group.WORLD)
    missing = [chunk for chunk, done in zip(chunks, there, strict=True) if not done]

    if missing:
        _answer(config, engine, directory, chunks, missing)
    # Before the figures, which one rank computes: the others have ended by then.
    leave_world()
    if rank > 0:
        return {}

    evaluations = {}
    for name, of_benchmark in chunks_of.items():
        evaluations[name] = summarise(directory.read(of_benchmark), vote=True)
    directory.publish(config.model.path, settings, evaluations)

    width = None
    if not sys.stdout.isatty():
        width = 120  # a file takes the whole table
    console = Console(width=width)
    console.print(table(evaluations))
    for label, path in (
        ("results", directory.json),
        ("", directory.csv),
        ("completions", directory.samples),
    ):
        console.print(f"{label:11s}  {path}", highlight=False, soft_wrap=True)

    # Last: the files are written and shown whatever they are worth.
    for name, evaluation in evaluations.items():
        share = evaluation.failed_checks / (evaluation.problems * evaluation.samples)
        if share > config.labels.max_failed_share:
            raise UntrustedFigures(
                f"{share:.0%} of the checks of {name} failed and count as wrong, more than "
                f"labels.max_failed_share = {config.labels.max_failed_share}; raise "
                f"labels.timeout_seconds, and look into the completions"
            )
    return evaluations


def table(evaluations: Mapping[str, Evaluation]) -> Table:
    """Returns the figures as a person reads them."""
    rows = {name: evaluation.figures() for name, evaluation in evaluations.items()}
    if len(evaluations) > 1:
        rows["average"] = average(evaluations)
    samples = next(iter(evaluations.values())).samples
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

    # 80 columns hold this with a name of 15 characters: the headings are short, one space is
    # between.
    shown = Table("benchmark", box=SIMPLE, padding=0)
    for name in columns:
        shown.add_column(name, justify="right")
    for name, row in rows.items():
        if name == "average":
            shown.add_section()
        shown.add_row(name, *(text(row) for text in columns.values()))
    return shown


def _settings(
    config: Config, engine: Engine, chunks_of: Mapping[str, Sequence[Chunk]]
) -> dict[str, Any]:
    """Returns everything that the figures depend on, by the names under which a user set it."""
    # A checkpoint takes the place of the HF directory's own weights.
    if config.model.weights:
        paths = Path(config.model.weights).rglob("*")
        files = sorted(path for path in paths if path.is_file())
    else:
        files = HfWeights(config.model.path).files
    settings: dict[str, Any] = {
        "weights": _fingerprint(files),
        "model.dtype": config.model.dtype,
    }

    sections = to_dict(config)
    for name, value in sections["evaluation"].items():
        if name != "every":
            settings[f"evaluation.{name}"] = value
    for name, value in sections["labels"].items():
        if name not in _LABEL_SPEED:
            settings[f"labels.{name}"] = value
    settings |= {
        "rollout.engine": engine.name,
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        "data.suffix": config.data.suffix,
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "trainer.seed": config.trainer.seed,
    }

    for name, chunks in chunks_of.items():
        if not chunks:
            continue
        digest = hashlib.sha256()
        for chunk in chunks:
            for problem in chunk.problems:
                identity = (problem.uid, problem.token_ids, problem.answers)
                digest.update(repr(identity).encode())
        settings[f"{BENCH}{name}"] = digest.hexdigest()[:16]
    return settings


def _fingerprint(files: Sequence[Path]) -> str:
    """Returns the identity of weights, by their files' sizes and parts of their bytes.

    It does not read gigabytes for it.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            # Evenly spaced, the first at the beginning and the last at the end.
            for probe in range(_PROBES):
                file.seek(max(size - _PROBE_BYTES, 0) * probe // (_PROBES - 1))
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()[:16]


def _answer(
    config: Config,
    engine: Engine,
    directory: EvaluationDirectory,
    chunks: Sequence[Chunk],
    missing: Sequence[Chunk],
) -> None:
    """Answers, verifies and keeps the chunks that are missing. Collective over all ranks."""
    rank = dist.get_rank()
    console = Console(quiet=rank > 0, soft_wrap=True)
    say = functools.partial(console.print, highlight=False, markup=False)
    if len(missing) < len(chunks):
        console.print(
            f"{len(chunks) - len(missing)} of {len(chunks)} chunks are there already; going on"
        )
    sampling = evaluation_sampling(config)

    architecture, weights = open_start(config.model.path, config.model.weights)
    dtype = torch_dtype(config.model.dtype)
    sync = WeightSync(
        engine,
        config.rollout.sync,
        tied=architecture.tied,
        # No policy is there to compare with, so that the probe is never asked; the sync wants one.
        probe=missing[0].problems[0],
        temperature=1.0,
    )

    # By the same checks as in training: an evaluation of half a model would look like a bad model.
    sync.run((name, tensor.to(dtype)) for name, tensor in hf_tensors(weights, architecture))

    num_problems = sum(len(chunk.problems) for chunk in chunks)
    num_missing = sum(len(chunk.problems) for chunk in missing)
    ranks = Ranks.of_all(timedelta(minutes=config.trainer.timeout_minutes))
    # Failed checks are judged at the end, so that the verdict does not depend on where a run was
    # cut.
    with build_labeller(dataclasses.replace(config.labels, max_failed_share=1.0)) as labeller:
        stage = RolloutStage(
            engine,
            labeller,
            rank=rank,
            world=ranks.world,
            retries=config.rollout.retries,
            exchange=Exchange(rank, ranks.world, ranks.group),
            take_over=takes_over(config, engine),
        )
        with (
            _progress(console, num_problems) as advance,
            Heartbeat(lambda: str(stage.generation or ""), say),
        ):
            # What an earlier start has answered counts as done.
            advance(num_problems - num_missing)
            for chunk in missing:
                started = time.monotonic()
                # Not by Python's own hash, which differs from process to process.
                identity = f"{config.trainer.seed} {chunk.benchmark} {chunk.number}"
                digest = hashlib.blake2b(identity.encode(), digest_size=6).digest()
                seed = int.from_bytes(digest, "little")

                completions = stage.generate(chunk.problems, sampling, seed=seed)
                rollouts = stage.label(chunk.problems, completions)

                # An engine's failure must not be kept as wrong answers.
                lost = [r.verdict.reason for r in rollouts if r.verdict.status == "lost"]
                if lost:
                    raise EngineFailed(
                        f"{len(lost)} completions of {chunk.benchmark} were lost ({lost[0]}); "
                        f"start again"
                    )
                # The texts are still on the ranks that sampled them, and the file needs them all.
                rollouts = stage.exchange.to_first(rollouts)
                if rank == 0:
                    directory.write(chunk, rollouts, _answers(rollouts, labeller, config.labels))
                advance(len(chunk.problems))

                seconds = time.monotonic() - started
                tokens = sum(r.completion.num_trained for r in rollouts)
                correct = sum(r.label == POSITIVE for r in rollouts) / len(rollouts)
                console.print(
                    f"{chunk.benchmark} chunk {chunk.number}: {len(chunk.problems)} problems, "
                    f"{len(rollouts)} completions, {correct:.3f} correct, "
                    f"{tokens / seconds:,.0f} tokens/s, {seconds:.1f} s",
                    highlight=False,
                )
    engine.finish_inference()


def _answers(
    rollouts: Sequence[Rollout], labeller: Labeller, labels: LabelConfig
) -> list[tuple[str | None, int | None]]:
    """Returns, for each rollout, its answer and the class of equal answers to its problem.

    A truncated completion does not vote. Only math_verify compares by algebra; elsewhere equal
    means the same normal form (labels/normal_form.py).
    """
    given = []
    for rollout in rollouts:
        comparable = rollout.verdict.status in ("ok", "wrong")
        given.append(
            GivenAnswer(
                text=_text(rollout, labels),
                correct=rollout.label == POSITIVE,
                comparable=labels.verifier == "math_verify" and comparable,
            )
        )

    def same(gold: str, answer: str) -> bool:
        # The verifier compares a completion with a gold answer, so one of two answers plays it.
        problem = Prompt(uid="", text="", token_ids=(), answers=(gold,))
        completion = Completion((0,), (0.0,), f"</think>\\boxed{{{answer}}}", finished=True)
        (verdict,) = labeller([(problem, completion)])
        return verdict.label == POSITIVE

    classes: dict[int, int | None] = {}
    for group in dict.fromkeys(r.group for r in rollouts):
        # Answers are compared within a problem only.
        members = [i for i, r in enumerate(rollouts) if r.group == group]
        # With one gold answer all right answers are equal to it, and so to each other.
        one_gold = len(rollouts[members[0]].prompt.answers) == 1
        of_members = answer_classes([given[i] for i in members], same, one_gold=one_gold)
        classes.update(zip(members, of_members, strict=True))

    return [(answer.text, classes[i]) for i, answer in enumerate(given)]


def _text(rollout: Rollout, labels: LabelConfig) -> str | None:
    """Returns the answer, as the verifier reads it; a truncated completion has none.

    A verifier of a user's own is given the whole text, so that an answer may stand outside of a box
    there.
    """
    # What is cut may end in the middle of a number, which then reads as another one.
    if not rollout.completion.finished:
        return None
    answer = final_answer(
        opened_thinking(rollout.prompt.text) + rollout.completion.text,
        require_think=labels.require_think,
        require_boxed=labels.require_boxed and ":" not in labels.verifier,
    )
    if not answer:
        return None
    return answer.text


@contextmanager
def _progress(console: Console, problems: int) -> Iterator[Callable[[int], None]]:
    """Yields what advances a bar on a terminal; elsewhere the chunks' lines are all."""
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
