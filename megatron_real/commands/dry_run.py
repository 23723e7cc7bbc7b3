"""`megatron-real train --dry-run`: what a run would do, where, and what it needs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from megatron_real.commands.terminal import hanging
from megatron_real.config import Config, check_world, to_plain
from megatron_real.plan.memory import Shapes, StageMemory, stage_memory
from megatron_real.runs.changes import check_changes
from megatron_real.runs.claim import Earlier
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.disk_needs import disk_needs
from megatron_real.runs.saved import saved
from megatron_real.weights.architecture import Architecture


def description(config: Config, num_ranks: int) -> str:
    """Returns the lines that are shown.

    Raises:
        ValueError: the run directory is another run's, or a setting changed that may not.
    """
    architecture = Architecture.read(config.model.path)
    dp = check_world(config, num_ranks)
    rollout = config.rollout
    parallel = config.parallel
    updates = config.updates_per_step
    files = [file for file in (config.data.train, config.data.heldout) if file]

    needs = disk_needs(config, architecture)
    # The run directory is not there yet; its disk is that of the nearest folder that is.
    folder = Path(config.trainer.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free

    rows = {
        "run": _beginning(config),
        "model": (
            f"{config.model.path}, {architecture.num_parameters:,} parameters, in "
            f"{config.model.dtype}"
        ),
        "processes": f"{num_ranks}: tp {parallel.tp}, pp {parallel.pp}, cp {parallel.cp}, dp {dp}",
        "data": ", ".join(files) or "-",
        "a step": (
            f"{rollout.num_prompts} prompts x {rollout.group_size} rollouts by {rollout.engine}, "
            f"{updates} updates of {config.objective.name}"
        ),
        "steps": f"{config.trainer.steps}",
        "memory": _memory(config, architecture, dp),
        "disk": f"up to {_gib(needs.total)} GiB; {_gib(free)} GiB are free",
        "time": "`megatron-real plan` estimates it for GPUs; a run says it after its first steps",
    }

    # Ten columns for the names: later lines of a text begin below its first.
    return "\n".join(hanging(f"{name:<10} {text}", 11) for name, text in rows.items())


def _beginning(config: Config) -> str:
    """Returns what would become of the run directory."""
    directory = RunDirectory(config.trainer.run_dir)
    earlier = Earlier.read(directory)
    if earlier.config is None:
        return f"{directory.path}, new"

    # The milder check: whether the checkpoint is one within a step is seen when it is loaded.
    changed = check_changes(earlier.config, to_plain(config), within_a_step=False)

    position = "the start"
    for checkpoint in saved(directory.checkpoints):  # the newest first
        if not checkpoint.incomplete():
            position = str(checkpoint.position)
            break

    text = f"{directory.path}, goes on from {position}"
    if changed:
        text += f"; changed: {'; '.join(changed)}"
    return text


def _memory(config: Config, architecture: Architecture, dp: int) -> str:
    """Returns the memory of the process with the most to hold, its rollout engine aside."""

    def training_bytes(stage: StageMemory) -> int:
        resident = stage.resident
        return resident.weights + resident.gradients + resident.optimizer + stage.update.total

    # auto counts as te, which a machine with GPUs should have.
    layers: Literal["te", "local"] = "te"
    if config.model.layers == "local":
        layers = "local"
    # One micro-batch: the least that a step can have in flight.
    stages = stage_memory(architecture, config, dp=dp, shapes=Shapes(1, layers))
    fullest = max(stages, key=training_bytes)

    return (
        f"{_gib(training_bytes(fullest))} GiB a process in training: "
        f"weights {_gib(fullest.resident.weights)}, "
        f"gradients {_gib(fullest.resident.gradients)}, "
        f"optimizer {_gib(fullest.resident.optimizer)}, "
        f"activations {_gib(fullest.update.total)}"
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"
