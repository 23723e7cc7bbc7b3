"""`megatron-real eval`: the arguments and exit codes of benchmark.py.

    megatron-real eval CONFIG.yaml|HF_DIR --bench NAME=FILE ... [--samples 16 ...] [--out DIR] [key.sub=value ...]

What is wrong with them is said before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_real import config as configuration
from megatron_real.commands.subject import Subject
from megatron_real.commands.terminal import INTERRUPTED, refuse, say
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.conversion import check_model

SUMMARY = "measure pass@1, pass@k and maj@k on benchmarks"
EXAMPLES = """\
examples:
  megatron-real eval runs/first --bench MATH-500=data/math500.jsonl
  megatron-real eval runs/first/checkpoints/step_40 --bench MATH-500=data/math500.jsonl
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
        help="run directory or checkpoint of one, with the run's own settings; HF directory or cached hub id; YAML file",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file"
    )
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
        parser.add_argument(f"--{option.replace('_', '-')}", metavar="X", help=f"{what} ({key})")


def run(options: argparse.Namespace) -> int:
    """Evaluates; returns the exit code."""
    given = {key: getattr(options, option) for option, (key, _) in _KEYS.items()}
    words = [f"{key}={value}" for key, value in given.items() if value is not None]
    try:
        subject = Subject.of(options.config)
        words = [*subject.words, *options.overrides, *words]
        # Nothing is packed here, so that responses may be as long as the model can take.
        words.append(f"batch.max_tokens={1 << 40}")
        config = configuration.load(subject.config, [*words, *_clamped(subject, words)])
        check_model(config.model.path, config.model.weights)
        files = _benchmarks(options.bench)
    except ValueError as error:
        return refuse(error)
    from megatron_real.benchmark import UntrustedFigures, run_benchmarks
    from megatron_real.rollout.engine import EngineFailed
    from megatron_real.rollout.sync import SyncError

    out = options.out or str(Path("runs/eval") / subject.name(config.model.path))
    try:
        run_benchmarks(config, files, out)
    except ValueError as error:
        return refuse(error)
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on from what is in {out}")
        return INTERRUPTED
    except (UntrustedFigures, EngineFailed, SyncError) as error:
        say(error)
        return 1
    return 0


def _clamped(subject: Subject, words: Sequence[str]) -> list[str]:
    """Words that make prompts and responses fit into what the model can hold, where its own settings do not; said."""
    try:
        configuration.load(subject.config, words)
    except ValueError as error:
        if "exceeds the model's max_position_embeddings" not in str(error):
            return []  # it is raised again, and is not ours to mend
    else:
        return []
    asked = {word.partition("=")[0] for word in words}
    limits = ("data.max_prompt_tokens", "rollout.max_response_tokens")
    if asked & set(limits) and subject.config.is_file():
        return []
    positions = _positions(subject, words)
    free = [limit for limit in limits if limit not in asked]
    taken = sum(int(w.partition("=")[2]) for w in words if w.partition("=")[0] in limits)
    if not free or taken >= positions:
        return []
    share = (positions - taken) // len(free)
    say(
        f"the model holds {positions} tokens, so {' and '.join(f'{limit}={share}' for limit in free)}"
    )
    return [f"{limit}={share}" for limit in free]


def _positions(subject: Subject, words: Sequence[str]) -> int:
    limits = ["data.max_prompt_tokens=1", "rollout.max_response_tokens=1"]
    config = configuration.load(subject.config, [*words, *limits])
    return Architecture.read(config.model.path).max_positions


def _benchmarks(words: Sequence[str]) -> dict[str, str]:
    """NAME=FILE words as a table."""
    files: dict[str, str] = {}
    for word in words:
        name, _, file = word.partition("=")
        if not file or not re.fullmatch(r"[\w.-]+", name) or name in files:
            raise ValueError(f"--bench {word!r} is not understood; write NAME=FILE, each name once")
        if not Path(file).exists():
            raise ValueError(
                f"there is no data file {file!r}; tools/prepare_data.py makes the benchmarks"
            )
        files[name] = file
    return files
