"""`megatron-real train CONFIG.yaml [key.sub=value ...]`: trains, or goes on with a stopped run.

It runs by itself, with --nproc, or under torchrun or srun. The configuration is checked before
anything heavy is imported and, with --nproc, before any process is started.
"""

from __future__ import annotations

import argparse
import os

from megatron_real import config as configuration
from megatron_real.commands.arguments import add_overrides
from megatron_real.commands.terminal import input_checks, is_first_rank, say
from megatron_real.conversion.convert import check_model
from megatron_real.disk import is_full_disk
from megatron_real.errors import (
    DONE,
    INTERRUPTED,
    DiskFull,
    ExpectedEnd,
    Interrupted,
    NothingToDo,
    Refused,
)
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
    add_overrides(parser)
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
    with input_checks():
        config = _checked(options)
        for sentence in check_replay(config):
            say(sentence)
        if options.dry_run:
            from megatron_real.commands.dry_run import description

            if is_first_rank():
                print(description(config, options.nproc or _num_ranks_of_launcher()))
            return DONE

    # torchrun's or srun's process, or one by itself.
    if options.nproc is None:
        return _train(config)

    from megatron_real.launcher import launch

    say(f"starting {options.nproc} processes")
    # Each process loads the file itself and checks it again: only words are passed on.
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

    # On the parent too, where processes are started: it refuses once, and not on every rank.
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
    from megatron_real.supervision.stop import StopRequest

    # First of all: a signal may come while the rest is imported.
    stop = StopRequest(max_hours=config.trainer.max_hours)

    if is_first_rank():
        print("loading torch and megatron-core", flush=True)  # seconds of silence otherwise

    from megatron_real.job import build
    from megatron_real.loop import train
    from megatron_real.parallel.groups import leave_world
    from megatron_real.parallel.ranks import EveryRankError

    try:
        job = build(config, stop)
    except NothingToDo:
        # All ranks raise it together, so that they can leave together.
        leave_world()
        raise
    except ValueError as error:
        # Weights, data or layout do not fit: the input's fault, which this rank may be alone to
        # see.
        raise Refused(str(error), on_every_rank=isinstance(error, EveryRankError)) from error

    try:
        with job:
            train(job)
    except (Interrupted, KeyboardInterrupt) as end:
        say(f"interrupted; metrics and rollouts so far are in {config.trainer.run_dir}")
        if isinstance(end, Interrupted):
            raise
        # Ctrl-C came where not everything could be saved: the newest checkpoint counts.
        say(f"the same command goes on; {job.checkpoints.last_good()}")
        return INTERRUPTED
    except Exception as error:
        # A full disk comes in the words of many libraries.
        if isinstance(error, ExpectedEnd) or not is_full_disk(error):
            raise
        raise DiskFull(f"{error}; free space and start again") from error
    finally:
        # The launcher of a Slurm job repeats its signal every second until this process has ended.
        stop.ignore()

    leave_world()
    return DONE
