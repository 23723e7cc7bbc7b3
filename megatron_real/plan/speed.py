"""Seconds of each stage of a step: counted work over published rates (devices.py).

    sync           weights over the links, gathered from the shards, sent to servers, written into the engine
    rollout        prefill; decode steps until the longest answer ends, each bound by memory traffic or by arithmetic
    old_logprobs   a forward pass over the minibatches after the first; over all of rollouts that lag
    update         forward and backward (three forwards' work), recomputation, scoring passes, pipeline bubble,
                   tensor- and context-parallel traffic, gradient reduction

Answers' lengths decide rollouts: a step ends with its longest one. They are taken as exponential and cut at the budget,
the decay chosen for the wanted mean. Verification runs while others still generate and is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_real.config import Config
from megatron_real.plan.devices import (
    DECODE_STEP_FLOOR,
    DECODE_UTILIZATION,
    GPUS_PER_NODE,
    MEAN_PROMPT_SHARE,
    MEAN_RESPONSE_SHARE,
    PREFILL_UTILIZATION,
    Device,
)
from megatron_real.plan.memory import WIDTH, kv_bytes_per_token
from megatron_real.weights.architecture import Architecture

_DECODE_POINTS = 64  # moments of a rollout at which the step time is taken


@dataclass(frozen=True)
class Cluster:
    """The GPUs, and what the user knows better than the tables."""

    device: Device
    """Kind of GPU."""
    gpus: int
    """How many train, over all nodes."""
    train_utilization: float | None = None
    """Share of peak FLOP/s in training; None: the table's."""
    decode_utilization: float | None = None
    """Share of memory bandwidth in decoding; None: the table's."""
    mean_response: float | None = None
    """Tokens of an average answer; None: a share of the longest."""

    def seconds_to_move(self, size: float, *, ranks: int) -> float:
        """Time of `size` bytes over the slowest link among so many neighbouring ranks."""
        return size / 1e9 / (self.device.link_gb if ranks <= GPUS_PER_NODE else self.device.network_gb)


@dataclass(frozen=True)
class Run:
    """A model and its configuration on a cluster, with the numbers of a step that follow."""

    architecture: Architecture
    """The model."""
    config: Config
    """The configuration, layout included."""
    cluster: Cluster
    """The GPUs."""

    @property
    def model_parallel(self) -> int:
        """Ranks that share one copy of the model, apart from context parallelism."""
        return self.config.parallel.tp * self.config.parallel.pp

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.cluster.gpus // (self.model_parallel * self.config.parallel.cp)

    @property
    def engines(self) -> int:
        """vLLM engines: in the training processes, or servers."""
        rollout = self.config.rollout
        if rollout.engine == "vllm-server":
            return len(rollout.servers) or rollout.num_servers
        return self.cluster.gpus // rollout.tp

    @property
    def server_gpus(self) -> int:
        """GPUs beside those that train."""
        return self.engines * self.config.rollout.tp if self.config.rollout.engine == "vllm-server" else 0

    @property
    def rollouts(self) -> int:
        """Of a step."""
        return self.config.rollout.num_prompts * self.config.rollout.group_size

    @property
    def updates(self) -> int:
        """Of a step."""
        return self.config.rollout.num_prompts // self.config.batch.minibatch_prompts

    @property
    def mean_prompt(self) -> float:
        """Tokens of an average prompt."""
        return self.config.data.max_prompt_tokens * MEAN_PROMPT_SHARE

    @property
    def mean_response(self) -> float:
        """Tokens of an average answer."""
        budget = self.config.rollout.max_response_tokens
        return min(self.cluster.mean_response or MEAN_RESPONSE_SHARE * budget, budget)

    @property
    def mean_tokens(self) -> float:
        """Tokens of an average rollout."""
        return self.mean_prompt + self.mean_response

    @property
    def micro_batches(self) -> int:
        """Of one update on one data-parallel rank, at the mean length and perfectly packed."""
        batch, parallel = self.config.batch, self.config.parallel
        packed = max(int(batch.max_tokens / self.mean_tokens), 1)
        needed = math.ceil(self.rollouts / self.updates / self.dp / packed)
        multiple = parallel.pp if parallel.vpp > 1 else 1  # of the interleaved schedule
        return math.ceil(needed / multiple) * multiple

    @property
    def weight_bytes(self) -> int:
        """Of the whole model."""
        return self.architecture.num_parameters * WIDTH[self.config.model.dtype]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step by stage."""

    sync: float
    """Weights to the engine."""
    rollout: float
    """Generation."""
    old_logprobs: float
    """Passes over the later minibatches."""
    update: float
    """All optimizer updates of the step."""
    ahead: float = 0.0
    """What of the rollout passes while the policy trains (rollout.max_lag=1)."""

    @property
    def total(self) -> float:
        """The whole step."""
        return self.sync + self.rollout - self.ahead + self.old_logprobs + self.update


def step_time(run: Run) -> StepTime:
    """Seconds of one step."""
    config, forward = run.config, _forward(run)
    scored = 1.0 if config.rollout.max_lag else (run.updates - 1) / run.updates  # a first minibatch has scores of 0
    passes = 4 if config.model.recompute == "full" else 3
    scoring = scored if config.batch.placement == "split" else 0.0  # the others gather their scores within the pass
    old_logprobs, update = forward * scored, forward * (passes + scoring) + run.updates * _reduction(run)
    if config.rollout.replay:
        return StepTime(0.0, 0.0, old_logprobs, update)
    rollout = _rollout(run)
    ahead = min(rollout, old_logprobs + update) if config.rollout.max_lag else 0.0
    return StepTime(_sync(run), rollout, old_logprobs, update, ahead)


def _forward(run: Run) -> float:
    """One forward pass over the step's rollouts, with model-parallel traffic and the pipeline's bubble."""
    a, parallel, device = run.architecture, run.config.parallel, run.cluster.device
    tokens = run.rollouts * run.mean_tokens
    utilization = run.cluster.train_utilization or device.train_utilization(a.num_parameters)
    computing = (
        tokens * a.flops_per_token(run.mean_tokens / 2) / (run.cluster.gpus * device.tflops * 1e12 * utilization)
    )
    sent = tokens / (run.dp * parallel.cp) * _traffic(run)
    moving = run.cluster.seconds_to_move(sent, ranks=parallel.tp * parallel.cp)
    return (computing + moving) * (1 + (parallel.pp - 1) / (run.micro_batches * parallel.vpp))


def _traffic(run: Run) -> float:
    """Bytes a rank sends for one token in a forward pass: tensor parallelism's two all-reduces of a layer (or gather
    and scatter, the same), context parallelism's keys and values. None is taken as hidden behind work."""
    a, parallel = run.architecture, run.config.parallel
    tensor = 4 * (parallel.tp - 1) / parallel.tp * a.hidden_size
    context = 2 * (parallel.cp - 1) * a.num_kv_heads / parallel.tp * a.head_dim
    return a.num_layers / parallel.pp * (tensor + context) * WIDTH[run.config.model.dtype]


