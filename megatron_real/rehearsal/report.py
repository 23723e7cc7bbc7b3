"""Holds what a rehearsal of one rank has found, as records.

The command and the worker share them as JSON; this module needs no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """One rank to rehearse."""

    config: str
    """Path of the configuration file."""
    overrides: tuple[str, ...]
    """Settings that replace the file's, as `key.sub=value`."""
    gpus: int
    """GPUs that train."""
    rank: int
    """Global rank, below `gpus`."""
    gpu: str = "h100-80g"
    """Kind of GPU: a key of plan/devices.py."""
    micro_batches: int = 0
    """Micro-batches of the rehearsed update on each data-parallel rank; 0: as many as fill the
    pipeline, 3 at least."""


@dataclass(frozen=True)
class Collective:
    """Calls of one kind over one process group."""

    call: str
    """Name of the call, such as all_reduce."""
    group: str
    """Megatron's name of the group."""
    ranks: int
    """Size of the group."""
    dtype: str
    """dtype of the first tensor, such as bfloat16; `object` of what is pickled."""
    calls: int
    """Number of the calls."""
    num_bytes: int
    """Bytes of the first tensor of each call, all calls together."""


@dataclass(frozen=True)
class Phase:
    """One part of a step."""

    name: str
    """Name of the part, such as gradient."""
    before: int
    """Bytes on the device when it began."""
    peak: int
    """The most bytes on the device at any time."""
    after: int
    """Bytes on the device when it had ended."""
    flops: int
    """FLOPs of matrix products and attention."""
    kernels: int
    """Number of operations that launch a kernel."""
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
        """Returns how often the host waits for the device."""
        return sum(self.syncs.values())


@dataclass(frozen=True)
class Group:
    """A process group that this rank is in."""

    name: str
    """Megatron's name of the group."""
    backend: str
    """nccl or gloo."""
    ranks: int
    """Size of the group."""
    timeout_minutes: float | None
    """Minutes until a call on it fails; None: torch's default."""


@dataclass(frozen=True)
class RankReport:
    """What one rank needs, or what broke."""

    rank: int
    """Global rank."""
    place: Mapping[str, int]
    """Its place in the layout: tp, pp, cp, dp ranks."""
    versions: Mapping[str, str]
    """Versions of torch and megatron-core, and the layers: te or local."""
    parameters: int = 0
    """Elements of this rank's parameters."""
    model_bytes: int = 0
    """Bytes of weights and gradient buffers."""
    resident: int = 0
    """Bytes that stay between passes: those and the optimizer's state."""
    tokens: int = 0
    """Tokens of each micro-batch on this rank."""
    micro_batches: int = 0
    """Micro-batches of the update on this rank."""
    sequences: int = 0
    """Sequences in each micro-batch."""
    placement: str = ""
    """Where the rollouts of a group lie: intact, dp or split."""
    phases: tuple[Phase, ...] = ()
    """The parts of the step, in order."""
    groups: tuple[Group, ...] = ()
    """The process groups that this rank is in."""
    fault: str = ""
    """Why the rehearsal ended early, with the line; empty where it did not."""
    skipped: tuple[str, ...] = ()
    """Parts that this layout would do and one rank alone cannot."""
    seconds: float = 0.0
    """Seconds that the rehearsal itself took."""
    plan: Mapping[str, int] = field(default_factory=dict)
    """`plan`'s figures for the same rank, in bytes."""

    def phase(self, name: str) -> Phase:
        """Returns the phase of that name."""
        return next(phase for phase in self.phases if phase.name == name)

    @property
    def peak(self) -> int:
        """Returns the bytes at the worst moment of a step.

        They are those of the rehearsed parts, and of the engine beside them as `plan` has them.
        """
        # An engine that does not sleep keeps its memory during all parts.
        beside = 0 if self.plan.get("engine_sleeps", 1) else self.plan.get("engine", 0)
        parts = max((phase.peak for phase in self.phases), default=0) + beside
        # While it generates, it has the device with what stays between passes.
        return max(parts, self.resident + self.plan.get("engine", 0))

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain values, which JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RankReport:
        """Returns the report that `to_json` has made plain."""
        phases = tuple(
            Phase(**{**phase, "collectives": tuple(Collective(**c) for c in phase["collectives"])})
            for phase in values["phases"]
        )
        groups = tuple(Group(**group) for group in values["groups"])
        rest = {"phases": phases, "groups": groups, "skipped": tuple(values["skipped"])}
        return cls(**{**values, **rest})
