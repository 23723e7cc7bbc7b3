"""Every layout that a model and a number of GPUs allow, with its memory and its time, ranked."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from megatron_real.config import Config, ParallelConfig
from megatron_real.plan.devices import GPUS_PER_NODE
from megatron_real.plan.memory import Shapes, StageMemory, engine_memory, stage_memory
from megatron_real.plan.speed import PlannedRun, StepTime, step_time

# Share of a device that no plan may use: CUDA context, NCCL's and cuBLAS' buffers, fragmentation of
# the allocator.
RESERVE_SHARE = 0.08

Recompute = Literal["none", "selective", "full"]

_ENGINE_SIZES = (1, 2, 4, 8)  # GPUs of one engine, all within a node

_DISTINCT = 0.03  # relative difference of times that the ranking takes seriously


@dataclass(frozen=True)
class Estimate:
    """What one run needs."""

    run: PlannedRun
    """Model, configuration and cluster."""

    @cached_property
    def stages(self) -> list[StageMemory]:
        """Memory of a rank of each pipeline stage."""
        layers: Literal["te", "local"] = "te"
        if self.run.config.model.layers == "local":
            layers = "local"
        shapes = Shapes(self.run.micro_batches, layers)
        return stage_memory(self.run.architecture, self.run.config, dp=self.run.dp, shapes=shapes)

    @cached_property
    def server(self) -> dict[str, int]:
        """Memory of an engine on a GPU that serves; empty where none does."""
        if not self.run.server_gpus:
            return {}
        return engine_memory(self.run.architecture, self.run.config)

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
        """Whether no GPU runs out of memory."""
        return max(self.peak, sum(self.server.values())) <= self.budget

    @property
    def hours(self) -> float:
        """Hours of all steps."""
        return self.seconds.total * self.run.config.trainer.steps / 3600

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of all steps, on the GPUs that train and those that serve."""
        return self.hours * (self.run.cluster.gpus + self.run.server_gpus)

    @property
    def usd(self) -> float:
        """Cost of all steps."""
        return self.gpu_hours * self.run.cluster.device.usd_per_hour

    @property
    def name(self) -> str:
        """The layout as words for the command line, and what they leave for data parallelism."""
        parallel = self.run.config.parallel
        settings = [
            f"{axis}={n}"
            for axis in ("tp", "pp", "vpp", "cp")
            if (n := getattr(parallel, axis)) > 1
        ]
        if parallel.sp:
            settings.append("sp")
        return " ".join([*settings, f"dp={self.run.dp}"])

    @property
    def pieces(self) -> int:
        """How many pieces a copy of the model is cut into: of two layouts, fewer are simpler."""
        parallel = self.run.config.parallel
        return parallel.tp * parallel.pp * parallel.cp * parallel.vpp


def ranked(run: PlannedRun) -> list[Estimate]:
    """Returns all layouts that fit, the fastest first.

    Each has its fastest recomputation. There, times that differ by less than the estimates can tell
    count as equal, and the one with more room is taken.

    Engines have the configured size (rollout.tp), and in the training processes 1 GPU as well.
    Where nothing fits so, the other sizes are tried: the default of 1 GPU must not hide that a
    large model trains with engines of 4.
    """
    configured = {run.config.rollout.tp}
    if not run.server_gpus:
        configured.add(1)
    return _fitting(run, configured) or _fitting(run, set(_ENGINE_SIZES) - configured)


def _fitting(run: PlannedRun, engine_sizes: Iterable[int]) -> list[Estimate]:
    """Returns the layouts that fit with engines of these numbers of GPUs, the fastest first."""
    best: dict[ParallelConfig, Estimate] = {}
    for config in _layouts(run, engine_sizes):
        estimate = Estimate(dataclasses.replace(run, config=config))
        known = best.get(config.parallel)
        if estimate.fits and (known is None or _order(estimate) < _order(known)):
            best[config.parallel] = estimate

    # By the seconds that a ranking shows: a reader must see why one is above the other.
    return sorted(best.values(), key=lambda e: (told_apart(e.seconds.total), e.pieces, e.peak))


def told_apart(seconds: float) -> float:
    """Returns seconds as exactly as estimates tell them apart.

    That is to two significant digits, in halves of the second one below 2.
    """
    if seconds <= 0:
        return 0.0
    # The power of ten of the second significant digit.
    digit = math.floor(math.log10(seconds)) - 1
    halves = 1
    if seconds < 20 * 10.0**digit:
        halves = 2
    return round(round(seconds / 10.0**digit * halves) / halves * 10.0**digit, 1 - digit)


def _order(estimate: Estimate) -> tuple[int, int, int]:
    # In steps of the logarithm, so that times within a few percent count as equal.
    time = round(math.log(estimate.seconds.total) / _DISTINCT)
    return time, estimate.pieces, estimate.peak


def _layouts(run: PlannedRun, engine_sizes: Iterable[int]) -> Iterator[Config]:
    """Yields the configuration under every layout that divides model, batch and GPUs.

    Of the engines' sizes those are left out that cannot cut the model or, in the training
    processes, share the GPUs.
    """
    config = run.config
    a = run.architecture
    sizes = [
        tp
        for tp in sorted(engine_sizes)
        if a.num_heads % tp == 0
        and a.can_cut_kv_heads(tp)
        and (run.server_gpus or run.cluster.gpus % tp == 0)
    ]
    recomputations: tuple[Recompute, ...] = ("none", "selective", "full")
    # Made once: a record checks its bounds whenever it is made.
    models = [dataclasses.replace(config.model, recompute=name) for name in recomputations]
    rollouts = [dataclasses.replace(config.rollout, tp=tp) for tp in sizes]
    for parallel, model, rollout in itertools.product(_parallels(run), models, rollouts):
        yield dataclasses.replace(config, parallel=parallel, model=model, rollout=rollout)


def _parallels(run: PlannedRun) -> Iterator[ParallelConfig]:
    """Yields the layouts that divide model, batch and GPUs.

    Tensor and context parallelism stay within a node, the former with sequence parallelism.
    """
    a = run.architecture
    gpus = run.cluster.gpus
    for tp, pp, vpp, cp in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16), (1, 2), (1, 2, 4)):
        ranks = tp * pp * cp
        within = (
            tp * cp <= GPUS_PER_NODE
            and gpus % ranks == 0
            and gpus // ranks <= run.rollouts // run.config.updates_per_step
        )
        divides = not (a.num_heads % tp or a.ffn_size % tp or a.num_layers % (pp * vpp))
        divides = divides and a.can_cut_kv_heads(tp)
        if within and divides and (pp > 1 or vpp == 1):
            yield ParallelConfig(tp=tp, pp=pp, vpp=vpp, cp=cp, sp=tp > 1)
