"""The sections of a run's configuration.

Every setting stands here with its type, its default, its bounds and what it means.

What a single value must satisfy stands on its field (megatron_real/bounds.py), what several must
satisfy together in checks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from megatron_real.bounds import (
    Between,
    NonNegative,
    OneOf,
    Positive,
    Share,
    ZeroIsOff,
    check_bounds,
)
from megatron_real.config import checks, upstream
from megatron_real.config.engines import AUTO, ENGINES
from megatron_real.objective.objective import Objective
from megatron_real.objective.registry import make_objective

# Below 1: a moment that decays by the factor 1 would never forget its beginning.
_Decay = Between(0, 1, below_high=True)


@dataclass(frozen=True)
class ModelConfig:
    """The policy's weights and numerics."""

    path: str = ""
    """Directory with HF weights (config.json, *.safetensors, tokenizer)."""
    dtype: Literal["bf16", "fp32", "fp64", "auto"] = "bf16"
    """Parameters and activations. `auto`: bf16, or fp32 on a CPU without bf16 instructions;
    config.yaml then names the one that was taken. fp64 is for tests of exactness."""
    layers: Literal["auto", "te", "local"] = "auto"
    """`te`: TransformerEngine's layers; `local`: torch's own; `auto`: TransformerEngine where it
    imports on a GPU."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation: `selective` the core attention, `full` every layer."""
    logprobs: Literal["linear", "logits"] = "linear"
    """`linear` never holds more than a chunk of logits; `logits` keeps them all (a little faster,
    far more memory)."""
    fp32_head: bool = False
    """Logits stay in fp32, as the product accumulates them, in the trainer and in vLLM: less
    mismatch between the two in bf16, for twice the bytes of a chunk of logits. Needs
    `logprobs=linear`."""
    trust_remote_code: bool = False
    """Lets the tokenizer run code from the model's directory."""
    weights: str = ""
    """Megatron checkpoint of any layout to start from; empty: the weights in `path`, which gives
    config and tokenizer either way."""


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from and how they are rendered."""

    train: str = ""
    """JSONL or parquet file, or a saved HF dataset, of training prompts."""
    heldout: str = ""
    """The same, for evaluation; empty: no evaluation."""
    train_split: str = ""
    """Split of `train` where it is a folder with several."""
    heldout_split: str = ""
    """Split of `heldout`, likewise."""
    # Plain values, because their names are the user's: config/sources.py checks them.
    sources: Mapping[str, Any] = field(default_factory=dict)
    """Training sets by name instead of `train`, mixed by weight: path, split, weight, suffix,
    verifier of each (docs/data.md)."""
    pass_rates: str = ""
    """Completions of `megatron-real eval` on the training prompts, as OUT/samples/NAME: prompts
    that were always or never solved are left out."""
    suffix: str = ""
    """Appended to the user's message."""
    max_prompt_tokens: Annotated[int, Positive] = 1024
    """Longer prompts are dropped and counted."""
    shuffle: bool = True
    """Draw prompts in a seeded order, anew each epoch."""


@dataclass(frozen=True)
class SyncConfig:
    """How closely each weight sync is checked."""

    timeout_seconds: Annotated[float, Positive] = 600.0
    """A sync that takes longer ends the run and names the tensor and the ranks that it waits
    for."""
    checksum_every: Annotated[int, ZeroIsOff] = 10
    """Syncs between comparisons of every tensor's checksum in trainer and engine; 1: each sync, 0:
    never."""
    probe_every: Annotated[int, ZeroIsOff] = 1
    """Syncs between probes: a sampled answer whose log-probs under trainer and engine are compared;
    0: never."""
    probe_tokens: Annotated[int, Positive] = 32
    """Tokens of the probe's answer."""
    probe_bound: Annotated[float, Positive] = 0.05
    """Largest mean |difference| of the probe's log-probs (nats); in fp32 1e-3 is a sharper
    bound."""


