"""The command line.

    megatron-real train CONFIG.yaml [key.sub=value ...]      by itself, or under torchrun or srun
    megatron-real eval CONFIG.yaml|HF_DIR --bench NAME=FILE ... [key.sub=value ...]      likewise
    megatron-real serve CONFIG.yaml [key.sub=value ...]      vLLM for a run on other machines
    megatron-real doctor [--run-dir DIR]      by itself, or under torchrun or srun
    megatron-real plan CONFIG.yaml --gpus N --gpu h100-80g [key.sub=value ...]
    megatron-real convert to-megatron | to-hf | verify | inspect ...

A wrong configuration is refused before anything heavy is imported, in one sentence.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from megatron_real import benchmark_command, convert, serve
from megatron_real import config as configuration
from megatron_real.doctor import command as doctor_command
from megatron_real.plan import command as plan_command
from megatron_real.weights.architecture import Architecture

logger = logging.getLogger("megatron_real")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0 done, 1 the run failed, 2 the input was refused, 75 stopped early with everything saved (start
        the same command again), 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="megatron-real", description="REAL (Rewards as Labels) on Megatron-LM.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a policy", description="Trains a policy by REAL.")
    train.add_argument("config", help="YAML file; see examples/configs/")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file")
    convert.add_commands(commands)
    benchmark_command.add_command(commands)
    serve.add_command(commands)
    doctor_command.add_command(commands)
    plan_command.add_command(commands)
    chosen, later = parser.parse_known_args(arguments)
    if later and (not hasattr(chosen, "overrides") or any(word.startswith("-") for word in later)):
        parser.error(f"unrecognized arguments: {' '.join(later)}")
    if later:
        chosen.overrides += later  # argparse itself takes them only before the options
    first = os.environ.get("RANK", "0") == "0"
    _quiet(first)
    if chosen.command == "convert":
        return convert.run(chosen)
    if chosen.command == "doctor":
        return doctor_command.run(chosen)
    if chosen.command == "plan":
        return plan_command.run(chosen)
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
    from megatron_real.runs.stop import EXIT_AGAIN, Stopped, StopRequest

    stop = StopRequest(max_hours=config.trainer.max_hours)  # first: a signal may come while the rest is imported
    from megatron_real.job import build
    from megatron_real.labels import RewardNeedsThreshold, TooManyFailedChecks
    from megatron_real.loop import NonFinite, train
    from megatron_real.policy.layout import leave_world
    from megatron_real.rollout.engine import EngineFailed
    from megatron_real.rollout.sync import SyncError
    from megatron_real.runs.checkpoint import CheckpointFailed
    from megatron_real.runs.ranks import EveryRankError

    def say(sentence: object) -> None:
        if first:
            print(f"megatron-real: {sentence}", file=sys.stderr)

    try:
        job = build(config, stop)
    except EveryRankError as error:
        say(error)
        return 2
    except ValueError as error:  # weights, data or layout do not fit: the input's fault, said in one sentence
        print(f"megatron-real: {error}", file=sys.stderr)
        return 2
    with job:
        try:
            train(job)
        except Stopped as stopped:
            say(stopped)
            job.reporter.say_status("stopped", str(stopped))
            return EXIT_AGAIN
        except KeyboardInterrupt:
            say(f"interrupted; metrics and rollouts so far are in {config.trainer.run_dir}")
            job.reporter.say_status("stopped", "interrupted")
            return 130
        except (EngineFailed, SyncError) as error:  # every rank has it
            say(error)
            # An engine may be lost by accident: a script may start the same command again.
            job.reporter.say_status("crashed", str(error))
            return 1
        except (NonFinite, CheckpointFailed, TooManyFailedChecks, RewardNeedsThreshold) as error:  # every rank has it
            say(error)
            job.reporter.say_status("failed", str(error))
            return 2 if isinstance(error, ValueError) else 1
        except OSError as error:  # this rank has it
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            print(f"megatron-real: {error}", file=sys.stderr)
            job.lifeline.say_end(str(error))
            job.reporter.say_status("failed", str(error))
            return 1
    leave_world()
    return 0
