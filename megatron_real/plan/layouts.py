"""Every layout that a model and a number of GPUs allow, with its memory and its time, ranked."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_real.config import Config, ParallelConfig
from megatron_real.plan.devices import GPUS_PER_NODE
from megatron_real.plan.memory import Shapes, StageMemory, engine_memory, stage_memory
from megatron_real.plan.speed import Run, StepTime, step_time

# Share of a device that no plan may use: CUDA context, NCCL's and cuBLAS' buffers, fragmentation of the allocator.
RESERVE_SHARE = 0.08

Recompute = Literal["none", "selective", "full"]

_DISTINCT = 0.03  # relative difference of times that the ranking takes seriously


@dataclass(frozen=True)
class Estimate:
    """What one run needs."""

    run: Run
    """Model, configuration and cluster."""

    @cached_property
    def stages(self) -> list[StageMemory]:
        """Memory of a rank of each pipeline stage."""
        shapes = Shapes(self.run.micro_batches, "local" if self.run.config.model.layers == "local" else "te")
        return stage_memory(self.run.architecture, self.run.config, dp=self.run.dp, shapes=shapes)

    @cached_property
    def server(self) -> dict[str, int]:
        """Memory of an engine on a GPU that serves; empty where none does."""
        return engine_memory(self.run.architecture, self.run.config) if self.run.server_gpus else {}

    @cached_property
    def seconds(self) -> StepTime:
        """Time of a step."""
        return step_time(self.run)

    @property
    def peak(self) -> int:
        """Bytes in use at the worst moment on the fullest GPU that trains."""
        return max(stage.peak for stage in self.stages)

    @property
    def budget(self) -> int:
        """Bytes that a plan may use of a device."""
        return int(self.run.cluster.device.memory_gib * 2**30 * (1 - RESERVE_SHARE))

    @property
    def fits(self) -> bool:
        """It runs without running out of memory."""
        return max(self.peak, sum(self.server.values())) <= self.budget

    @property
    def hours(self) -> float:
        """Of all steps."""
        return self.seconds.total * self.run.config.trainer.steps / 3600

    @property
    def gpu_hours(self) -> float:
        """Of all steps, on the GPUs that train and those that serve."""
        return self.hours * (self.run.cluster.gpus + self.run.server_gpus)

    @property
    def usd(self) -> float:
        """Cost of all steps."""
        return self.gpu_hours * self.run.cluster.device.usd_per_hour

    @property
    def name(self) -> str:
        """The layout as words for the command line, and what they leave for data parallelism."""
        parallel = self.run.config.parallel
        words = [f"{axis}={n}" for axis in ("tp", "pp", "vpp", "cp") if (n := getattr(parallel, axis)) > 1]
        return " ".join([*words, *(["sp"] if parallel.sp else []), f"dp={self.run.dp}"])


def ranked(run: Run) -> list[Estimate]:
    """All layouts that fit, the fastest first, each with its fastest recomputation. Times that differ by less than the
    estimates can tell count as equal: the simpler layout comes first, then the one with more room."""
    best: dict[ParallelConfig, Estimate] = {}
    for config in _layouts(run):
        made = Estimate(dataclasses.replace(run, config=config))
        known = best.get(config.parallel)
        if made.fits and (known is None or _order(made) < _order(known)):
            best[config.parallel] = made
    return sorted(best.values(), key=_order)


def _order(made: Estimate) -> tuple[int, int, int]:
    parallel = made.run.config.parallel
    pieces = parallel.tp * parallel.pp * parallel.cp * parallel.vpp
    return round(math.log(made.seconds.total) / _DISTINCT), pieces, made.peak


def _layouts(run: Run) -> Iterator[Config]:
    """The configuration under every layout that divides model, batch and GPUs. Tensor and context parallelism stay
    within a node, the former with sequence parallelism; engines take one GPU or the configuration's rollout.tp, servers
    the latter."""
    config, configured = run.config, run.config.rollout.tp
    engine_sizes = {configured} if run.server_gpus else sorted({1, configured})
    recomputations: tuple[Recompute, ...] = ("none", "selective", "full")
    for parallel, recompute, engine_tp in itertools.product(_parallels(run), recomputations, engine_sizes):
        yield dataclasses.replace(
            config,
            parallel=parallel,
            model=dataclasses.replace(config.model, recompute=recompute),
            rollout=dataclasses.replace(config.rollout, tp=engine_tp),
        )


def _parallels(run: Run) -> Iterator[ParallelConfig]:
    a, gpus = run.architecture, run.cluster.gpus
    for tp, pp, vpp, cp in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2), (1, 2, 4)):
        ranks = tp * pp * cp
        within = tp * cp <= GPUS_PER_NODE and gpus % ranks == 0 and gpus // ranks <= run.rollouts // run.updates
        divides = not (a.num_heads % tp or a.ffn_size % tp or a.num_layers % (pp * vpp))
        if within and divides and (pp > 1 or vpp == 1):
            yield ParallelConfig(tp=tp, pp=pp, vpp=vpp, cp=cp, sp=tp > 1)
