"""The whole configuration of a run: typed dataclasses, checked at construction, loadable without torch.

    config = load("examples/configs/quickstart.yaml", ["optimizer.lr=1e-4", "parallel.tp=2"])

A YAML file gives the values, `key.sub=value` words override them (OmegaConf: interpolation works), and every error is
one sentence that names the key, the value and the remedy. What needs the model's own config.json (heads, layers) is
checked here too, from the JSON file alone, so that a wrong layout never waits for a GPU node.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.util
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """The policy's weights and numerics."""

    path: str = ""
    """Directory with HF weights (config.json, *.safetensors, tokenizer)."""
    dtype: Literal["bf16", "fp32", "fp64"] = "bf16"
    """Parameters and activations. fp64 is for tests of exactness."""
    layers: Literal["auto", "te", "local"] = "auto"
    """`te`: TransformerEngine's layers; `local`: torch's own; `auto`: TransformerEngine where it imports on a GPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: `selective` the core attention, `full` every layer."""
    logprobs: Literal["linear", "logits"] = "linear"
    """`linear` never holds more than a chunk of logits; `logits` keeps them all (a little faster, far more memory)."""
    trust_remote_code: bool = False
    """Lets the tokenizer run code from the model's directory."""
    weights: str = ""
    """Megatron checkpoint of any layout to start from; empty: the weights in `path`, which gives config and tokenizer
    either way."""


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from and how they are rendered."""

    train: str = ""
    """JSONL or parquet file, or a saved HF dataset, of training prompts."""
    heldout: str = ""
    """The same, for evaluation; empty: no evaluation."""
    suffix: str = ""
    """Appended to the user's message."""
    max_prompt_tokens: int = 1024
    """Longer prompts are dropped and counted."""
    shuffle: bool = True
    """Draw prompts in a seeded order, anew each epoch."""


@dataclass(frozen=True)
class SyncConfig:
    """How closely each weight sync is checked."""

    timeout_seconds: float = 600.0
    """A sync that takes longer ends the run and names the tensor and the ranks that it waits for."""
    checksum_every: int = 10
    """Syncs between comparisons of every tensor's checksum in trainer and engine; 1: each sync, 0: never."""
    probe_every: int = 1
    """Syncs between probes: a sampled answer whose log-probs under trainer and engine are compared; 0: never."""
    probe_tokens: int = 32
    """Tokens of the probe's answer."""
    probe_bound: float = 0.05
    """Largest mean |difference| of the probe's log-probs (nats); in fp32 1e-3 is a sharper bound."""


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy answers."""

    engine: Literal["auto", "vllm", "vllm-server", "transformers"] = "auto"
    """The engine that samples; `auto` takes vllm where it imports, else transformers, and says which. `vllm-server` is
    vllm in processes of its own, on other GPUs than those that train."""
    tp: int = 1
    """vLLM's tensor parallel size, independent of parallel.tp: ranks that share one engine, or GPUs of one server."""
    num_servers: int = 1
    """Servers that the run starts and ends, each asked by an equal number of ranks; server i runs beside rank i."""
    servers: tuple[str, ...] = ()
    """Servers that run already (`megatron-real serve`), as http://host:port, and then none is started. Their key is in
    the environment, as VLLM_API_KEY."""
    server_host: str = "127.0.0.1"
    """Address that the servers listen on; another than this machine's own loopback lets other machines in."""
    server_start_seconds: float = 600.0
    """A server that is not ready after this time ends the run."""
    request_timeout_seconds: float = 1800.0
    """A completion that a server has not finished by then is lost."""
    kv_cache_mib: int = 4096
    """vLLM's KV cache on each rank, in MiB; beside it an engine takes its share of the weights."""
    max_sequences: int = 256
    """Sequences that a vLLM engine decodes together."""
    max_lag: Literal[0, 1] = 0
    """Steps that rollouts may lag behind the weights that train on them: 1 generates the next step's rollouts while the
    present one trains, and needs vllm-server."""
    sleep_level: Literal[0, 1, 2] = 2
    """What vLLM gives back on a GPU while the policy trains: 2 weights and KV cache, 1 the same with the weights kept
    in host memory, 0 nothing."""
    offload_optimizer: bool = False
    """While the engine is awake, the optimizer's state is in host memory and the gradient buffers are freed."""
    vllm: Mapping[str, Any] = field(default_factory=dict)
    """Any other argument of vLLM's engine, by name; for example enforce_eager: true."""
    sync: SyncConfig = field(default_factory=SyncConfig)
    """How closely each weight sync is checked."""
    num_prompts: int = 128
    """Prompts per step."""
    group_size: int = 8
    """Completions per prompt (G)."""
    temperature: float = 0.6
    """Sampling temperature; the trainer's log-probs are of the same distribution."""
    top_p: float = 1.0
    """Nucleus mass; below 1 it biases the log-probs and needs `allow_truncated_sampling`."""
    top_k: int = 0
    """Most likely tokens kept; 0 keeps all; other values need `allow_truncated_sampling`."""
    allow_truncated_sampling: bool = False
    """Accept top_p < 1 or top_k > 0 in training although log pi is then of another distribution."""
    max_response_tokens: int = 8192
    """A response that reaches this is cut and counts as truncated."""
    batch_size: int = 64
    """Sequences that the transformers engine decodes together."""
    mismatch_bound: float = 0.1
    """|log-prob in trainer - in engine| (nats) beyond which a token counts in the metric mismatch_share."""
    exclude_mismatch: float | None = None
    """Excludes a rollout whose mean |difference| (nats) is beyond this; costs one more forward pass a step."""
    retries: int = 1
    """How often a completion that an engine lost is drawn again, on another rank's engine; then it is excluded."""
    refill_rounds: int = 0
    """Dynamic sampling: rounds in which groups of one class are replaced by those of fresh prompts; 0: off."""
    chunk_prompts: int = 0
    """Prompts whose rollouts are kept on disk together; 0: a whole step's. Smaller chunks lose less to a preemption in
    the middle of a long step, but every chunk waits for its longest answer."""
    replay: str = ""
    """Run directory whose saved rollouts are trained on instead of generating: no engine is started."""


