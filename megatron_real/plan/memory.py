"""Bytes on each rank, without building anything.

They follow from what Megatron shards where, and from what a pass keeps for its backward.

Every rank of a pipeline stage holds the same amount, so the answer is one column per stage.
Weights, gradients and optimizer states are exact but for the padding of buckets. Activations are
what autograd saves in one layer, term by term as the modules of policy/layers.py (or
TransformerEngine's) make it, times the layers and micro-batches that the schedule has in flight,
plus what the costliest moment needs on top. tests/distributed/test_plan_memory.py holds both
against the allocations of real models.

Letters as in the rest of the project: T packed tokens of a micro-batch, H hidden size, F width of
the MLP, V rows of the vocabulary, D head size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_real.buffers import LOGITS_CHUNK_BYTES, SYNC_BUCKET_BYTES
from megatron_real.config import Config, ParallelConfig
from megatron_real.config.engines import has_own_processes
from megatron_real.numerics import DTYPE_BYTES
from megatron_real.weights.architecture import Architecture
from megatron_real.weights.mapping import (
    EMBEDDING,
    FINAL_NORM,
    LAYERS,
    OUTPUT,
    Coordinates,
    entries,
)

MODELLED = frozenset({"grad_reduce_in_fp32", "bias_activation_fusion", "apply_rope_fusion"})
"""Fields of `megatron.*` that the estimates follow."""

# What a vLLM engine takes beside weights and KV cache: activations of its largest batch of 8192
# prompt tokens, CUDA graphs and sampler buffers. vLLM prints its own figure at the start.
ENGINE_OVERHEAD = 3 << 30

# Of that, what sleep mode keeps: it gives back weights and KV cache
# (vllm/device_allocator/cumem.py), and torch's cache goes with the sampler's; CUDA graphs and the
# workspaces of cuBLAS and attention stay.
ENGINE_ASLEEP = 1 << 30


@dataclass(frozen=True)
class Resident:
    """Bytes of one rank that stay for the whole run."""

    parameters: int
    """Numbers, not bytes: elements of this rank's shard."""
    weights: int
    """Model parameters in model.dtype."""
    gradients: int
    """Megatron's gradient buffers: fp32 for a bf16 model."""
    optimizer: int
    """Adam's moments and, for a bf16 model, the fp32 weights: over data- and context-parallel ranks
    if distributed."""

    @property
    def total(self) -> int:
        """All bytes."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Activations:
    """Bytes of one rank at the peak of a pass."""

    saved: int
    """For the backward pass, over all layers and micro-batches in flight."""
    head: int
    """Log-prob head: chunks of logits, and in backward the weight's and the hidden states'
    gradients."""
    layer: int
    """The layer that is being computed, beyond what it saves."""

    @property
    def total(self) -> int:
        """At the peak: head and layer do not work at the same time."""
        return self.saved + max(self.head, self.layer)


@dataclass(frozen=True)
class StageMemory:
    """One rank of one pipeline stage, in every part of a step."""

    stage: int
    """Pipeline stage, from 0."""
    layers: int
    """Transformer layers on it."""
    resident: Resident
    """What stays."""
    update: Activations
    """Forward and backward of an update."""
    old_logprobs: Activations
    """A pass without backward."""
    engine: Mapping[str, int]
    """The rollout engine on the same GPU: `weights`, `kv_cache`, `overhead`; nothing where there is
    none."""
    sync: int
    """What a weight sync holds beside both models: a tensor, and for servers a bucket."""
    engine_sleeps: bool
    """The engine gives its memory back while the policy trains."""
    scores_beside_engine: bool
    """A pass without backward runs while the engine is awake: rollout.exclude_mismatch."""

    @property
    def peaks(self) -> dict[str, int]:
        """Part of the step -> bytes in use at its peak."""
        engine = sum(self.engine.values())
        kept = engine
        if self.engine and self.engine_sleeps:
            kept = ENGINE_ASLEEP
        beside = 0
        if self.scores_beside_engine:
            beside = self.old_logprobs.total
        return {
            "sync": self.resident.total + self.engine.get("weights", 0) + self.sync,
            "rollout": self.resident.total + engine + beside,
            "old_logprobs": self.resident.total + kept + self.old_logprobs.total,
            "update": self.resident.total + kept + self.update.total,
        }

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of a step."""
        return max(self.peaks.values())


