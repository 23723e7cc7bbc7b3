"""Bytes on each rank, without building anything: what Megatron shards where, and what a pass keeps for its backward.

Every rank of a pipeline stage holds the same amount, so the answer is one column per stage. Weights, gradients and
optimizer states are exact but for the padding of buckets. Activations are what autograd saves in one layer, term by
term as the modules of policy/layers.py (or TransformerEngine's) make it, times the layers and micro-batches that the
schedule has in flight, plus what the costliest moment needs on top. tests/distributed/test_plan_memory.py holds both
against the allocations of real models.

Letters as in the rest of the project: T packed tokens of a micro-batch, H hidden size, F width of the MLP, V rows of
the vocabulary, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_real.config import Config, ParallelConfig
from megatron_real.weights.architecture import Architecture

WIDTH = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of a parameter or activation."""

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""The log-prob head's chunk of logits in fp32: policy/logprobs.py."""

BUCKET_BYTES = 256 << 20
"""What goes to a server at a time, at least: rollout/link.py."""

MODELLED = frozenset({"grad_reduce_in_fp32", "bias_activation_fusion"})
"""Fields of `megatron.*` that the estimates follow."""

# What a vLLM engine takes beside weights and KV cache: activations of its largest batch of 8192 prompt tokens, CUDA
# graphs and sampler buffers. vLLM prints its own figure at the start.
ENGINE_OVERHEAD = 3 << 30


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
    """Adam's moments and, for a bf16 model, the fp32 weights: over data- and context-parallel ranks if distributed."""

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
    """Log-prob head: chunks of logits, and in backward the weight's and the hidden states' gradients."""
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
    """The rollout engine on the same GPU: `weights`, `kv_cache`, `overhead`; nothing where there is none."""
    sync: int
    """What a weight sync holds beside both models: a tensor, and for servers a bucket."""
    engine_sleeps: bool
    """The engine gives its memory back while the policy trains."""

    @property
    def peaks(self) -> dict[str, int]:
        """Part of the step -> bytes in use at its peak."""
        engine = sum(self.engine.values())
        kept = 0 if self.engine_sleeps else engine
        return {
            "sync": self.resident.total + self.engine.get("weights", 0) + self.sync,
            "rollout": self.resident.total + engine,
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


def stage_memory(architecture: Architecture, config: Config, *, dp: int, shapes: Shapes) -> list[StageMemory]:
    """Memory of one rank of each pipeline stage."""
    alone = config.rollout.replay or config.rollout.engine == "vllm-server"
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
            )
        )
    return stages


def stage_parameters(architecture: Architecture, parallel: ParallelConfig, stage: int) -> int:
    """Elements of one rank's parameters on a pipeline stage, as Megatron shards them.

    Column- and row-parallel weights, the embedding and the head are cut over tensor-parallel ranks, norms and biases of
    row-parallel layers are not. A tied head on another stage than the embedding is a copy of it. With more ranks than
    KV heads the weights are still cut evenly: only the computed keys and values are exchanged.
    """
    a, tp = architecture, parallel.tp
    hidden, head_dim = a.hidden_size, a.head_dim
    qkv = head_dim * (a.num_heads + 2 * a.num_kv_heads)
    cut = hidden * qkv + head_dim * a.num_heads * hidden + 3 * hidden * a.ffn_size
    cut += (qkv if a.qkv_bias else 0) + (2 * a.ffn_size if a.linear_bias else 0)
    whole = 2 * hidden + (2 * hidden if a.linear_bias else 0) + (2 * head_dim if a.qk_norm else 0)
    total = a.num_layers // parallel.pp * (cut // tp + whole)
    vocabulary = a.padded_vocab(tp) // tp * hidden
    first, last = stage == 0, stage == parallel.pp - 1
    if first:
        total += vocabulary
    if last:
        total += hidden + (0 if a.tied and first else vocabulary)
    return total