@dataclass(frozen=True)
class RolloutConfig:
    """How the policy answers."""

    # Of the table of engines: a new one needs no change here.
    engine: Annotated[str, OneOf((AUTO, *ENGINES))] = AUTO
    """The engine that samples; `auto` takes vllm where it imports, else transformers, and says
    which. `vllm-server` is vllm in processes of its own, on other GPUs than those that train."""
    tp: Annotated[int, Positive] = 1
    """vLLM's tensor parallel size, independent of parallel.tp: ranks that share one engine, or GPUs
    of one server."""
    num_servers: Annotated[int, Positive] = 1
    """Servers that the run starts and ends, each asked by an equal number of ranks; server i runs
    beside rank i."""
    servers: tuple[str, ...] = ()
    """Servers that run already (`megatron-real serve`), as http://host:port or https://host:port,
    and then none is started. Their key is in the environment, as VLLM_API_KEY."""
    server_host: str = "127.0.0.1"
    """Address that the servers listen on; another than this machine's own loopback lets other
    machines in."""
    server_start_seconds: Annotated[float, Positive] = 600.0
    """A server that is not ready after this time ends the run."""
    request_timeout_seconds: Annotated[float, Positive] = 1800.0
    """A completion that a server has not finished by then is lost."""
    kv_cache_mib: Annotated[int, Positive] = 4096
    """vLLM's KV cache on each rank, in MiB; beside it an engine takes its share of the weights."""
    max_sequences: Annotated[int, Positive] = 256
    """Sequences that a vLLM engine decodes together."""
    max_lag: Literal[0, 1] = 0
    """Steps that rollouts may lag behind the weights that train on them: 1 generates the next
    step's rollouts while the present one trains, and needs vllm-server."""
    sleep_level: Literal[0, 1, 2] = 2
    """What vLLM gives back on a GPU while the policy trains: 2 weights and KV cache, 1 the same
    with the weights kept in host memory, 0 nothing."""
    offload_optimizer: bool = False
    """While the engine is awake, the optimizer's state is in host memory and the gradient buffers
    are freed."""
    vllm: Mapping[str, Any] = field(default_factory=dict)
    """Any other argument of vLLM's engine, by name; for example enforce_eager: true."""
    sync: SyncConfig = field(default_factory=SyncConfig)
    """How closely each weight sync is checked."""
    # The paper's step: 128 prompts with 8 answers each, and below four updates of 32 groups.
    num_prompts: Annotated[int, Positive] = 128
    """Prompts per step."""
    group_size: Annotated[int, Positive] = 8
    """Completions per prompt (G)."""
    temperature: Annotated[float, Positive] = 0.6
    """Sampling temperature; the trainer's log-probs are of the same distribution."""
    top_p: Annotated[float, Share] = 1.0
    """Nucleus mass; below 1 it biases the log-probs and needs `allow_truncated_sampling`."""
    top_k: Annotated[int, ZeroIsOff] = 0
    """Most likely tokens kept; 0 keeps all; other values need `allow_truncated_sampling`."""
    allow_truncated_sampling: bool = False
    """Accept top_p < 1 or top_k > 0 in training although log pi is then of another distribution."""
    max_response_tokens: Annotated[int, Positive] = 8192
    """A response that reaches this is cut and counts as truncated."""
    batch_size: Annotated[int, Positive] = 64
    """Sequences that the transformers engine decodes together."""
    mismatch_bound: Annotated[float, Positive] = 0.1
    """|log-prob in trainer - in engine| (nats) beyond which a token counts in the metric
    mismatch_share."""
    exclude_mismatch: Annotated[float | None, Positive] = None
    """Excludes a rollout whose mean |difference| (nats) is beyond this; costs one more forward pass
    a step."""
    retries: Annotated[int, ZeroIsOff] = 1
    """How often a completion that an engine lost is drawn again, on another rank's engine; then it
    is excluded."""
    refill_rounds: Annotated[int, ZeroIsOff] = 0
    """Dynamic sampling: rounds in which groups of one class are replaced by those of fresh prompts;
    0: off."""
    chunk_prompts: Annotated[int, ZeroIsOff] = 0
    """Prompts whose rollouts are kept on disk together; 0: a whole step's. Smaller chunks lose less
    to a preemption in the middle of a long step, but every chunk waits for its longest answer."""
    keep_steps: Annotated[int, ZeroIsOff] = 0
    """Newest steps whose rollouts stay on disk; 0: all of them, at most 8 bytes a token."""
    keep_every: Annotated[int, ZeroIsOff] = 0
    """Beside the newest, every so many steps' rollouts stay on disk; 0: no others."""
    keep_groups: Annotated[int, ZeroIsOff] = 0
    """Groups of a finished step whose rollouts are written, drawn by the run's seed; 0: all. A step
    of which some are missing cannot be replayed."""
    replay: str = ""
    """Run directory whose saved rollouts are trained on instead of generating: no engine is
    started."""