@dataclass(frozen=True)
class LabelConfig:
    """How completions are verified."""

    verifier: str = "math_verify"
    """`math_verify`, `exact`, `reasoning_gym`, or your own `path.py:function`."""
    workers: int = 2
    """Verifier processes per rank."""
    timeout_seconds: float = 10.0
    """Wall clock of one check; then its worker is killed."""
    memory_mib: int = 1024
    """Memory limit of one worker."""
    require_think: bool = False
    """No answer counts without a </think> before it."""
    require_boxed: bool = True
    """No answer counts outside a \\boxed{}; else the end of the text stands in for a missing box."""
    excluded: tuple[Literal["wrong", "unparsable", "timeout", "crashed"], ...] = ("timeout", "crashed")
    """Statuses whose rollouts leave their group; those of the other statuses but ok are negative."""
    overlong: Literal["negative", "excluded"] = "negative"
    """What a truncated response counts as."""
    threshold: float | None = None
    """Rewards at or above it are positive; required when a verifier returns anything but 0 or 1."""
    max_failed_share: float = 0.2
    """The run stops when more than this share of a step's checks failed (timeout, crashed or lost)."""
    permute: bool = False
    """Control experiment: labels are shuffled over the step's rollouts, so that nothing can be learned."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss: DESIGN of REAL, arXiv:2602.05630."""

    variant: Literal["anchored", "vanilla", "bce"] = "anchored"
    """`anchored` is REAL (Eq. 8), `vanilla` Eq. 2, `bce` Eq. 11."""
    tau: float = 0.5
    """Temperature of the classification loss: |d loss / d score| <= 1 / tau."""
    one_class_groups: Literal["skip", "keep"] = "skip"
    """Groups of a single label: `skip` gives no loss but counts in the denominator, `keep` is Eq. 8 as printed."""


@dataclass(frozen=True)
class BatchConfig:
    """How a minibatch becomes micro-batches."""

    minibatch_prompts: int = 32
    """Prompts (groups) per optimizer step; must divide rollout.num_prompts."""
    max_tokens: int = 16384
    """Token budget of a micro-batch on one rank, over its context-parallel ranks together."""
    layout: Literal["packed", "padded"] = "packed"
    """`packed`: sequences end to end; `padded`: each padded to the micro-batch's longest."""
    placement: Literal["auto", "intact", "dp", "split"] = "auto"
    """Where a group may lie: in a micro-batch, across DP ranks at one index, anywhere; `auto` takes the cheapest."""


