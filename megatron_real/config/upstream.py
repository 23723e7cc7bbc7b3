"""Names of megatron-core and vLLM that pass through the configuration, and those that may not."""

from __future__ import annotations

import ast
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_real.config.names import nearest

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
    "use_precision_aware_optimizer": (
        False,
        "checkpoints do not know its form of the optimizer's state",
    ),
    "defer_embedding_wgrad_compute": (
        False,
        "the log-prob head computes its weight gradient at once",
    ),
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

# Where megatron-core defines what `megatron.*` can set, below its package.
_MEGATRON_CLASSES = {
    "TransformerConfig": "transformer/transformer_config.py",
    "ModelParallelConfig": "model_parallel_config.py",
    "OptimizerConfig": "optimizer/optimizer_config.py",
    "DistributedDataParallelConfig": "distributed/distributed_data_parallel_config.py",
}


def check_vllm_names(values: Mapping[str, Any]) -> None:
    """Checks `rollout.vllm`.

    Raises:
        ValueError: an argument has a place of its own in the configuration; names it.
    """
    for name in values:
        if name in _OURS_IN_VLLM:
            raise ValueError(
                f"rollout.vllm.{name} is set by {_OURS_IN_VLLM[name]}; set that instead"
            )


def check_megatron_names(values: Mapping[str, Any]) -> None:
    """Checks `megatron`, the settings that go to megatron-core by name.

    Raises:
        ValueError: a name is unknown, has a place of its own in the configuration, or would change
            the objective.
    """
    if not values:
        return  # without reading megatron-core's sources

    known = megatron_fields()

    for name, value in values.items():
        # Before the unknown names: it deserves a plain answer.
        if "lora" in name.lower():
            raise ValueError(f"megatron.{name}: LoRA is not supported; train all weights")
        if name not in known:
            raise ValueError(f"unknown key megatron.{name}{nearest(name, known)}")
        if name in _OURS:
            raise ValueError(f"megatron.{name} is set by {_OURS[name]}; set that instead")
        # Whoever writes out the one value that is allowed changes nothing.
        if name in _REFUSED and value != _REFUSED[name][0]:
            allowed, reason = _REFUSED[name]
            raise ValueError(
                f"megatron.{name} = {value!r} is refused: {reason}; leave it at {allowed}"
            )


@functools.cache
def megatron_fields() -> frozenset[str]:
    """Returns every field that `megatron.*` can set.

    They are read from megatron-core's sources: a wrong name costs no import of it.

    Raises:
        ValueError: megatron-core is not installed.
    """
    # A namespace package: other distributions may have a folder `megatron` too.
    spec = importlib.util.find_spec("megatron")
    folders: list[Path] = []
    if spec is not None:
        folders = [Path(folder) / "core" for folder in spec.submodule_search_locations or ()]
    root = next((folder for folder in folders if folder.is_dir()), None)
    if root is None:
        raise ValueError(
            "megatron-core is not installed; pip install 'megatron-core>=0.16.1,<0.20'"
        )

    names: set[str] = set()
    for cls, file in _MEGATRON_CLASSES.items():
        # Read as text: importing them takes seconds and torch.
        for node in ast.parse((root / file).read_text()).body:
            if not isinstance(node, ast.ClassDef) or node.name != cls:
                continue
            for field in node.body:
                # A dataclass's fields are its annotated assignments; what else it has are methods.
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    names.add(field.target.id)

    return frozenset(names)
