"""What a rehearsal of one rank has found, as records. Needs no torch: the command and the worker share them as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """One rank to rehearse."""

    config: str
    """Path of the configuration."""
    overrides: tuple[str, ...]
    """`key.sub=value` words."""
    gpus: int
    """GPUs that train."""
    rank: int
    """Global rank, below `gpus`."""
    gpu: str = "h100-80g"
    """Kind of GPU: a key of plan/devices.py."""
    micro_batches: int = 0
    """Micro-batches of the rehearsed update on each data-parallel rank; 0: as many as fill the pipeline, 3 at least."""


@dataclass(frozen=True)
class Collective:
    """Calls of one kind over one process group."""

    call: str
    """Such as all_reduce."""
    group: str
    """Megatron's name of the group."""
    ranks: int
    """Its size."""
    dtype: str
    """Such as bfloat16."""
    calls: int
    """How many."""
    num_bytes: int
    """Of this rank's inputs together."""


@dataclass(frozen=True)
class Phase:
    """One part of a step."""

    name: str
    """Such as gradient."""
    before: int
    """Bytes on the device when it began."""
    peak: int
    """The most at any time."""
    after: int
    """When it had ended."""
    flops: int
    """Of matrix products and attention."""
    kernels: int
    """Operations that launch one."""
    syncs: Mapping[str, int]
    """Where the host waits for the device: kind @ call site -> times."""
    syncs_in_layers: int
    """How many of these happened within a transformer layer."""
    collectives: tuple[Collective, ...]
    """What would have been sent."""
    holders: Mapping[str, int]
    """Line that allocated -> bytes held at the peak (within 1 % of it)."""
    pinned_host: int
    """Bytes of pinned host memory that it allocated, rounded up as torch's allocator does."""
    guesses: Mapping[str, int]
    """Where a value was asked for that only a GPU would know, and a constant was given -> times."""

    @property
    def num_syncs(self) -> int:
        """All of them."""
        return sum(self.syncs.values())


@dataclass(frozen=True)
class Group:
    """A process group that this rank is in."""

    name: str
    """Megatron's."""
    backend: str
    """nccl or gloo."""
    ranks: int
    """Its size."""
    timeout_minutes: float | None
    """None: the library's own."""


@dataclass(frozen=True)
class RankReport:
    """One rank."""

    rank: int
    """Global rank."""
    place: Mapping[str, int]
    """Its place in the layout: tp, pp, cp, dp ranks."""
    versions: Mapping[str, str]
    """Of torch and megatron-core, and the layers: te or local."""
    parameters: int = 0
    """Elements of this rank's parameters."""
    model_bytes: int = 0
    """Weights and gradient buffers."""
    resident: int = 0
    """With the optimizer's state: what stays between passes."""
    tokens: int = 0
    """Of each micro-batch on this rank."""
    micro_batches: int = 0
    """Of the update on this rank."""
    sequences: int = 0
    """In each micro-batch."""
    placement: str = ""
    """Where groups lie."""
    phases: tuple[Phase, ...] = ()
    """In order."""
    groups: tuple[Group, ...] = ()
    """Process groups."""
    fault: str = ""
    """Why the rehearsal ended early, with the line; empty where it did not."""
    skipped: tuple[str, ...] = ()
    """Parts that this layout would do and one rank alone cannot."""
    seconds: float = 0.0
    """Of the rehearsal itself."""
    plan: Mapping[str, int] = field(default_factory=dict)
    """`plan`'s figures for the same rank, in bytes."""

    def phase(self, name: str) -> Phase:
        """The phase of that name."""
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of a step: of the rehearsed parts, and of the engine beside them by `plan`."""
        beside = 0 if self.plan.get("engine_sleeps", 1) else self.plan.get("engine", 0)
        parts = max((phase.peak for phase in self.phases), default=0) + beside
        return max(parts, self.resident + self.plan.get("engine", 0))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RankReport:
        """The inverse of `to_json`."""
        phases = tuple(
            Phase(**{**phase, "collectives": tuple(Collective(**c) for c in phase["collectives"])})
            for phase in values["phases"]
        )
        groups = tuple(Group(**group) for group in values["groups"])
        rest = {"phases": phases, "groups": groups, "skipped": tuple(values["skipped"])}
        return cls(**{**values, **rest})