@dataclass(frozen=True)
class ParallelConfig:
    """The layout; data parallelism is what the world size leaves."""

    tp: int = 1
    """Tensor parallel size."""
    pp: int = 1
    """Pipeline parallel size."""
    vpp: int = 1
    """Model chunks per pipeline stage (interleaved schedule when > 1)."""
    cp: int = 1
    """Context parallel size."""
    sp: bool = False
    """Sequence parallelism; needs tp > 1."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the paper's recipe."""

    lr: float = 2e-6
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of a decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_updates: int = 0
    """Optimizer updates of linear warm-up."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    beta1: float = 0.9
    """Adam's first moment."""
    beta2: float = 0.999
    """Adam's second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 1.0
    """Global gradient norm; 0 switches clipping off."""
    distributed: bool = True
    """Megatron's DistributedOptimizer: states sharded over data-parallel ranks."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on data.heldout."""

    every: int = 0
    """Steps between evaluations; 0: before and after training only, and only where data.heldout is given."""
    samples: int = 1
    """Completions per problem."""
    temperature: float = 0.6
    """Sampling temperature; pass@1 is the mean over samples."""
    top_p: float = 0.95
    """Nucleus mass."""
    max_problems: int = 0
    """Evaluate only the first so many; 0: all."""
    chunk_problems: int = 64
    """Problems that `megatron-real eval` answers and keeps at a time; an interruption costs at most so many."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and which checkpoints are kept. docs/checkpoints.md."""

    every: int = 20
    """Steps between checkpoints; there is one after the last step too. 0: none but when the run is stopped."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int = 0
    """Also keep those after every so many steps; 0: none for that reason."""
    keep_best: bool = True
    """Also keep the one with the best held-out accuracy, among those of steps with an evaluation."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written; costs host memory of the size of a rank's share."""
    on_failure: Literal["go_on", "stop"] = "go_on"
    """When a checkpoint cannot be written (disk full): warn and try again at the next, or stop the run."""


@dataclass(frozen=True)
class TrainerConfig:
    """The run."""

    run_dir: str = ""
    """Everything the run writes: metrics, rollouts, logs, curves, exported weights."""
    steps: int = 1400
    """Rollout steps; each has rollout.num_prompts / batch.minibatch_prompts optimizer updates."""
    seed: int = 1234
    """Seeds prompt order and sampling."""
    max_skipped_updates: int = 3
    """Stop after so many updates in a row were skipped for a non-finite loss or gradient."""
    profile: tuple[int, ...] = ()
    """Steps of which a torch profiler trace is written."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases (must be installed)."""
    export: bool = True
    """Write the trained weights as an HF directory at the end."""
    max_hours: float = 0.0
    """The run saves, stops and exits with code 75 after so many hours; 0: no limit."""
    timeout_minutes: float = 30.0
    """Collectives that wait longer fail."""
    hang_minutes: float = 60.0
    """A rank that stays in one stage for so long hangs: the run ends and names it. More for very long evaluations."""
    peak_tflops: float = 0.0
    """Peak TFLOP/s of one device for MFU; 0: from a table of known GPUs, else MFU is left out."""


@dataclass(frozen=True)
class Config:
    """One run. See each section's dataclass."""

    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """Any field of megatron-core's TransformerConfig, OptimizerConfig or DistributedDataParallelConfig, by name."""

    def __post_init__(self) -> None:
        _check_values(self)
        _check_combinations(self)
        _check_megatron_names(self.megatron)


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, applies `key.sub=value` overrides and checks everything that needs no process group.

    A directory of HF weights stands for a file that says nothing but its path.

    Raises:
        ValueError: an unknown key, a wrong type or an impossible combination, in one sentence with the remedy.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    words = list(overrides)
    for word in words:
        if "=" not in word:
            raise ValueError(f"override {word!r} has no '='; write key.sub=value, for example trainer.steps=10")
    if not Path(path).exists():
        raise ValueError(f"there is no config file {str(path)!r}; give the path of a YAML file")
    try:
        said = OmegaConf.create({"model": {"path": str(path)}}) if Path(path).is_dir() else OmegaConf.load(path)
        tree = OmegaConf.merge(said, OmegaConf.from_dotlist(words))
        values: Any = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a list, not sections; begin with a line like 'model:'")
    config = _build(Config, values, "")
    check_model(config)
    return config