@dataclass(frozen=True)
class LabelConfig:
    """How completions are verified."""

    verifier: str = "math_verify"
    """`math_verify`, `exact`, `reasoning_gym`, `code` (docs/sandbox.md), or your own
    `path.py:function`."""
    workers: Annotated[int, Positive] = 2
    """Verifier processes per rank."""
    timeout_seconds: Annotated[float, Positive] = 10.0
    """Wall clock of one check; then its worker is killed."""
    memory_mib: Annotated[int, Positive] = 1024
    """Memory limit of one worker."""
    sandbox: Literal["auto", "require", "off"] = "auto"
    """Holds in verifiers that run what a completion says. `auto`: as far as this node can;
    `require`: the run does not start where it cannot; `off`: no sandbox. See docs/sandbox.md."""
    require_think: bool = False
    """No answer counts without a </think> before it."""
    require_boxed: bool = True
    """No answer counts outside a \\boxed{}; else the end of the text stands in for a missing
    box."""
    # A check that did not end says nothing of the answer, so its rollout is no negative one.
    excluded: tuple[Literal["wrong", "unparsable", "timeout", "crashed"], ...] = (
        "timeout",
        "crashed",
    )
    """Statuses whose rollouts leave their group; those of the other statuses but ok are
    negative."""
    overlong: Literal["negative", "excluded"] = "negative"
    """What a truncated response counts as."""
    # No default: 0.5 and 1 would both be guesses at what a number of a user's verifier means.
    threshold: float | None = None
    """Rewards at or above it are positive; required when a verifier returns anything but 0 or 1."""
    max_failed_share: Annotated[float, Share] = 0.2
    """The run stops when more than this share of a step's checks failed (timeout, crashed or
    lost)."""
    permute: bool = False
    """Control experiment: labels are shuffled over the step's rollouts, so that nothing can be
    learned."""


@dataclass(frozen=True)
class BatchConfig:
    """How a minibatch becomes micro-batches."""

    minibatch_prompts: Annotated[int, Positive] = 32
    """Prompts (groups) per optimizer step; must divide rollout.num_prompts."""
    max_tokens: Annotated[int, Positive] = 16384
    """Token budget of a micro-batch on one rank, over its context-parallel ranks together."""
    layout: Literal["packed", "padded"] = "packed"
    """`packed`: sequences end to end; `padded`: each padded to the micro-batch's longest."""
    placement: Literal["auto", "intact", "dp", "split"] = "auto"
    """Where a group may lie: in a micro-batch, across DP ranks at one index, anywhere; `auto` takes
    the cheapest."""


@dataclass(frozen=True)
class ParallelConfig:
    """The layout; data parallelism is what the world size leaves."""

    tp: Annotated[int, Positive] = 1
    """Tensor parallel size."""
    pp: Annotated[int, Positive] = 1
    """Pipeline parallel size."""
    vpp: Annotated[int, Positive] = 1
    """Model chunks per pipeline stage (interleaved schedule when > 1)."""
    cp: Annotated[int, Positive] = 1
    """Context parallel size."""
    sp: bool = False
    """Sequence parallelism; needs tp > 1."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW as in the paper's recipe."""

    lr: Annotated[float, Positive] = 2e-6
    """Peak learning rate."""
    min_lr: Annotated[float, NonNegative] = 0.0
    """Learning rate at the end of a decay."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Shape after the warm-up."""
    warmup_updates: Annotated[int, NonNegative] = 0
    """Optimizer updates of linear warm-up."""
    weight_decay: Annotated[float, NonNegative] = 0.01
    """Decoupled weight decay."""
    beta1: Annotated[float, _Decay] = 0.9
    """Adam's first moment."""
    beta2: Annotated[float, _Decay] = 0.999
    """Adam's second moment."""
    eps: Annotated[float, Positive] = 1e-8
    """Adam's epsilon."""
    clip_grad: Annotated[float, ZeroIsOff] = 1.0
    """Global gradient norm; 0 switches clipping off."""
    distributed: bool = True
    """Megatron's DistributedOptimizer: states sharded over data-parallel ranks."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on data.heldout."""

    every: Annotated[int, NonNegative] = 0
    """Steps between evaluations; 0: before and after training only, and only where data.heldout is
    given."""
    samples: Annotated[int, Positive] = 1
    """Completions per problem."""
    temperature: Annotated[float, Positive] = 0.6
    """Sampling temperature; pass@1 is the mean over samples."""
    top_p: Annotated[float, Share] = 0.95
    """Nucleus mass."""
    max_problems: Annotated[int, NonNegative] = 0
    """Evaluate only the first so many; 0: all."""
    chunk_problems: Annotated[int, Positive] = 64
    """Problems that `megatron-real eval` answers and keeps at a time; an interruption costs at most
    so many."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run is saved, and which checkpoints are kept. docs/checkpoints.md."""

    every: Annotated[int, ZeroIsOff] = 20
    """Steps between checkpoints; there is one after the last step too. 0: none but when the run is
    stopped."""
    keep: Annotated[int, Positive] = 2
    """Newest checkpoints that are kept."""
    keep_every: Annotated[int, ZeroIsOff] = 0
    """Also keep those after every so many steps; 0: none for that reason."""
    keep_best: bool = True
    """Also keep the one with the best held-out accuracy, among those of steps with an
    evaluation."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written; costs host memory of the size of a rank's
    share."""
    on_failure: Literal["go_on", "stop"] = "go_on"
    """When a checkpoint cannot be written (disk full): warn and try again at the next, or stop the
    run."""


