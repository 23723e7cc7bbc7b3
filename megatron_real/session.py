"""A training run from Python: the run that `megatron-real train` starts, in this process.

    config = megatron_real.load_config("my.yaml", ["trainer.steps=5", "trainer.run_dir=runs/first"])
    run = megatron_real.train(config)

One process trains by itself; a script that torchrun or srun starts may call `train` on every rank.
Runs may follow each other in one process: each makes its process groups anew and leaves nothing
behind but its directory.

Loadable without torch: a wrong configuration is refused before anything heavy is imported.
"""

from __future__ import annotations

import logging
import os
import warnings
from contextlib import closing

from megatron_real.config import Config, check_world
from megatron_real.conversion.convert import check_model
from megatron_real.errors import NothingToDo, Stopped
from megatron_real.runs.quiet import quiet_libraries
from megatron_real.runs.replay import check_replay
from megatron_real.runs.run_records import RunRecords
from megatron_real.supervision import stop as stopping
from megatron_real.supervision.stop import StopRequest

logger = logging.getLogger(__name__)


def train(config: Config) -> RunRecords:
    """Trains a policy, or goes on with the run in `config.trainer.run_dir` where it was stopped.

    Progress goes to standard output. While it trains, Ctrl-C saves at the next seam, as it does on
    the command line; afterwards signals are heard as before.

    Args:
        config: of `load_config`, or built from the dataclasses of megatron_real.config.

    Returns:
        The records of the run. A run that was stopped early (by a signal, or by trainer.max_hours)
        has the state `stopped`; the same call goes on with it. A finished run is left as it is.

    Raises:
        ValueError: the configuration, the weights or the data are refused; nothing was written.
        KeyboardInterrupt: Ctrl-C. What was saved is not lost, the same call goes on.
    """
    if not config.trainer.run_dir:
        raise ValueError(
            "trainer.run_dir is empty; say where the run may write, for example "
            "trainer.run_dir=runs/first"
        )

    # Before torch is imported: how many processes there are is the launcher's word.
    check_world(config, int(os.environ.get("WORLD_SIZE", "1")))
    check_model(config.model.path, config.model.weights)
    for sentence in check_replay(config):
        logger.warning(sentence)

    with closing(StopRequest(max_hours=config.trainer.max_hours)) as stop:
        # The caller's own filters come back after the run.
        with warnings.catch_warnings():
            quiet_libraries()
            _run(config, stop)
        if stop.reason == stopping.INTERRUPTED:
            # What a caller expects of Ctrl-C, once everything is saved.
            raise KeyboardInterrupt

    return RunRecords(config.trainer.run_dir)


def _run(config: Config, stop: StopRequest) -> None:
    # Here, because they need torch.
    import torch.distributed as dist

    from megatron_real import loop
    from megatron_real.job import build
    from megatron_real.parallel.groups import leave_world
    from megatron_real.policy.model import release_models
    from megatron_real.rollout import close_engines

    try:
        with build(config, stop) as job:
            loop.train(job)
    except NothingToDo as sentence:
        logger.warning(sentence)
    except Stopped:
        pass  # status.json says why
    finally:
        # So that another run may begin. Not with several ranks: one that fails cannot wait for the
        # others, which learn of it by the lifeline.
        if dist.is_initialized() and dist.get_world_size() == 1:
            close_engines()
            leave_world()
            release_models()