def check_world(config: Config, world_size: int) -> int:
    """Returns the data-parallel size of `world_size` processes.

    Raises:
        ValueError: the layout does not divide the world.
    """
    parallel, rollout_tp = config.parallel, config.rollout.tp
    _check_servers(config.rollout, world_size)
    if config.rollout.engine != "vllm-server" and world_size % rollout_tp:
        raise ValueError(
            f"rollout.tp = {rollout_tp} does not divide the {world_size} processes; take one of {_divisors(world_size)}"
        )
    model_parallel = parallel.tp * parallel.pp * parallel.cp
    if world_size % model_parallel:
        raise ValueError(
            f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} = {model_parallel} does not divide the "
            f"{world_size} processes; start a multiple of {model_parallel} or change parallel.*"
        )
    return world_size // model_parallel


def _check_servers(rollout: RolloutConfig, world_size: int) -> None:
    number = len(rollout.servers) or rollout.num_servers
    if rollout.engine == "vllm-server" and world_size % number:
        raise ValueError(
            f"{number} vLLM servers cannot be shared equally by {world_size} processes; take one of "
            f"{_divisors(world_size)} (rollout.num_servers or rollout.servers)"
        )


def check_model(config: Config) -> None:
    """Checks the layout against the model's own config.json.

    Raises:
        ValueError: the file is missing or the layout cannot hold the model.
    """
    file = Path(config.model.path) / "config.json"
    if not config.model.path or not file.is_file():
        raise ValueError(
            f"model.path is {config.model.path!r}, which has no config.json; give a directory of HF weights"
        )
    hf = json.loads(file.read_text())
    heads, layers = hf.get("num_attention_heads"), hf.get("num_hidden_layers")
    parallel = config.parallel
    if heads and heads % parallel.tp:
        raise ValueError(
            f"parallel.tp = {parallel.tp} does not divide the model's {heads} attention heads; "
            f"take one of {_divisors(heads)}"
        )
    if hf.get("intermediate_size", 0) % parallel.tp:
        raise ValueError(
            f"parallel.tp = {parallel.tp} does not divide the model's intermediate_size {hf['intermediate_size']}"
        )
    stages = parallel.pp * parallel.vpp
    if layers and layers % stages:
        raise ValueError(
            f"parallel.pp {parallel.pp} x vpp {parallel.vpp} = {stages} does not divide the model's {layers} layers; "
            f"take a product out of {_divisors(layers)}"
        )
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    limit = hf.get("max_position_embeddings", math.inf)
    if longest > limit:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} exceeds the model's "
            f"max_position_embeddings {limit}; shorten one of them"
        )
    if config.rollout.engine in ("vllm", "vllm-server"):
        check_engine(config)