def _resident(config: Config, parameters: int, *, dp: int) -> Resident:
    width = WIDTH[config.model.dtype]
    gradient = 4 if config.model.dtype == "bf16" and config.megatron.get("grad_reduce_in_fp32", True) else width
    state = {"bf16": 12, "fp32": 8, "fp64": 0}[config.model.dtype]  # fp64 is for exactness tests: no optimizer
    shards = dp * config.parallel.cp if config.optimizer.distributed else 1
    return Resident(parameters, parameters * width, parameters * gradient, parameters * state // shards)


class _Layer:
    """Bytes of one transformer layer on one rank for one micro-batch of batch.max_tokens."""

    def __init__(self, architecture: Architecture, config: Config, shapes: Shapes) -> None:
        a, parallel = architecture, config.parallel
        self.width = WIDTH[config.model.dtype]
        self.te = shapes.layers == "te"
        self.tokens = -(-config.batch.max_tokens // parallel.cp)
        self.residual = self.tokens * a.hidden_size // (parallel.tp if parallel.sp else 1)
        self.gathered = self.tokens * a.hidden_size if parallel.sp else 0
        self.ffn = self.tokens * a.ffn_size // parallel.tp
        self.heads = a.num_heads // parallel.tp
        self.kv_heads = max(a.num_kv_heads // parallel.tp, 1)
        self.head_dim, self.qk_norm, self.cp = a.head_dim, a.qk_norm, parallel.cp
        self.selective = config.model.recompute == "selective"
        self.fused_activation = bool(config.megatron.get("bias_activation_fusion", False))

    @property
    def input(self) -> int:
        """What full recomputation keeps of a layer, and what passes between pipeline stages."""
        return self.residual * self.width

    @property
    def saved(self) -> int:
        """What autograd keeps of the layer for its backward pass."""
        return 2 * self._norm + self._attention + self._mlp

    @property
    def at_work(self) -> int:
        """What the layer holds at its peak beyond what it saves: gradients of the MLP's width, norms in fp32."""
        return 2 * self.ffn * self.width + 2 * self.residual * 4 + self.gathered * self.width

    @property
    def forward_only(self) -> int:
        """The widest moment of a pass without backward: the MLP's products beside its input and the residual."""
        return self._mlp + 2 * self.input + self.gathered * self.width

    @property
    def _norm(self) -> int:
        """Input and output of a norm and the linear layer's input; ours also keeps x in fp32 and x / rms(x)."""
        return self.residual * (2 * self.width if self.te else max(4, self.width) + 2 * self.width)

    @property
    def _attention(self) -> int:
        query, key = (self.tokens * heads * self.head_dim * self.width for heads in (self.heads, self.kv_heads))
        statistics = 0 if self.selective else self.tokens * self.heads * 4
        rotary = 4 * self.tokens * self.head_dim * self.width  # cosines and sines, once for q and once for k
        norms = (query + key) * (1 if self.te else 1 + max(4, self.width) / self.width) if self.qk_norm else 0
        # The output is kept by the kernel and by the projection after it: two copies where ours joins its sequences.
        outputs = query if self.te or self.selective else 2 * query
        keys = key + query + 2 * key  # the value is a view of the product of q, k and v, so all of it stays
        if self.cp > 1 and not self.te and not self.selective:
            keys = 2 * key * self.cp  # ours gathers all ranks' keys and values
        return int(query + keys + outputs + statistics + rotary + norms)

    @property
    def _mlp(self) -> int:
        """The first product (twice F), its activation, the linear half and their product: all but the first and last
        are inside the kernel where bias_activation_fusion is on."""
        return (3 if self.fused_activation else 5) * self.ffn * self.width


def in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> int:
    """Model chunks' forward passes whose backward is still to come, at most, on a pipeline stage: those of the
    schedule's warm-up (megatron-core's 1F1B, interleaved where vpp > 1) and the one at work."""
    pp, vpp = parallel.pp, parallel.vpp
    warm_up = pp - stage - 1 if vpp == 1 else 2 * (pp - stage - 1) + (vpp - 1) * pp
    return min(micro_batches * vpp, warm_up + 1)


def _update(architecture: Architecture, config: Config, stage: int, shapes: Shapes) -> Activations:
    parallel, layer = config.parallel, _Layer(architecture, config, shapes)
    full = config.model.recompute == "full"
    passes = in_flight(parallel, stage, shapes.micro_batches)
    layers = architecture.num_layers // (parallel.pp * parallel.vpp) * passes
    saved = layers * (layer.input if full else layer.saved)
    if parallel.pp > 1:  # input and output of a stage stay until their gradients have come
        saved += passes * layer.input * (1 if stage == 0 or stage == parallel.pp - 1 else 2)
    head = 0
    if stage == parallel.pp - 1:
        final_norm = layer.residual * (max(4, layer.width) + 2 * layer.width)
        saved += final_norm
        head = _head(architecture, config, layer, shapes, backward=True)
    return Activations(saved=saved, head=head, layer=layer.at_work + (layer.saved if full else 0))


def _old_logprobs(architecture: Architecture, config: Config, stage: int, shapes: Shapes) -> Activations:
    layer = _Layer(architecture, config, shapes)
    last = stage == config.parallel.pp - 1
    head = _head(architecture, config, layer, shapes, backward=False) if last else 0
    return Activations(saved=layer.input, head=head, layer=layer.forward_only)


def _head(architecture: Architecture, config: Config, layer: _Layer, shapes: Shapes, *, backward: bool) -> int:
    """The log-prob head at its peak, as if every token had a target. A CPU adds bf16 to fp32 through a fp32 copy."""
    columns = architecture.padded_vocab(config.parallel.tp) // config.parallel.tp
    width, hidden, wide = layer.width, layer.tokens * architecture.hidden_size, max(4, layer.width)
    logits = layer.tokens * columns
    chunk = min(logits * wide, CHUNK_BYTES[shapes.device])
    working = chunk * (2 if shapes.device == "cpu" and width == 2 else 1)
    if config.model.logprobs == "logits":
        return working + logits * width * (2 if backward else 1) + layer.gathered * width
    buffers = working + (chunk // 2 if width == 2 else 0)
    if not backward:
        return buffers + layer.gathered * width + hidden * width
    # Rows with a target, the same scaled, the sum of their gradients, one chunk's share of it; the weight's gradient.
    rows = hidden * (3 * width + wide) + layer.gathered * width
    return buffers + rows + columns * architecture.hidden_size * width


def engine_memory(architecture: Architecture, config: Config) -> dict[str, int]:
    """Bytes of a vLLM engine on one of its GPUs."""
    rollout = config.rollout
    weights = architecture.num_parameters * WIDTH[config.model.dtype] // rollout.tp
    return {"weights": weights, "kv_cache": rollout.kv_cache_mib << 20, "overhead": ENGINE_OVERHEAD}


def kv_bytes_per_token(architecture: Architecture, config: Config) -> int:
    """KV cache of one token on one rank of an engine."""
    heads = max(architecture.num_kv_heads // config.rollout.tp, 1)
    return 2 * architecture.num_layers * heads * architecture.head_dim * WIDTH[config.model.dtype]


def _sync(architecture: Architecture, config: Config) -> int:
    """The largest HF tensor and its shards' gather; servers get it in a bucket."""
    rows = max(architecture.vocab_size, 2 * architecture.ffn_size)
    largest = rows * architecture.hidden_size * WIDTH[config.model.dtype]
    return 2 * largest + (max(BUCKET_BYTES, largest) if config.rollout.engine == "vllm-server" else 0)
