"""`megatron-real train CONFIG.yaml [key.sub=value ...]`: trains, or goes on with a stopped run.

It runs by itself, with --nproc, or under torchrun or srun. The configuration is checked before
anything heavy is imported and, with --nproc, before any process is started.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_real import config as configuration
from megatron_real.commands.terminal import INTERRUPTED, REFUSED, is_first_rank, refuse, say
from megatron_real.conversion.convert import check_model
from megatron_real.runs.replay import check_replay

SUMMARY = "train a policy, or go on with a run that was stopped"
EXAMPLES = """\
examples:
  megatron-real train examples/configs/quickstart.yaml --nproc 2
  megatron-real train my.yaml --nproc 8 parallel.tp=2 trainer.run_dir=runs/two
  megatron-real train my.yaml --nproc 8 --dry-run
  torchrun --nproc-per-node 8 -m megatron_real train my.yaml
  srun megatron-real train my.yaml

The same command on a run directory goes on where the run was stopped.

exit codes: 0 done, or nothing left to do; 1 the run failed; 2 the input was
refused; 75 stopped early with everything saved, start the same command again;
130 interrupted
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the command's arguments."""
    parser.add_argument("config", help="YAML file; see examples/configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="replaces a value of the file"
    )
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="processes to start on this machine, one for each GPU; default: this one alone",
    )

    parser.add_argument(
        "--dry-run", action="store_true", help="say what the run would do and need, and end"
    )


def run(options: argparse.Namespace) -> int:
    """Trains; returns the exit code."""
    try:
        config = _checked(options)
        for sentence in check_replay(config):
            say(sentence)
        if options.dry_run:
            from megatron_real.commands.dry_run import description

            if is_first_rank():
                print(description(config, options.nproc or _num_ranks_of_launcher()))
            return 0
    except ValueError as error:
        return refuse(error)

    if options.nproc is None:
        return _train(config)
    from megatron_real.launcher import launch

    say(f"starting {options.nproc} processes")
    words = ["train", options.config, *options.overrides]
    return launch(words, num_ranks=options.nproc, run_dir=config.trainer.run_dir)


def _num_ranks_of_launcher() -> int:
    """Returns how many processes torchrun or srun has started; 1 for a process by itself."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _checked(options: argparse.Namespace) -> configuration.Config:
    """Returns the configuration, with everything checked that can be checked without torch.

    Raises:
        ValueError: an option, the configuration or the model is refused.
    """
    # A run in this process, before, leaves a world of one.
    if options.nproc is not None and _num_ranks_of_launcher() > 1:
        raise ValueError(
            f"--nproc is {options.nproc}, but torchrun or srun has started this process as one of "
            f"{os.environ['WORLD_SIZE']}; leave --nproc out"
        )
    if options.nproc is not None and options.nproc < 1:
        raise ValueError(f"--nproc is {options.nproc}; it must be 1 or above")

    config = configuration.load(options.config, options.overrides)
    configuration.check_world(config, options.nproc or _num_ranks_of_launcher())
    if not config.trainer.run_dir:
        raise ValueError(
            "trainer.run_dir is empty; say where the run may write, for example "
            "trainer.run_dir=runs/first"
        )
    check_model(config.model.path, config.model.weights)
    return config


def _train(config: configuration.Config) -> int:
    """Trains in this process; returns the exit code."""
    from megatron_real.supervision import stop as stopping
    from megatron_real.supervision.stop import EXIT_AGAIN, Stopped, StopRequest

    # First of all: a signal may come while the rest is imported.
    stop = StopRequest(max_hours=config.trainer.max_hours)

    if is_first_rank():
        print("loading torch and megatron-core", flush=True)  # seconds of silence otherwise

    from megatron_real.checkpoint.saver import CheckpointFailed
    from megatron_real.disk import is_full_disk
    from megatron_real.job import build
    from megatron_real.labels import RewardNeedsThreshold, TooManyFailedChecks
    from megatron_real.loop import train
    from megatron_real.parallel.groups import leave_world
    from megatron_real.parallel.ranks import EveryRankError
    from megatron_real.rollout.engines.engine import EngineFailed
    from megatron_real.rollout.sync import SyncError
    from megatron_real.runs.claim import NothingToDo
    from megatron_real.supervision.ruin import NonFinite

    try:
        job = build(config, stop)
    except NothingToDo as sentence:
        say(sentence)
        leave_world()
        return 0
    except EveryRankError as error:
        say(error)
        return REFUSED
    except ValueError as error:
        # Weights, data or layout do not fit: the input's fault, which this rank may be alone to
        # see.
        print(f"megatron-real: {error}", file=sys.stderr)
        return REFUSED

    with job:
        try:
            train(job)
        except Stopped as stopped:
            if stop.reason == stopping.INTERRUPTED:
                say(f"interrupted; metrics and rollouts so far are in {config.trainer.run_dir}")
            say(stopped)
            job.reporter.say_status("stopped", str(stopped))
            if stop.reason == stopping.INTERRUPTED:
                return INTERRUPTED
            return EXIT_AGAIN
        except KeyboardInterrupt:
            say(f"interrupted; metrics and rollouts so far are in {config.trainer.run_dir}")
            say(f"the same command goes on; {job.checkpoints.last_good()}")
            job.reporter.say_status("stopped", "interrupted")
            job.lifeline.close("interrupted")
            return INTERRUPTED
        except (EngineFailed, SyncError) as error:  # every rank has it
            say(error)
            # An engine may be lost by accident: a script may start the same command again.
            job.reporter.say_status("crashed", str(error))
            job.lifeline.close(str(error))
            return 1
        except (
            NonFinite,
            CheckpointFailed,
            TooManyFailedChecks,
            RewardNeedsThreshold,
        ) as error:  # every rank has it
            say(error)
            diverged = isinstance(error, NonFinite)
            job.reporter.say_status("failed", str(error), diverged=diverged)
            job.lifeline.close(str(error))
            if isinstance(error, ValueError):
                return REFUSED
            return 1
        except Exception as error:
            # A full disk comes in the words of many libraries.
            if not is_full_disk(error):
                raise
            print(f"megatron-real: {error}; free space and start again", file=sys.stderr)
            job.lifeline.say_end(str(error))
            job.reporter.say_status("failed", str(error))
            return 1
    leave_world()
    return 0
