"""Seconds of each stage of a step: counted work over published rates (devices.py).

    sync           weights over the links, gathered from the shards, sent to servers, written into
                   the engine
    rollout        prefill; decode steps until the longest answer ends, each bound by memory traffic
                   or by arithmetic
    old_logprobs   a forward pass over the minibatches after the first; over all of rollouts that
                   lag
    update         forward and backward (three forwards' work), recomputation, scoring passes,
                   pipeline bubble, tensor- and context-parallel traffic, gradient reduction

Answers' lengths decide rollouts: a step ends with its longest one. They are taken as exponential
and cut at the budget, the decay chosen for the wanted mean. Verification runs while others still
generate and is left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_real.config import Config
from megatron_real.config.engines import has_own_processes
from megatron_real.numerics import DTYPE_BYTES
from megatron_real.plan.devices import (
    DECODE_STEP_FLOOR,
    DECODE_UTILIZATION,
    GPUS_PER_NODE,
    MEAN_PROMPT_SHARE,
    MEAN_RESPONSE_SHARE,
    PREFILL_UTILIZATION,
    Device,
)
from megatron_real.plan.memory import kv_bytes_per_token
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
        """Returns the seconds of `size` bytes over the slowest link among `ranks` neighbours."""
        rate_gb = self.device.link_gb
        if ranks > GPUS_PER_NODE:
            rate_gb = self.device.network_gb
        return size / 1e9 / rate_gb


@dataclass(frozen=True)
class PlannedRun:
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
        if has_own_processes(rollout.engine):
            return len(rollout.servers) or rollout.num_servers
        return self.cluster.gpus // rollout.tp

    @property
    def server_gpus(self) -> int:
        """GPUs beside those that train."""
        rollout = self.config.rollout
        if not has_own_processes(rollout.engine):
            return 0
        return self.engines * rollout.tp

    @property
    def rollouts(self) -> int:
        """Rollouts of a step."""
        return self.config.rollout.num_prompts * self.config.rollout.group_size

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
        """Micro-batches of an update on one data-parallel rank, perfectly packed at mean length."""
        parallel = self.config.parallel
        packed = max(int(self.config.batch.max_tokens / self.mean_tokens), 1)
        needed = math.ceil(self.rollouts / self.config.updates_per_step / self.dp / packed)

        # The interleaved schedule takes whole multiples of pp.
        multiple = 1
        if parallel.vpp > 1:
            multiple = parallel.pp
        return math.ceil(needed / multiple) * multiple

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole model's weights."""
        return self.architecture.num_parameters * DTYPE_BYTES[self.config.model.dtype]


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
    reference: float = 0.0
    """The pass of a frozen reference policy (objective.kl.to=reference)."""
    ahead: float = 0.0
    """What of the rollout passes while the policy trains (rollout.max_lag=1)."""

    @property
    def total(self) -> float:
        """The whole step."""
        training = self.old_logprobs + self.reference + self.update
        return self.sync + self.rollout - self.ahead + training


def step_time(run: PlannedRun) -> StepTime:
    """Returns the seconds of one step, stage by stage."""
    config = run.config
    objective = config.objective
    forward = _forward(run)

    # The first minibatch is trained on by the weights that generated it: its old log-probs are its
    # own.
    off_policy = (run.config.updates_per_step - 1) / run.config.updates_per_step
    if config.rollout.max_lag:
        off_policy = 1.0
    old_logprobs = forward * off_policy
    reference = 0.0
    if objective.needs_reference:
        reference = forward

    # Scores that a group or the minibatch couples are gathered within the training pass, unless
    # they lie apart.
    apart = config.batch.placement == "split" or objective.reach == "minibatch"
    scoring = 0.0
    if objective.gathers_scores and apart:
        scoring = off_policy if objective.free_first_minibatch else 1.0

    # A backward pass has the work of two forward passes; full recomputation adds one more.
    passes = 3
    if config.model.recompute == "full":
        passes = 4

    # Each update reduce-scatters gradients in fp32 or wider and all-gathers weights in model.dtype.
    ranks = run.dp * config.parallel.cp
    width = DTYPE_BYTES[config.model.dtype]
    parameters = run.architecture.num_parameters / run.model_parallel
    moved = parameters * (max(4, width) + width) * (ranks - 1) / ranks
    reduction = run.cluster.seconds_to_move(moved, ranks=run.cluster.gpus)
    update = forward * (passes + scoring) + config.updates_per_step * reduction

    if config.rollout.replay:
        return StepTime(0.0, 0.0, old_logprobs, update, reference)

    rollout = _rollout(run)
    ahead = 0.0
    if config.rollout.max_lag:
        ahead = min(rollout, old_logprobs + reference + update)
    return StepTime(_sync(run), rollout, old_logprobs, update, reference, ahead)