def check_engine(config: Config) -> None:
    """Checks vLLM's layout against the model's own config.json, and that the KV cache holds at least one sequence.

    Raises:
        ValueError: the layout cannot hold the model, or the cache no sequence.
    """
    hf = json.loads((Path(config.model.path) / "config.json").read_text())
    heads, rollout = hf.get("num_attention_heads", 1), config.rollout
    if heads % rollout.tp:
        raise ValueError(
            f"rollout.tp = {rollout.tp} does not divide the model's {heads} attention heads; take one of "
            f"{_divisors(heads)}"
        )
    kv_heads = -(-(hf.get("num_key_value_heads") or heads) // rollout.tp)
    head_dim = hf.get("head_dim") or hf.get("hidden_size", 0) // heads
    token_bytes = 2 * hf.get("num_hidden_layers", 0) * kv_heads * head_dim * (2 if config.model.dtype == "bf16" else 4)
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    blocks = -(-longest // _KV_BLOCK) + 1  # one block stays empty
    needed = -(-blocks * _KV_BLOCK * token_bytes // 2**20)
    if rollout.kv_cache_mib < needed:
        raise ValueError(
            f"rollout.kv_cache_mib = {rollout.kv_cache_mib} does not hold one sequence of data.max_prompt_tokens + "
            f"rollout.max_response_tokens = {longest}; raise it to at least {needed}, better to many times that"
        )


_KV_BLOCK = 128
"""vLLM hands out KV memory in blocks of so many tokens on a CPU, and of fewer on a GPU."""


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, as written to the run directory."""
    return dataclasses.asdict(config)


def to_plain(config: Config) -> dict[str, Any]:
    """The same as a file gives it back: lists for tuples."""
    return dict(json.loads(json.dumps(to_dict(config))))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Makes the dataclass `cls` of plain values, refusing unknown names and wrong types."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    arguments = {}
    for name, value in values.items():
        if {"tis", "is", "importance"} & set(str(name).split("_")):  # as verl, slime and others call them
            raise ValueError(
                f"{prefix}{name}: importance weights of tokens have no meaning for a loss of sequence scores, whose "
                "weights are bounded as they are; watch the mismatch metrics, or set rollout.exclude_mismatch"
            )
        if name not in known:
            raise ValueError(f"unknown key {prefix}{name}{_nearest(str(name), known)}")
        hint = hints[name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ValueError(f"{prefix}{name} is {value!r}; it is a section and takes keys below it")
            arguments[name] = _build(typing.cast(type, hint), value, f"{prefix}{name}.")
        else:
            arguments[name] = _typed(value, hint, f"{prefix}{name}")
    return cls(**arguments)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotation `hint` wants it."""
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in choices or type(value) is bool:
            raise ValueError(f"{name} is {value!r}; it takes one of {', '.join(map(str, choices))}")
        return value
    if type(None) in choices:
        return None if value is None else _typed(value, choices[0], name)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_typed(item, choices[0], name) for item in items)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-6 as a string
        except ValueError:
            pass
    elif hint is str and value is None:
        return ""
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    elif origin is not None and isinstance(value, Mapping):
        return dict(value)
    raise ValueError(f"{name} is {value!r}; it takes {_kind(hint)}")


def _kind(hint: Any) -> str:
    kinds = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return kinds.get(hint, "keys and values")


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(sorted(known))}"


def _check_values(config: Config) -> None:
    positive = {
        "trainer.steps": config.trainer.steps,
        "trainer.max_skipped_updates": config.trainer.max_skipped_updates,
        "trainer.timeout_minutes": config.trainer.timeout_minutes,
        "trainer.hang_minutes": config.trainer.hang_minutes,
        "checkpoint.keep": config.checkpoint.keep,
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "rollout.num_prompts": config.rollout.num_prompts,
        "rollout.group_size": config.rollout.group_size,
        "rollout.temperature": config.rollout.temperature,
        "rollout.max_response_tokens": config.rollout.max_response_tokens,
        "rollout.batch_size": config.rollout.batch_size,
        "rollout.tp": config.rollout.tp,
        "rollout.kv_cache_mib": config.rollout.kv_cache_mib,
        "rollout.max_sequences": config.rollout.max_sequences,
        "rollout.num_servers": config.rollout.num_servers,
        "rollout.server_start_seconds": config.rollout.server_start_seconds,
        "rollout.request_timeout_seconds": config.rollout.request_timeout_seconds,
        "rollout.mismatch_bound": config.rollout.mismatch_bound,
        "rollout.sync.timeout_seconds": config.rollout.sync.timeout_seconds,
        "rollout.sync.probe_tokens": config.rollout.sync.probe_tokens,
        "rollout.sync.probe_bound": config.rollout.sync.probe_bound,
        "labels.workers": config.labels.workers,
        "labels.timeout_seconds": config.labels.timeout_seconds,
        "labels.memory_mib": config.labels.memory_mib,
        "objective.tau": config.objective.tau,
        "batch.minibatch_prompts": config.batch.minibatch_prompts,
        "batch.max_tokens": config.batch.max_tokens,
        "parallel.tp": config.parallel.tp,
        "parallel.pp": config.parallel.pp,
        "parallel.vpp": config.parallel.vpp,
        "parallel.cp": config.parallel.cp,
        "optimizer.lr": config.optimizer.lr,
        "evaluation.samples": config.evaluation.samples,
        "evaluation.temperature": config.evaluation.temperature,
        "evaluation.chunk_problems": config.evaluation.chunk_problems,
    }
    for name, value in positive.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be above 0")
    counts = {
        "trainer.max_hours": config.trainer.max_hours,
        "rollout.retries": config.rollout.retries,
        "rollout.refill_rounds": config.rollout.refill_rounds,
        "rollout.chunk_prompts": config.rollout.chunk_prompts,
        "rollout.sync.checksum_every": config.rollout.sync.checksum_every,
        "rollout.sync.probe_every": config.rollout.sync.probe_every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_every": config.checkpoint.keep_every,
    }
    for name, value in counts.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}; it must be 0 (off) or above")
    if config.rollout.exclude_mismatch is not None and not config.rollout.exclude_mismatch > 0:
        raise ValueError(f"rollout.exclude_mismatch is {config.rollout.exclude_mismatch}; it must be above 0, or null")
    shares = {
        "rollout.top_p": config.rollout.top_p,
        "evaluation.top_p": config.evaluation.top_p,
        "labels.max_failed_share": config.labels.max_failed_share,
    }
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}; it must lie in (0, 1]")


