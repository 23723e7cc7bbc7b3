"""The command line.

    megatron-real train CONFIG.yaml [key.sub=value ...]      by itself, or under torchrun or srun
    megatron-real eval CONFIG.yaml|HF_DIR --bench NAME=FILE ... [key.sub=value ...]      likewise
    megatron-real serve CONFIG.yaml [key.sub=value ...]      vLLM for a run on other machines
    megatron-real convert to-megatron | to-hf | verify | inspect ...

A wrong configuration is refused before anything heavy is imported, in one sentence.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from megatron_real import benchmark_command, convert, serve
from megatron_real import config as configuration
from megatron_real.weights.architecture import Architecture

logger = logging.getLogger("megatron_real")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0 done, 1 the run failed, 2 the input was refused, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="megatron-real", description="REAL (Rewards as Labels) on Megatron-LM.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a policy", description="Trains a policy by REAL.")
    train.add_argument("config", help="YAML file; see examples/configs/")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
    convert.add_commands(commands)
    benchmark_command.add_command(commands)
    serve.add_command(commands)
    chosen, later = parser.parse_known_args(arguments)
    if later and (not hasattr(chosen, "overrides") or any(word.startswith("-") for word in later)):
        parser.error(f"unrecognized arguments: {' '.join(later)}")
    if later:
        chosen.overrides += later  # argparse itself takes them only before the options
    first = os.environ.get("RANK", "0") == "0"
    _quiet(first)
    if chosen.command == "convert":
        return convert.run(chosen)
    if chosen.command == "eval":
        return benchmark_command.run(chosen, first)
    if chosen.command == "serve":
        return serve.run(chosen)
    try:
        config = configuration.load(chosen.config, chosen.overrides)
        configuration.check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
        if not config.trainer.run_dir:
            raise ValueError(
                "trainer.run_dir is empty; say where the run may write, for example trainer.run_dir=runs/first"
            )
        Architecture.read(config.model.path)
    except ValueError as error:
        if first:
            print(f"megatron-real: {error}", file=sys.stderr)
        return 2
    return _train(config, first)


def _quiet(first: bool) -> None:
    """Our own messages once, from the first rank; of the libraries below only what is serious."""
    logging.basicConfig(level=logging.WARNING if first else logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO if first else logging.ERROR)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"(torch|megatron)\b.*")


def _train(config: configuration.Config, first: bool) -> int:
    from megatron_real.job import build
    from megatron_real.labels import RewardNeedsThreshold, TooManyFailedChecks
    from megatron_real.loop import NonFinite, train
    from megatron_real.policy.layout import leave_world
    from megatron_real.rollout.engine import EngineFailed
    from megatron_real.rollout.sync import SyncError

    try:
        job = build(config)
    except ValueError as error:  # weights, data or layout do not fit: the input's fault, said in one sentence
        print(f"megatron-real: {error}", file=sys.stderr)
        return 2
    try:
        train(job)
    except KeyboardInterrupt:
        if first:
            print(
                f"megatron-real: interrupted; metrics and rollouts so far are in {config.trainer.run_dir}",
                file=sys.stderr,
            )
        return 130
    except (NonFinite, EngineFailed, SyncError, TooManyFailedChecks, RewardNeedsThreshold) as error:
        if first:
            print(f"megatron-real: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    leave_world()
    return 0