def _forward(run: PlannedRun) -> float:
    """Returns the seconds of one forward pass over the step's rollouts.

    Model-parallel traffic and the pipeline's bubble are included.
    """
    a = run.architecture
    parallel = run.config.parallel
    device = run.cluster.device

    tokens = run.rollouts * run.mean_tokens
    utilization = run.cluster.train_utilization or device.train_utilization(a.num_parameters)
    # A token attends to half of its rollout on average.
    flops = tokens * a.flops_per_token(run.mean_tokens / 2)
    computing = flops / (run.cluster.gpus * device.tflops * 1e12 * utilization)

    # What a rank sends for one token: tensor parallelism's two all-reduces of a layer (or gather
    # and scatter, the same) and context parallelism's keys and values. None is taken as hidden
    # behind work.
    tensor = 4 * (parallel.tp - 1) / parallel.tp * a.hidden_size
    context = 2 * (parallel.cp - 1) * a.num_kv_heads / parallel.tp * a.head_dim
    width = DTYPE_BYTES[run.config.model.dtype]
    traffic = a.num_layers / parallel.pp * (tensor + context) * width
    sent = tokens / (run.dp * parallel.cp) * traffic
    moving = run.cluster.seconds_to_move(sent, ranks=parallel.tp * parallel.cp)

    bubble = (parallel.pp - 1) / (run.micro_batches * parallel.vpp)
    return (computing + moving) * (1 + bubble)


def _sync(run: PlannedRun) -> float:
    """Returns the seconds of a weight sync: gathering shards, sending to servers, writing."""
    gathered = run.weight_bytes * (1 - 1 / run.model_parallel)
    # Memory is read and written.
    written = 2 * run.weight_bytes / (run.cluster.device.bandwidth_gb * 1e9)
    sent = 0
    if run.server_gpus:
        sent = run.weight_bytes
    sending = run.cluster.seconds_to_move(sent, ranks=run.cluster.gpus + run.server_gpus)
    return run.cluster.seconds_to_move(gathered, ranks=run.model_parallel) + sending + written


def _rollout(run: PlannedRun) -> float:
    """Returns the seconds that one engine generates in a step.

    Its sequences start together as far as KV cache and max_sequences hold them, and the others take
    the places that become free. At the end the answers still at work thin out until the longest is
    done.
    """
    rollout = run.config.rollout
    cache = rollout.kv_cache_mib << 20
    sequences = math.ceil(run.rollouts / run.engines)
    held = int(cache / kv_bytes_per_token(run.architecture, run.config) / run.mean_tokens)
    together = max(1, min(sequences, rollout.max_sequences, held))

    prefill = sequences * run.mean_prompt * run.architecture.flops_per_token(run.mean_prompt / 2)
    seconds = prefill / (rollout.tp * run.cluster.device.tflops * 1e12 * PREFILL_UTILIZATION)

    refilled = (sequences - together) * run.mean_response / together
    seconds += refilled * _decode_step(run, together, run.mean_prompt + run.mean_response / 2)

    decay = _decay(run.mean_response / rollout.max_response_tokens)
    steps = rollout.max_response_tokens / _DECODE_POINTS
    for i in range(_DECODE_POINTS):
        done = (i + 0.5) / _DECODE_POINTS
        alive = max(1.0, together * math.exp(-decay * done))
        context = run.mean_prompt + done * rollout.max_response_tokens
        seconds += steps * _decode_step(run, alive, context)
    return seconds


def _decode_step(run: PlannedRun, sequences: float, context: float) -> float:
    """Returns the seconds of one token for each of `sequences` answers of `context` tokens.

    Weights and KV cache are read once. The step takes as long as the slower of reading and
    computing.
    """
    device = run.cluster.device
    tp = run.config.rollout.tp

    kv_cache = sequences * context * kv_bytes_per_token(run.architecture, run.config)
    read = run.weight_bytes / tp + kv_cache
    utilization = run.cluster.decode_utilization or DECODE_UTILIZATION
    reading = read / (device.bandwidth_gb * 1e9 * utilization)

    flops = sequences * run.architecture.flops_per_token(context) / tp
    computing = flops / (device.tflops * 1e12 * PREFILL_UTILIZATION)
    return max(DECODE_STEP_FLOOR, reading, computing)


def _decay(mean_share: float) -> float:
    """Returns the rate r of exp(-r x), cut at 1, whose mean is `mean_share`.

    The mean is (1 - exp(-r)) / r, which falls as r grows: solved by bisection.
    """
    low = 1e-9
    high = 1e3
    for _ in range(80):  # beyond the precision of a float64
        middle = (low + high) / 2
        if -math.expm1(-middle) / middle > mean_share:
            low = middle
        else:
            high = middle
    return low