def _check_combinations(config: Config) -> None:
    rollout, batch, parallel = config.rollout, config.batch, config.parallel
    truncated = rollout.top_p < 1 or rollout.top_k > 0
    if truncated and not rollout.allow_truncated_sampling:
        raise ValueError(
            f"rollout.top_p = {rollout.top_p} and rollout.top_k = {rollout.top_k} cut the sampling distribution, so "
            "the log-probs would be biased; use top_p 1 and top_k 0, or set rollout.allow_truncated_sampling=true"
        )
    if rollout.num_prompts % batch.minibatch_prompts:
        raise ValueError(
            f"batch.minibatch_prompts = {batch.minibatch_prompts} does not divide rollout.num_prompts = "
            f"{rollout.num_prompts}; take one of {_divisors(rollout.num_prompts)}"
        )
    if rollout.group_size < 2 and config.objective.one_class_groups == "skip":
        raise ValueError(
            "rollout.group_size = 1 makes every group one-class, and objective.one_class_groups=skip leaves no loss; "
            "take a group size of at least 2"
        )
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    if longest > batch.max_tokens:
        raise ValueError(
            f"batch.max_tokens = {batch.max_tokens} cannot hold one sequence of data.max_prompt_tokens + "
            f"rollout.max_response_tokens = {longest}; raise it to at least {longest}"
        )
    if rollout.engine == "transformers" and rollout.tp > 1:
        raise ValueError(f"rollout.tp = {rollout.tp} needs rollout.engine=vllm; set rollout.tp=1")
    if rollout.engine != "vllm-server" and (rollout.servers or rollout.num_servers > 1):
        raise ValueError(
            f"rollout.servers and rollout.num_servers need rollout.engine=vllm-server, not {rollout.engine}"
        )
    if rollout.max_lag and rollout.engine != "vllm-server":
        raise ValueError(
            f"rollout.max_lag = {rollout.max_lag} needs rollout.engine=vllm-server, not {rollout.engine}, which "
            "computes in the processes that train; set rollout.max_lag=0"
        )
    if rollout.max_lag and (rollout.refill_rounds or rollout.chunk_prompts):
        raise ValueError(
            f"rollout.refill_rounds = {rollout.refill_rounds} and rollout.chunk_prompts = {rollout.chunk_prompts} draw "
            "a step piece by piece, rollout.max_lag = 1 a whole step ahead; set the former or the latter to 0"
        )
    if rollout.offload_optimizer and (config.model.dtype != "bf16" or rollout.engine == "vllm-server"):
        raise ValueError(
            "rollout.offload_optimizer=true makes room for an engine in the same process, and needs an optimizer with "
            f"weights of its own; with model.dtype={config.model.dtype} and rollout.engine={rollout.engine}, set it to "
            "false"
        )
    for address in rollout.servers:
        if not re.fullmatch(r"http://[^/:@]+:[0-9]+", address):
            raise ValueError(f"rollout.servers has {address!r}; an address is of the form http://host:port")
    if rollout.engine in ("vllm", "vllm-server") and config.model.dtype == "fp64":
        raise ValueError("model.dtype=fp64 is not known to vLLM; use fp32, or rollout.engine=transformers")
    for name in rollout.vllm:
        if name in _OURS_IN_VLLM:
            raise ValueError(f"rollout.vllm.{name} is set by {_OURS_IN_VLLM[name]}; set that instead")
    labels = config.labels
    if ":" in labels.verifier and (labels.require_think or not labels.require_boxed):
        raise ValueError(
            f"labels.require_think and labels.require_boxed have no effect on labels.verifier = {labels.verifier!r}, "
            "which is given the whole text; leave them at false and true"
        )
    if parallel.sp and parallel.tp == 1:
        raise ValueError("parallel.sp=true needs parallel.tp > 1; set parallel.sp=false")
    if parallel.vpp > 1 and parallel.pp == 1:
        raise ValueError(f"parallel.vpp = {parallel.vpp} needs parallel.pp > 1; set parallel.vpp=1")