def _reduction(run: Run) -> float:
    """Reduce-scatter of fp32 gradients and all-gather of weights over data-parallel ranks, once an update."""
    ranks, width = run.dp * run.config.parallel.cp, WIDTH[run.config.model.dtype]
    moved = run.architecture.num_parameters / run.model_parallel * (max(4, width) + width) * (ranks - 1) / ranks
    return run.cluster.seconds_to_move(moved, ranks=run.cluster.gpus)


def _sync(run: Run) -> float:
    gathered = run.weight_bytes * (1 - 1 / run.model_parallel)
    written = 2 * run.weight_bytes / (run.cluster.device.bandwidth_gb * 1e9)
    sent = run.weight_bytes if run.server_gpus else 0
    sending = run.cluster.seconds_to_move(sent, ranks=run.cluster.gpus + run.server_gpus)
    return run.cluster.seconds_to_move(gathered, ranks=run.model_parallel) + sending + written


def _rollout(run: Run) -> float:
    """One engine's time: its sequences start together as far as KV cache and max_sequences hold them, the others take
    the places that become free; at the end the answers still at work thin out until the longest is done."""
    rollout, cache = run.config.rollout, run.config.rollout.kv_cache_mib << 20
    sequences = math.ceil(run.rollouts / run.engines)
    held = int(cache / kv_bytes_per_token(run.architecture, run.config) / run.mean_tokens)
    together = max(1, min(sequences, rollout.max_sequences, held))
    prefill = sequences * run.mean_prompt * run.architecture.flops_per_token(run.mean_prompt / 2)
    seconds = prefill / (rollout.tp * run.cluster.device.tflops * 1e12 * PREFILL_UTILIZATION)
    refilled = (sequences - together) * run.mean_response / together
    seconds += refilled * _decode_step(run, together, run.mean_prompt + run.mean_response / 2)
    decay, steps = _decay(run.mean_response / rollout.max_response_tokens), rollout.max_response_tokens / _DECODE_POINTS
    for i in range(_DECODE_POINTS):
        done = (i + 0.5) / _DECODE_POINTS
        alive = max(1.0, together * math.exp(-decay * done))
        seconds += steps * _decode_step(run, alive, run.mean_prompt + done * rollout.max_response_tokens)
    return seconds


def _decode_step(run: Run, sequences: float, context: float) -> float:
    """One token for each of `sequences` answers of `context` tokens: weights and KV cache are read once."""
    device, tp = run.cluster.device, run.config.rollout.tp
    read = run.weight_bytes / tp + sequences * context * kv_bytes_per_token(run.architecture, run.config)
    reading = read / (device.bandwidth_gb * 1e9 * (run.cluster.decode_utilization or DECODE_UTILIZATION))
    flops = sequences * run.architecture.flops_per_token(context) / tp
    return max(DECODE_STEP_FLOOR, reading, flops / (device.tflops * 1e12 * PREFILL_UTILIZATION))


def _decay(mean_share: float) -> float:
    """Rate r of exp(-r x), cut at 1, whose mean is `mean_share`: (1 - exp(-r)) / r, solved by bisection."""
    low, high = 1e-9, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if -math.expm1(-middle) / middle > mean_share else (low, middle)
    return low
