"""`megatron-real eval`: the arguments and exit codes of benchmark.py.

    megatron-real eval CONFIG.yaml|HF_DIR --bench NAME=FILE ... [--samples 16 ...] [--out DIR] [key.sub=value ...]

What is wrong with them is said before anything heavy is imported.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_real import config as configuration
from megatron_real.weights.architecture import Architecture

# Options of `eval` that stand for a key of the configuration.
_KEYS = {
    "samples": ("evaluation.samples", "completions per problem"),
    "temperature": ("evaluation.temperature", "sampling temperature"),
    "top_p": ("evaluation.top_p", "nucleus mass"),
    "max_tokens": ("rollout.max_response_tokens", "longest response"),
    "suffix": ("data.suffix", "appended to each question"),
    "seed": ("trainer.seed", "of the sampling"),
}


def add_command(commands: Any) -> None:
    """Adds `eval` to the command line's parsers."""
    parser = commands.add_parser("eval", help="evaluate a model", description="pass@1 and more on benchmarks.")
    parser.add_argument("config", metavar="CONFIG|HF_DIR", help="YAML file, or a directory of HF weights")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
    parser.add_argument("--bench", action="append", required=True, metavar="NAME=FILE", help="may be given many times")
    parser.add_argument("--out", help="directory of the results; default: runs/eval/ and the name of the model or run")
    for option, (key, what) in _KEYS.items():
        parser.add_argument(f"--{option.replace('_', '-')}", metavar="X", help=f"{what} ({key})")


def run(chosen: argparse.Namespace, first: bool) -> int:
    """Runs `eval`; returns the exit code, and speaks on the first rank only."""
    given = {key: getattr(chosen, option) for option, (key, _) in _KEYS.items()}
    words = [f"{key}={json.dumps(v) if key == 'data.suffix' else v}" for key, v in given.items() if v is not None]
    try:
        # Nothing is packed here, so that responses may be as long as the model can take.
        config = configuration.load(chosen.config, [*chosen.overrides, *words, f"batch.max_tokens={1 << 40}"])
        Architecture.read(config.model.path)
        if config.model.weights:
            raise ValueError(
                f"model.weights is {config.model.weights!r}, but eval reads the HF weights of model.path; convert it "
                "by `megatron-real convert to-hf`, or set model.weights="
            )
        files = _benchmarks(chosen.bench)
    except ValueError as error:
        return _refused(error, first)
    from megatron_real.benchmark import UntrustedFigures, run_benchmarks
    from megatron_real.rollout.engine import EngineFailed
    from megatron_real.rollout.sync import SyncError

    out = chosen.out or str(Path("runs/eval") / results_name(Path(config.model.path).resolve()))
    try:
        run_benchmarks(config, files, out)
    except ValueError as error:
        return _refused(error, first)
    except KeyboardInterrupt:
        if first:
            print(f"megatron-real: interrupted; the same command goes on from what is in {out}", file=sys.stderr)
        return 130
    except (UntrustedFigures, EngineFailed, SyncError) as error:
        if first:
            print(f"megatron-real: {error}", file=sys.stderr)
        return 1
    return 0


def results_name(model: Path) -> str:
    """What the results of a model are called: as its run, where a run exported it, which calls all of them hf."""
    return model.parent.name if model.name == "hf" else model.name


def _refused(error: ValueError, first: bool) -> int:
    if first:
        print(f"megatron-real: {error}", file=sys.stderr)
    return 2


def _benchmarks(words: Sequence[str]) -> dict[str, str]:
    """NAME=FILE words as a table."""
    files: dict[str, str] = {}
    for word in words:
        name, _, file = word.partition("=")
        if not file or not re.fullmatch(r"[\w.-]+", name) or name in files:
            raise ValueError(f"--bench {word!r} is not understood; write NAME=FILE, each name once")
        if not Path(file).exists():
            raise ValueError(f"there is no data file {file!r}; tools/prepare_data.py makes the benchmarks")
        files[name] = file
    return files