@dataclass(frozen=True)
class TrainerConfig:
    """The run."""

    # May be empty here: plan and eval need none, and train refuses that.
    run_dir: str = ""
    """Everything the run writes: metrics, rollouts, logs, curves, exported weights."""
    steps: Annotated[int, Positive] = 1400
    """Rollout steps; each has rollout.num_prompts / batch.minibatch_prompts optimizer updates."""
    seed: Annotated[int, NonNegative] = 1234
    """Seeds prompt order and sampling."""
    max_skipped_updates: Annotated[int, Positive] = 3
    """Stop after so many updates in a row were skipped for a non-finite loss or gradient."""
    profile: tuple[int, ...] = ()
    """Steps of which a torch profiler trace is written."""
    keep_token_weights: bool = False
    """Keep with the rollouts what each token got: log pi - log pi_old at its update, and the weight
    that the objective gave it. At most 8 bytes a token more; `megatron-real report` shades by
    them."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb: bool = False
    """Log to Weights & Biases (must be installed); WANDB_MODE=offline keeps it in the run
    directory."""
    mlflow: bool = False
    """Log to MLflow (mlflow-skinny must be installed), at MLFLOW_TRACKING_URI, else in files below
    the run directory."""
    trackio: bool = False
    """Log to Trackio (must be installed, and needs transformers 5), where it keeps the runs of this
    machine: TRACKIO_DIR."""
    export: bool = True
    """Write the trained weights as an HF directory at the end."""
    max_hours: Annotated[float, ZeroIsOff] = 0.0
    """The run saves, stops and exits with code 75 after so many hours; 0: no limit."""
    # An hour, and a quarter more: the rank that hangs is named before a collective times out.
    timeout_minutes: Annotated[float, Positive] = 75.0
    """Collectives that wait longer fail. Above hang_minutes, so that a rank that hangs is named
    before."""
    hang_minutes: Annotated[float, Positive] = 60.0
    """A rank that stays in one stage for so long hangs: the run ends and names it. More for very
    long evaluations."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time: what a resumed run needs on a GPU to go on
    bit for bit. Attention's backward pass and the embedding's get slower. On a CPU they are the
    same without. It also keeps each vLLM engine to its share of the prompts (docs/rollouts.md)."""
    peak_tflops: Annotated[float, NonNegative] = 0.0
    """Peak TFLOP/s of one device for MFU; 0: from a table of known GPUs, else MFU is left out."""


@dataclass(frozen=True)
class Given:
    """A value that was given as an interpolation, such as `${oc.env:HF_TOKEN}`."""

    text: str
    """As it was given, and as it is written."""
    # No repr: neither a log nor a traceback may show it.
    value: Any = field(repr=False)
    """What it stands for, which may be a secret."""


@dataclass(frozen=True)
class Config:
    """One run. See each section's dataclass."""

    # In this order they are printed, and written to config.yaml.
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    objective: Objective = field(default_factory=make_objective)
    """The loss, with settings of its own: `objective.name` says which (objective/registry.py)."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    megatron: Mapping[str, Any] = field(default_factory=dict)
    """Any field of megatron-core's TransformerConfig, OptimizerConfig or
    DistributedDataParallelConfig, by name."""
    # Left out of comparisons: two configurations are the same whichever way a value was written.
    given: Mapping[str, Given] = field(default_factory=dict, repr=False, compare=False)
    """No setting, but where settings come from: the path of a value (`rollout.vllm.hf_token`) ->
    how it was given."""

    @property
    def updates_per_step(self) -> int:
        """Updates of the weights in a step: one for each minibatch."""
        return self.rollout.num_prompts // self.batch.minibatch_prompts

    def __post_init__(self) -> None:
        # Bounds first: the sentences about combinations presume values that are possible alone.
        check_bounds(self)
        checks.check_combinations(self)
        upstream.check_megatron_names(self.megatron)