@dataclass(frozen=True)
class Shapes:
    """What an estimate of activations needs to know of a run beside its configuration."""

    micro_batches: int
    """Micro-batches of an update on one data-parallel rank: bounds how many are in flight."""
    layers: Literal["te", "local"] = "te"
    """TransformerEngine's layers, as on a GPU, or our own on torch."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Decides the chunk of the log-prob head."""


def stage_memory(
    architecture: Architecture, config: Config, *, dp: int, shapes: Shapes
) -> list[StageMemory]:
    """Returns the memory of one rank of each pipeline stage."""
    # Without an engine on the training GPUs: none at all, or in processes of its own.
    alone = config.rollout.replay or has_own_processes(config.rollout.engine)
    stages = []
    for stage in range(config.parallel.pp):
        parameters = stage_parameters(architecture, config.parallel, stage)
        stages.append(
            StageMemory(
                stage=stage,
                layers=architecture.num_layers // config.parallel.pp,
                resident=_resident(config, parameters, dp=dp),
                update=_update(architecture, config, stage, shapes),
                old_logprobs=_old_logprobs(architecture, config, stage, shapes),
                engine={} if alone else engine_memory(architecture, config),
                sync=_sync(architecture, config),
                engine_sleeps=config.rollout.sleep_level > 0,
                scores_beside_engine=config.rollout.exclude_mismatch is not None,
            )
        )

    return stages


def stage_parameters(architecture: Architecture, parallel: ParallelConfig, stage: int) -> int:
    """Returns the elements of one rank's parameters on a pipeline stage, as Megatron shards them.

    What is cut over which ranks is the weight mapping's to say. A tied head on another stage than
    the embedding is a copy of it. With more ranks than KV heads the weights are still cut evenly:
    only the computed keys and values are exchanged.
    """
    elements = _elements(architecture, parallel.tp)
    layer = sum(count for key, count in elements.items() if key.startswith(LAYERS))
    total = architecture.num_layers // parallel.pp * layer

    first = stage == 0
    last = stage == parallel.pp - 1
    if first:
        total += elements[EMBEDDING]
    if last:
        total += elements[FINAL_NORM]
        if not architecture.tied:
            total += elements[OUTPUT]
        elif not first:
            total += elements[EMBEDDING]
    return total


@functools.cache
def _elements(architecture: Architecture, tp: int) -> Mapping[str, int]:
    """Returns key of a parameter -> its elements on one of `tp` ranks; for a layer's, of one layer.

    All layers are alike, and a plan asks for many layouts.
    """
    one_layer = dataclasses.replace(architecture, num_layers=1)
    padded_rows = architecture.padded_vocab(tp)
    elements = {}
    for entry in entries(one_layer):
        part = entry.shard(Coordinates(tp_rank=0, tp=tp), padded_rows=padded_rows)
        elements[entry.key] = part.height * part.width
    return elements


def _resident(config: Config, parameters: int, *, dp: int) -> Resident:
    """Returns what stays of `parameters` elements on a rank among `dp` data-parallel ones."""
    dtype = config.model.dtype
    width = DTYPE_BYTES[dtype]

    gradient = width
    if dtype == "bf16" and config.megatron.get("grad_reduce_in_fp32", True):
        gradient = 4

    # Adam's two moments in fp32, and fp32 weights beside bf16 ones. fp64 is for exactness tests,
    # which have no optimizer.
    state = {"bf16": 12, "fp32": 8, "fp64": 0}[dtype]
    shards = 1
    if config.optimizer.distributed:
        shards = dp * config.parallel.cp

    return Resident(
        parameters=parameters,
        weights=parameters * width,
        gradients=parameters * gradient,
        optimizer=parameters * state // shards,
    )


