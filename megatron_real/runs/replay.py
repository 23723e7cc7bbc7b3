"""Whether saved rollouts can be trained on again (rollout.replay), asked before anything starts.

    problem                            what happens
    no such directory, or a step is    refused
    missing
    another rollout.num_prompts        refused: the learning-rate schedule would count other updates
    another rollout.temperature        refused: log pi would be of another distribution than the one
                                       that was sampled from
    another batch.minibatch_prompts    the user is told: the schedule fits, but the updates are not
                                       those of the saved run

The module loads without torch.
"""

from __future__ import annotations

from pathlib import Path

from megatron_real.config import Config
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import read_minibatches


def check_replay(config: Config) -> list[str]:
    """Checks whether the replay that the configuration asks for can be made.

    Returns:
        What the user should know about it, a sentence each; nothing without rollout.replay.

    Raises:
        ValueError: it cannot be made; one sentence says why.
    """
    if not config.rollout.replay:
        return []

    saved = RunDirectory(config.rollout.replay)
    if not saved.path.is_dir():
        raise ValueError(
            f"rollout.replay = {saved.path} is no directory; give the directory of an earlier run"
        )

    steps = config.trainer.steps
    # All steps before the first one trains: a gap would end the run hours later.
    for step in range(1, steps + 1):
        if saved.saved_rollouts(step).exists():
            continue
        if step == 1:
            raise ValueError(
                f"rollout.replay = {saved.path} has no rollouts of step 1; give the directory of "
                "an earlier run that still has them"
            )

        raise ValueError(
            f"rollout.replay = {saved.path} has the rollouts of steps 1 to {step - 1}, but "
            f"trainer.steps is {steps}; set trainer.steps={step - 1} or less"
        )

    # The batch of a skipped update (dumps/) has no configuration to compare with.
    if saved.config.is_file():
        from omegaconf import OmegaConf

        before = OmegaConf.select(OmegaConf.load(saved.config), "rollout.temperature")
        temperature = config.rollout.temperature
        if before is not None and float(before) != temperature:
            raise ValueError(
                f"rollout.replay = {saved.path} was sampled at rollout.temperature = {before}, and "
                f"the log-probs of this run are taken at {temperature}; set "
                f"rollout.temperature={before}"
            )

    return _check_prompts(saved.saved_rollouts(1), config)


def _check_prompts(file: Path, config: Config) -> list[str]:
    """Compares the groups and updates of the first step with those of the configuration.

    Returns:
        What the user should know, a sentence each.

    Raises:
        ValueError: the number of groups is another.
    """
    updates = read_minibatches(file)
    num_prompts = len({group for group, _ in updates})
    if num_prompts != config.rollout.num_prompts:
        raise ValueError(
            f"{file} has the rollouts of {num_prompts} prompts, but rollout.num_prompts is "
            f"{config.rollout.num_prompts}, by which the learning-rate schedule counts updates; "
            f"set rollout.num_prompts={num_prompts}"
        )

    saved_size = len({group for group, update in updates if update == 1})
    size = config.batch.minibatch_prompts
    if saved_size in (0, size):  # 0: the rollouts were saved before they were trained on
        return []

    return [
        f"the saved run made its updates of {saved_size} prompts, this replay makes them of "
        f"{size}; set batch.minibatch_prompts={saved_size} for the same updates"
    ]