# vLLM's names for what has a place of its own in this configuration, or that training fixes.
_OURS_IN_VLLM: Mapping[str, str] = {
    "model": "model.path",
    "dtype": "model.dtype",
    "max_model_len": "data.max_prompt_tokens and rollout.max_response_tokens",
    "tensor_parallel_size": "rollout.tp",
    "pipeline_parallel_size": "rollout.tp",
    "data_parallel_size": "the number of processes",
    "kv_cache_memory_bytes": "rollout.kv_cache_mib",
    "gpu_memory_utilization": "rollout.kv_cache_mib",
    "max_num_seqs": "rollout.max_sequences",
    "enable_sleep_mode": "rollout.sleep_level",
    "seed": "trainer.seed",
    "quantization": "model.dtype",
    "load_format": "the weight sync",
    "logprobs_mode": "the mismatch metrics",
    "distributed_executor_backend": "the training processes",
    "skip_tokenizer_init": "the rollout engine",
    "generation_config": "rollout.temperature, top_p and top_k",
}


# Settings that would silently change the objective, each with the reason it is refused.
_REFUSED: Mapping[str, tuple[Any, str]] = {
    "hidden_dropout": (0.0, "dropout makes pi_theta differ from pi_old at equal weights"),
    "attention_dropout": (0.0, "dropout makes pi_theta differ from pi_old at equal weights"),
    "num_moe_experts": (None, "mixture-of-experts models are not supported"),
    "fp16": (False, "fp16 loss scaling is not supported; use model.dtype=bf16"),
    "average_in_collective": (False, "the loss is already divided by the minibatch's groups"),
    "calculate_per_token_loss": (True, "Megatron's own averaging is switched off by it"),
    "use_precision_aware_optimizer": (False, "checkpoints do not know its form of the optimizer's state"),
    "defer_embedding_wgrad_compute": (False, "the log-prob head computes its weight gradient at once"),
}


# megatron-core's names for what has a place of its own in this configuration.
_OURS: Mapping[str, str] = {
    "tensor_model_parallel_size": "parallel.tp",
    "pipeline_model_parallel_size": "parallel.pp",
    "virtual_pipeline_model_parallel_size": "parallel.vpp",
    "context_parallel_size": "parallel.cp",
    "sequence_parallel": "parallel.sp",
    "params_dtype": "model.dtype",
    "bf16": "model.dtype",
    "lr": "optimizer.lr",
    "min_lr": "optimizer.min_lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "clip_grad": "optimizer.clip_grad",
    "use_distributed_optimizer": "optimizer.distributed",
    "recompute_granularity": "model.recompute",
}


def _check_megatron_names(values: Mapping[str, Any]) -> None:
    if not values:
        return
    known = megatron_fields()
    for name, value in values.items():
        if "lora" in name.lower():
            raise ValueError(f"megatron.{name}: LoRA is not supported; train all weights")
        if name not in known:
            raise ValueError(f"unknown key megatron.{name}{_nearest(name, known)}")
        if name in _OURS:
            raise ValueError(f"megatron.{name} is set by {_OURS[name]}; set that instead")
        if name in _REFUSED and value != _REFUSED[name][0]:
            wanted, reason = _REFUSED[name]
            raise ValueError(f"megatron.{name} = {value!r} is refused: {reason}; leave it at {wanted}")


_MEGATRON_CLASSES = {
    "TransformerConfig": "transformer/transformer_config.py",
    "ModelParallelConfig": "model_parallel_config.py",
    "OptimizerConfig": "optimizer/optimizer_config.py",
    "DistributedDataParallelConfig": "distributed/distributed_data_parallel_config.py",
}


@functools.cache
def megatron_fields() -> frozenset[str]:
    """Every field that `megatron.*` can set, read from megatron-core's sources: a wrong name costs no import of it."""
    spec = importlib.util.find_spec("megatron")
    roots = [Path(p) / "core" for p in (spec.submodule_search_locations or ())] if spec else []
    root = next((r for r in roots if r.is_dir()), None)
    if root is None:
        raise ValueError("megatron-core is not installed; pip install 'megatron-core>=0.16.1,<0.20'")
    return frozenset(
        field.target.id
        for cls, file in _MEGATRON_CLASSES.items()
        for node in ast.parse((root / file).read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == cls
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    )