class _Layer:
    """Bytes of one transformer layer on one rank for one micro-batch of batch.max_tokens."""

    def __init__(self, architecture: Architecture, config: Config, shapes: Shapes) -> None:
        a = architecture
        parallel = config.parallel
        self.width = DTYPE_BYTES[config.model.dtype]
        self.te = shapes.layers == "te"
        self.tokens = -(-config.batch.max_tokens // parallel.cp)
        # Sequence parallelism shards the tokens between layers, and gathers them within.
        self.residual = self.tokens * a.hidden_size
        self.gathered = 0
        if parallel.sp:
            self.gathered = self.residual
            self.residual //= parallel.tp
        self.ffn = self.tokens * a.ffn_size // parallel.tp
        self.heads = a.num_heads // parallel.tp
        self.kv_heads = max(a.num_kv_heads // parallel.tp, 1)
        self.head_dim = a.head_dim
        self.qk_norm = a.qk_norm
        self.cp = parallel.cp
        self.selective = config.model.recompute == "selective"
        self.fused_activation = bool(config.megatron.get("bias_activation_fusion", self.te))
        self.fused_rope = bool(config.megatron.get("apply_rope_fusion", self.te))

    @property
    def input(self) -> int:
        """What full recomputation keeps of a layer, and what passes between pipeline stages."""
        return self.residual * self.width

    @property
    def saved(self) -> int:
        """What autograd keeps of the layer for its backward pass."""
        # Input and output of a norm and the linear layer's input. Ours also keeps x in fp32 and
        # x / rms(x).
        width = 2 * self.width
        if not self.te:
            width += max(4, self.width)
        norm = self.residual * width
        return 2 * norm + self._attention + self._mlp

    @property
    def at_work(self) -> int:
        """What the layer holds at its peak beyond what it saves.

        These are gradients of the MLP's width, and norms in fp32.
        """
        return 2 * self.ffn * self.width + 2 * self.residual * 4 + self.gathered * self.width

    @property
    def forward_only(self) -> int:
        """The widest moment of a pass without backward.

        The MLP's products are held beside its input and the residual.
        """
        return self._mlp + 2 * self.input + self.gathered * self.width

    @property
    def _attention(self) -> int:
        query = self.tokens * self.heads * self.head_dim * self.width
        key = self.tokens * self.kv_heads * self.head_dim * self.width

        # The kernel's log-sum-exp of each query, in fp32.
        statistics = 0
        if not self.selective:
            statistics = self.tokens * self.heads * 4

        # Cosines and sines, once for q and once for k; the fused kernel keeps the angles that all
        # layers share.
        rotary = 0
        if not self.fused_rope:
            rotary = 4 * self.tokens * self.head_dim * self.width

        # Norms of q and k keep their inputs; ours also keep them in fp32.
        norms: float = 0
        if self.qk_norm:
            norms = query + key
            if not self.te:
                norms *= 1 + max(4, self.width) / self.width

        # The output is kept by the kernel and by the projection after it: two copies where ours
        # joins its sequences.
        outputs = query
        if not (self.te or self.selective):
            outputs = 2 * query

        # The rotated keys, and the values. These are a view of the product of q, k and v, so all of
        # that product stays, unless TransformerEngine copies them for its kernel; what selective
        # recomputation keeps is the view.
        keys = key + query + 2 * key
        if self.te and not self.selective:
            keys = 2 * key
        if self.cp > 1 and not self.te and not self.selective:
            keys = 2 * key * self.cp  # ours gathers all ranks' keys and values
        return int(query + keys + outputs + statistics + rotary + norms)

    @property
    def _mlp(self) -> int:
        """The first product (twice F), its activation, the linear half and their product.

        All but the first and last are inside the kernel where bias_activation_fusion is on, as it
        is with TransformerEngine by default.
        """
        widths = 5
        if self.fused_activation:
            widths = 3
        return widths * self.ffn * self.width


def in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """Returns how many forward passes of model chunks at most await their backward on a stage.

    They are those of the schedule's warm-up (megatron-core's 1F1B, interleaved where vpp > 1) and
    the one at work.
    """
    pp = parallel.pp
    vpp = parallel.vpp
    warm_up = pp - stage - 1
    if vpp > 1:
        warm_up = 2 * (pp - stage - 1) + (vpp - 1) * pp
    return min(micro_batches * vpp, warm_up + 1)


def _update(architecture: Architecture, config: Config, stage: int, shapes: Shapes) -> Activations:
    """Returns a stage's activations at the peak of an update's forward and backward passes."""
    parallel = config.parallel
    layer = _Layer(architecture, config, shapes)
    passes = in_flight(parallel, stage, shapes.micro_batches)
    layers = architecture.num_layers // (parallel.pp * parallel.vpp) * passes

    # Full recomputation keeps inputs alone and makes one layer's activations anew in backward.
    saved = layers * layer.saved
    at_work = layer.at_work
    if config.model.recompute == "full":
        saved = layers * layer.input
        at_work += layer.saved

    # Input and output of a stage stay until their gradients have come; the ends have one of them.
    first = stage == 0
    last = stage == parallel.pp - 1
    if parallel.pp > 1:
        num_tensors = 2
        if first or last:
            num_tensors = 1
        saved += passes * layer.input * num_tensors

    head = 0
    if last:
        final_norm = layer.residual * (max(4, layer.width) + 2 * layer.width)
        saved += final_norm
        head = _head(architecture, config, layer, shapes, backward=True)
    return Activations(saved=saved, head=head, layer=at_work)


def _old_logprobs(
    architecture: Architecture, config: Config, stage: int, shapes: Shapes
) -> Activations:
    """Returns a stage's activations at the peak of a pass without backward."""
    layer = _Layer(architecture, config, shapes)
    head = 0
    if stage == config.parallel.pp - 1:
        head = _head(architecture, config, layer, shapes, backward=False)
    return Activations(saved=layer.input, head=head, layer=layer.forward_only)


def _head(
    architecture: Architecture, config: Config, layer: _Layer, shapes: Shapes, *, backward: bool
) -> int:
    """Returns the bytes of the log-prob head at its peak, as if every token had a target.

    A CPU adds bf16 to fp32 through a fp32 copy.
    """
    columns = architecture.padded_vocab(config.parallel.tp) // config.parallel.tp
    width = layer.width
    wide = max(4, width)  # sums are in fp32 or wider
    hidden = layer.tokens * architecture.hidden_size
    logits = layer.tokens * columns
    chunk = min(logits * wide, LOGITS_CHUNK_BYTES[shapes.device])
    working = chunk
    if shapes.device == "cpu" and width == 2:
        working *= 2
    if config.model.logprobs == "logits":
        # The rows with a target are copied out of a chunk, in the logits' own dtype.
        copied = chunk * width // wide
        kept = logits * width
        if backward:
            kept *= 2  # and their gradient
        return working + copied + kept + layer.gathered * width

    if shapes.device == "cuda" and width <= 4 and not config.objective.entropy_bonus:
        # Triton's kernels work in the logits' own buffer; fp32 logits leave their gradient to one
        # of bf16.
        narrow = chunk * width // wide
        buffers = narrow
        if config.model.fp32_head:
            buffers = chunk
            if backward:
                buffers += narrow
    else:
        buffers = working
        if width == 2:
            buffers += chunk // 2
    if not backward:
        return buffers + layer.gathered * width + hidden * width

    # Rows with a target, the same scaled, the sum of their gradients, one chunk's share of it; the
    # weight's gradient.
    rows = hidden * (3 * width + wide) + layer.gathered * width
    return buffers + rows + columns * architecture.hidden_size * width


def engine_memory(architecture: Architecture, config: Config) -> dict[str, int]:
    """Returns the bytes of a vLLM engine on one of its GPUs, by what takes them."""
    rollout = config.rollout
    weights = architecture.num_parameters * DTYPE_BYTES[config.model.dtype] // rollout.tp
    return {"weights": weights, "kv_cache": rollout.kv_cache_mib << 20, "overhead": ENGINE_OVERHEAD}


def kv_bytes_per_token(architecture: Architecture, config: Config) -> int:
    """Returns the bytes of one token's KV cache on one rank of an engine."""
    return architecture.kv_bytes_per_token(
        tp=config.rollout.tp, width=DTYPE_BYTES[config.model.dtype]
    )


def _sync(architecture: Architecture, config: Config) -> int:
    """Returns the bytes of the largest HF tensor and its shards' gather, and a server's bucket."""
    # The embedding, or an MLP's gate and up, which Megatron has in one parameter.
    rows = max(architecture.vocab_size, 2 * architecture.ffn_size)
    largest = rows * architecture.hidden_size * DTYPE_BYTES[config.model.dtype]
    if has_own_processes(config.rollout.engine):
        return 2 * largest + max(SYNC_BUCKET_BYTES, largest)
    return 2 * largest
