"""`megatron-real eval`: the arguments and exit codes of evaluation/benchmark.py.

    megatron-real eval MODEL --bench NAME=FILE ... [--samples 16] [--out DIR] [key.sub=value ...]

MODEL is a YAML file, a run directory, a checkpoint of one, or a directory of HF weights. What is
wrong with the arguments is said before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_real import config as configuration
from megatron_real.commands.arguments import add_overrides
from megatron_real.commands.subject import Subject
from megatron_real.commands.terminal import input_checks, say
from megatron_real.conversion.convert import check_model
from megatron_real.errors import DONE, INTERRUPTED
from megatron_real.weights.architecture import Architecture

SUMMARY = "measure pass@1, pass@k and maj@k on benchmarks"
EXAMPLES = """\
examples:
  megatron-real eval runs/first --bench MATH-500=data/math500.jsonl
  megatron-real eval runs/first/checkpoints/step_40 --bench AIME=data/aime.jsonl
  megatron-real eval my.yaml --bench AIME=data/aime24.jsonl --samples 16
"""

# Options of `eval` that stand for a key of the configuration.
_KEYS = {
    "samples": ("evaluation.samples", "completions per problem"),
    "temperature": ("evaluation.temperature", "sampling temperature"),
    "top_p": ("evaluation.top_p", "nucleus mass"),
    "max_tokens": ("rollout.max_response_tokens", "longest response"),
    "suffix": ("data.suffix", "appended to each question"),
    "seed": ("trainer.seed", "of the sampling"),
}


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument(
        "config",
        metavar="MODEL",
        help="run directory or checkpoint of one, with the run's own settings; HF directory or "
        "cached hub id; YAML file",
    )
    add_overrides(parser)
    parser.add_argument(
        "--bench",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="may be given many times",
    )

    parser.add_argument(
        "--out",
        help="directory of the results; default: runs/eval/ and the name of the model or run",
    )

    for option, (key, what) in _KEYS.items():
        # Without a type: the value becomes an override, and the configuration checks it.
        parser.add_argument(f"--{option.replace('_', '-')}", metavar="X", help=f"{what} ({key})")


def run(options: argparse.Namespace) -> int:
    """Evaluates; returns the exit code."""
    asked = []
    for option, (key, _) in _KEYS.items():
        value = getattr(options, option)
        if value is not None:
            asked.append(f"{key}={value}")

    with input_checks():
        subject = Subject.of(options.config)
        # Of two that set the same the later counts: options over words, and
        # both over the run's own.
        overrides = [*subject.overrides, *options.overrides, *asked]
        # Nothing is packed here, so that responses may be as long as the model can take.
        overrides.append(f"batch.max_tokens={1 << 40}")
        # After all others, since what is free to be shortened depends on them.
        overrides += _fitting_lengths(subject, overrides)
        config = configuration.load(subject.config, overrides)
        check_model(config.model.path, config.model.weights)
        files = _benchmarks(options.bench)

    # Only now: this imports torch, which the checks above do without.
    from megatron_real.evaluation.benchmark import run_benchmarks

    # Found before anything is loaded, since an interrupted evaluation is told where to go on.
    out = options.out or str(Path("runs/eval") / subject.name(config.model.path))
    try:
        with input_checks():
            run_benchmarks(config, files, out)
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on from what is in {out}")
        return INTERRUPTED
    return DONE


def _fitting_lengths(subject: Subject, overrides: Sequence[str]) -> list[str]:
    """Returns overrides by which prompts and responses fit what the model can hold, and says so.

    There are none where the lengths fit, or where the user's own file and overrides set them.
    """
    try:
        configuration.load(subject.config, overrides)
        return []
    except ValueError as error:
        # Known by its words, which config/checks.py writes: its class says only
        # that something is wrong.
        if "exceeds the model's max_position_embeddings" not in str(error):
            return []  # it is raised again, and is not ours to mend

    limits = ("data.max_prompt_tokens", "rollout.max_response_tokens")
    values = {}
    for word in overrides:
        # The later of two words replaces the earlier, as in the configuration.
        key, _, value = word.partition("=")
        values[key] = value
    if subject.config.is_file() and any(limit in values for limit in limits):
        return []

    # With lengths that any model holds, the configuration loads and says how many that are.
    shortest = [f"{limit}=1" for limit in limits]
    config = configuration.load(subject.config, [*overrides, *shortest])
    positions = Architecture.read(config.model.path).max_positions
    free = [limit for limit in limits if limit not in values]
    taken = sum(int(values[limit]) for limit in limits if limit in values)
    if not free or taken >= positions:
        return []

    share = (positions - taken) // len(free)
    fitting = [f"{limit}={share}" for limit in free]
    say(f"the model holds {positions} tokens, so {' and '.join(fitting)}")
    return fitting


def _benchmarks(words: Sequence[str]) -> dict[str, str]:
    """Returns NAME=FILE words as a table.

    Raises:
        ValueError: a word is none of these, a name comes twice, or a file is not there.
    """
    files: dict[str, str] = {}
    for word in words:
        name, _, file = word.partition("=")
        # The name becomes a part of the results' file names.
        if not file or not re.fullmatch(r"[\w.-]+", name) or name in files:
            raise ValueError(f"--bench {word!r} is not understood; write NAME=FILE, each name once")
        if not Path(file).exists():
            raise ValueError(
                f"there is no data file {file!r}; tools/prepare_data.py makes the benchmarks"
            )
        files[name] = file
    return files
