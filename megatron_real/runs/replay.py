"""Whether saved rollouts can be trained on again (rollout.replay), asked before anything starts.

    problem                                   what happens
    no such directory, or a step is missing   refused
    another rollout.num_prompts               refused: the learning-rate schedule would count other updates
    another rollout.temperature               refused: log pi would be of another distribution than was sampled
    another batch.minibatch_prompts           said: the schedule fits, but the updates are not those of the saved run

Loadable without torch.
"""

from __future__ import annotations

from pathlib import Path

from megatron_real.config import Config
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.rollouts import read_minibatches


def check_replay(config: Config) -> list[str]:
    """What is worth knowing about a replay that can be made, a sentence each; nothing without rollout.replay.

    Raises:
        ValueError: it cannot be made; one sentence.
    """
    if not config.rollout.replay:
        return []
    saved = RunDirectory(config.rollout.replay)
    if not saved.path.is_dir():
        raise ValueError(
            f"rollout.replay = {saved.path} is no directory; give the directory of an earlier run"
        )
    _check_steps(saved, config.trainer.steps)
    _check_temperature(saved, config.rollout.temperature)
    return _check_prompts(saved.saved_rollouts(1), config)


def _check_steps(saved: RunDirectory, steps: int) -> None:
    missing = next((n for n in range(1, steps + 1) if not saved.saved_rollouts(n).exists()), None)
    if missing is None:
        return
    if missing == 1:
        raise ValueError(
            f"rollout.replay = {saved.path} has no rollouts of step 1; give the directory of an earlier run that "
            "still has them"
        )
    raise ValueError(
        f"rollout.replay = {saved.path} has the rollouts of steps 1 to {missing - 1}, but trainer.steps is {steps}; "
        f"set trainer.steps={missing - 1} or less"
    )


def _check_temperature(saved: RunDirectory, temperature: float) -> None:
    """A batch that was kept for a look (dumps/) has no configuration, and nothing to compare with."""
    if not saved.config.is_file():
        return
    from omegaconf import OmegaConf

    before = OmegaConf.select(OmegaConf.load(saved.config), "rollout.temperature")
    if before is not None and float(before) != temperature:
        raise ValueError(
            f"rollout.replay = {saved.path} was sampled at rollout.temperature = {before}, and the log-probs of this "
            f"run are taken at {temperature}; set rollout.temperature={before}"
        )


def _check_prompts(file: Path, config: Config) -> list[str]:
    """Compares the groups of the first step, and its updates, with those of the configuration."""
    updates = read_minibatches(file)
    num_prompts = len({group for group, _ in updates})
    if num_prompts != config.rollout.num_prompts:
        raise ValueError(
            f"{file} has the rollouts of {num_prompts} prompts, but rollout.num_prompts is "
            f"{config.rollout.num_prompts}, by which the learning-rate schedule counts updates; set "
            f"rollout.num_prompts={num_prompts}"
        )
    minibatch = len({group for group, update in updates if update == 1})
    now = config.batch.minibatch_prompts
    if minibatch in (0, now):  # 0: the rollouts were saved before they were trained on
        return []
    return [
        f"the saved run made its updates of {minibatch} prompts, this replay makes them of {now}; "
        f"set batch.minibatch_prompts={minibatch} for the same updates"
    ]
