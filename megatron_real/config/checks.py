"""What settings must satisfy together, with the number of processes, and with the model."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_real.config import upstream
from megatron_real.config.engines import candidates, has_own_processes, names_with
from megatron_real.config.sources import data_sources
from megatron_real.numerics import DTYPE_BYTES
from megatron_real.weights.architecture import Architecture

if TYPE_CHECKING:
    from megatron_real.config.schema import Config


_KV_BLOCK = 128
"""vLLM hands out KV memory in blocks of so many tokens on a CPU, and of fewer on a GPU."""


def check_world(config: Config, world_size: int) -> int:
    """Returns the data-parallel size of `world_size` processes.

    Raises:
        ValueError: the layout, or the engines, do not divide the world.
    """
    rollout = config.rollout
    # Servers that run already go before those that the run would start.
    num_servers = len(rollout.servers) or rollout.num_servers

    if has_own_processes(rollout.engine):
        # Each server is asked by equally many ranks.
        if world_size % num_servers:
            raise ValueError(
                f"{num_servers} servers cannot be shared equally by {world_size} processes; take "
                f"one of {divisors(world_size)} (rollout.num_servers or rollout.servers)"
            )
    elif world_size % rollout.tp:
        raise ValueError(
            f"rollout.tp = {rollout.tp} does not divide the {world_size} processes; "
            f"take one of {divisors(world_size)}"
        )

    # Data parallelism is what the world size leaves.
    parallel = config.parallel
    model_parallel = parallel.tp * parallel.pp * parallel.cp
    if world_size % model_parallel:
        raise ValueError(
            f"tp {parallel.tp} x pp {parallel.pp} x cp {parallel.cp} = {model_parallel} does not "
            f"divide the {world_size} processes; start a multiple of {model_parallel} or change "
            "parallel.*"
        )

    return world_size // model_parallel


def too_few_sequences(config: Config, dp: int) -> str:
    """Returns what is wrong where an update has fewer rollouts than data-parallel ranks.

    The sentence says what helps; "" where nothing is wrong.
    """
    num_rollouts = config.batch.minibatch_prompts * config.rollout.group_size
    if num_rollouts >= dp:
        return ""
    # Rounded up: a group is not divided.
    num_prompts = -(-dp // config.rollout.group_size)
    return (
        f"{dp} data-parallel ranks share the {num_rollouts} rollouts of an update "
        "(batch.minibatch_prompts x rollout.group_size), so at least "
        f"{dp - num_rollouts} of them idle; take fewer GPUs, raise parallel.tp, pp or cp, or "
        f"batch.minibatch_prompts to {num_prompts}"
    )


def check_model(config: Config) -> None:
    """Checks the layout against the model's own config.json.

    Raises:
        ValueError: the file is missing, the model is not supported, or the layout cannot hold it.
    """
    path = config.model.path
    if not path or not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"model.path is {path!r}, which has no config.json; give a directory of HF weights"
        )
    # From config.json alone: no weights are read.
    model = Architecture.read(path)

    # Tensor parallelism cuts heads and the MLP, pipeline parallelism the layers.
    parallel = config.parallel
    if model.num_heads % parallel.tp:
        raise ValueError(
            f"parallel.tp = {parallel.tp} does not divide the model's {model.num_heads} attention "
            f"heads; take one of {divisors(model.num_heads)}"
        )
    _check_kv_heads("parallel.tp", parallel.tp, model)
    if model.ffn_size % parallel.tp:
        raise ValueError(
            f"parallel.tp = {parallel.tp} does not divide the model's intermediate_size "
            f"{model.ffn_size}"
        )

    # Each chunk of the interleaved schedule has equally many layers.
    num_chunks = parallel.pp * parallel.vpp
    if model.num_layers % num_chunks:
        raise ValueError(
            f"parallel.pp {parallel.pp} x vpp {parallel.vpp} = {num_chunks} does not divide the "
            f"model's {model.num_layers} layers; take a product out of "
            f"{divisors(model.num_layers)}"
        )

    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > model.max_positions:
        raise ValueError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest} exceeds the model's "
            f"max_position_embeddings {model.max_positions}; shorten one of them"
        )

    _check_reference(config, model)
    # With `auto` the engine is not known yet: then only what holds for each of them is checked.
    if all(engine.sized_kv_cache for engine in candidates(config.rollout.engine).values()):
        check_engine(config)


def check_engine(config: Config) -> None:
    """Checks the layout of an engine with a KV cache of fixed size.

    Raises:
        ValueError: the layout cannot hold the model, or the cache not even one sequence.
    """
    rollout = config.rollout
    model = Architecture.read(config.model.path)
    if model.num_heads % rollout.tp:
        raise ValueError(
            f"rollout.tp = {rollout.tp} does not divide the model's {model.num_heads} attention "
            f"heads; take one of {divisors(model.num_heads)}"
        )
    _check_kv_heads("rollout.tp", rollout.tp, model)

    # vLLM does not start with a cache that cannot hold one whole sequence.
    token_bytes = model.kv_bytes_per_token(tp=rollout.tp, width=DTYPE_BYTES[config.model.dtype])
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    # Rounded up twice: to whole blocks, and to whole MiB.
    num_blocks = -(-longest // _KV_BLOCK) + 1  # one block stays empty
    needed_mib = -(-num_blocks * _KV_BLOCK * token_bytes // 2**20)

    if rollout.kv_cache_mib < needed_mib:
        raise ValueError(
            f"rollout.kv_cache_mib = {rollout.kv_cache_mib} does not hold one sequence of "
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}; raise it to at "
            f"least {needed_mib}, better to many times that"
        )


def _check_reference(config: Config, model: Architecture) -> None:
    """Checks that a reference policy has the model's shapes and maths.

    Its weights take the place of the model's own.

    Raises:
        ValueError: it has others, or no config.json.
    """
    path = config.objective.kl.reference_path
    if not config.objective.needs_reference or not path:
        return
    if not (Path(path) / "config.json").is_file():
        raise ValueError(
            f"objective.kl.reference_path is {path!r}, which has no config.json; give a directory "
            "of HF weights"
        )

    reference = Architecture.read(path)
    # All other fields decide shapes or mathematics.
    for field in dataclasses.fields(Architecture):
        if field.name == "max_positions":
            continue  # no weight depends on it
        own = getattr(model, field.name)
        theirs = getattr(reference, field.name)
        if own != theirs:
            raise ValueError(
                f"objective.kl.reference_path = {path!r} has {field.name} {theirs} where the model "
                f"has {own}; give weights of the same architecture"
            )


def _check_kv_heads(name: str, tp: int, model: Architecture) -> None:
    """Checks that the setting `name`, a tensor parallel size, can cut the key-value heads."""
    if not model.can_cut_kv_heads(tp):
        raise ValueError(
            f"{name} = {tp} neither divides the model's {model.num_kv_heads} key-value heads nor "
            f"is a multiple of them; take one of {divisors(model.num_kv_heads)}"
        )


def check_combinations(config: Config) -> None:
    """Checks what several settings must satisfy together.

    Raises:
        ValueError: a combination is impossible, or a setting would have no effect.
    """
    # Called for what it refuses.
    data_sources(config.data)
    _check_sampling(config)
    _check_engine_traits(config)

    rollout = config.rollout
    for address in rollout.servers:
        if not re.fullmatch(r"https?://[^/:@]+:[0-9]+", address):
            raise ValueError(
                f"rollout.servers has {address!r}; an address is of the form http://host:port or "
                "https://host:port"
            )
    upstream.check_vllm_names(rollout.vllm)

    labels = config.labels
    # With a colon it is the user's own, path.py:function.
    if ":" in labels.verifier and (labels.require_think or not labels.require_boxed):
        raise ValueError(
            "labels.require_think and labels.require_boxed have no effect on labels.verifier = "
            f"{labels.verifier!r}, which is given the whole text; leave them at false and true"
        )

    parallel = config.parallel
    if parallel.sp and parallel.tp == 1:
        raise ValueError("parallel.sp=true needs parallel.tp > 1; set parallel.sp=false")
    if parallel.vpp > 1 and parallel.pp == 1:
        raise ValueError(f"parallel.vpp = {parallel.vpp} needs parallel.pp > 1; set parallel.vpp=1")


def _check_sampling(config: Config) -> None:
    """Checks that what is sampled can be trained on: its distribution, its groups, its lengths."""
    rollout = config.rollout
    batch = config.batch

    # log pi is of the whole distribution; one that was cut gives kept tokens more probability.
    is_truncated = rollout.top_p < 1 or rollout.top_k > 0
    if is_truncated and not rollout.allow_truncated_sampling:
        raise ValueError(
            f"rollout.top_p = {rollout.top_p} and rollout.top_k = {rollout.top_k} cut the sampling "
            "distribution, so the log-probs would be biased; use top_p 1 and top_k 0, or set "
            "rollout.allow_truncated_sampling=true"
        )

    if rollout.num_prompts % batch.minibatch_prompts:
        raise ValueError(
            f"batch.minibatch_prompts = {batch.minibatch_prompts} does not divide "
            f"rollout.num_prompts = {rollout.num_prompts}; take one of "
            f"{divisors(rollout.num_prompts)}"
        )

    if config.model.fp32_head and config.model.logprobs == "logits":
        raise ValueError(
            "model.fp32_head needs model.logprobs=linear: with `logits` Megatron's own product "
            "makes them, in model.dtype; leave one of the two out"
        )

    # A group of one rollout has one class, and with most objectives no loss.
    objective = config.objective
    if rollout.group_size < objective.min_group_size:
        raise ValueError(
            f"rollout.group_size = {rollout.group_size} makes every group one-class, which leaves "
            f"no loss to objective.name={objective.name} as it is set; take a group size of at "
            f"least {objective.min_group_size}"
        )

    # A micro-batch never holds a part of a sequence.
    longest = config.data.max_prompt_tokens + rollout.max_response_tokens
    if longest > batch.max_tokens:
        raise ValueError(
            f"batch.max_tokens = {batch.max_tokens} cannot hold one sequence of "
            f"data.max_prompt_tokens + rollout.max_response_tokens = {longest}; raise it to at "
            f"least {longest}"
        )

    trainer = config.trainer
    if trainer.timeout_minutes <= trainer.hang_minutes:
        raise ValueError(
            f"trainer.timeout_minutes = {trainer.timeout_minutes:g} is not above "
            f"trainer.hang_minutes = {trainer.hang_minutes:g}: collectives would fail before the "
            "rank that hangs is named; raise the one or lower the other"
        )


def _check_engine_traits(config: Config) -> None:
    """Checks that the engine can do what is asked of it; with `auto`, that some candidate can."""
    rollout = config.rollout
    name = rollout.engine
    engines = candidates(name).values()
    in_training_processes = not has_own_processes(name)

    # With `auto` a single candidate is enough: those that cannot are passed over.
    if rollout.tp > 1 and not any(engine.tensor_parallel for engine in engines):
        raise ValueError(
            f"rollout.tp = {rollout.tp} needs rollout.engine={names_with('tensor_parallel')}, "
            f"not {name}; set rollout.tp=1"
        )
    if in_training_processes and (rollout.servers or rollout.num_servers > 1):
        raise ValueError(
            "rollout.servers and rollout.num_servers need "
            f"rollout.engine={names_with('own_processes')}, not {name}"
        )

    if rollout.keep_every and not rollout.keep_steps:
        raise ValueError(
            f"rollout.keep_every = {rollout.keep_every} keeps steps that rollout.keep_steps would "
            "delete, which is 0 and deletes none; set rollout.keep_steps=1, or "
            "rollout.keep_every=0"
        )

    if rollout.max_lag and not any(engine.may_lag for engine in engines):
        raise ValueError(
            f"rollout.max_lag = {rollout.max_lag} needs rollout.engine={names_with('may_lag')}, "
            f"not {name}, which computes in the processes that train; set rollout.max_lag=0"
        )
    if rollout.max_lag and (rollout.refill_rounds or rollout.chunk_prompts):
        raise ValueError(
            f"rollout.refill_rounds = {rollout.refill_rounds} and rollout.chunk_prompts = "
            f"{rollout.chunk_prompts} draw a step piece by piece, rollout.max_lag = 1 a whole step "
            "ahead; set the former or the latter to 0"
        )

    if rollout.offload_optimizer and (config.model.dtype != "bf16" or not in_training_processes):
        raise ValueError(
            "rollout.offload_optimizer=true makes room for an engine in the same process, and "
            "needs an optimizer with weights of its own; with model.dtype="
            f"{config.model.dtype} and rollout.engine={name}, set it to false"
        )

    if not any(config.model.dtype in engine.dtypes for engine in engines):
        dtypes = " or ".join(dtype for engine in engines for dtype in engine.dtypes)
        raise ValueError(
            f"model.dtype = {config.model.dtype} is not known to rollout.engine={name}; take "
            f"{dtypes}, or another engine, such as transformers"
        )


def divisors(number: int) -> list[int]:
    """Returns the divisors of a positive number, in order."""
    # Trial division is enough for numbers of ranks, heads and layers.
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
