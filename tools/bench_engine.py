"""What the benchmarks of the rollouts share: a small Qwen2 with a tokenizer on disk, a policy and a vLLM engine."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from make_tiny_model import new_tokenizer

from megatron_real.config import BatchConfig, Config, DataConfig, ModelConfig, ParallelConfig, RolloutConfig
from megatron_real.policy.layout import join_world

VOCAB = 32768
SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": VOCAB}
HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 4096}
PROMPT_TOKENS = 64


@contextlib.contextmanager
def configured(*, dtype: Any, response_tokens: int, kv_cache_mib: int, **parallel: Any) -> Iterator[Config]:
    """Joins the world; the configuration of a random model in a directory that all ranks see while it lasts."""
    join_world(timeout_minutes=10)
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared, src=0)
        (path,) = shared
        if dist.get_rank() == 0:
            _write_model(path)
        dist.barrier()
        yield Config(
            model=ModelConfig(path=path, dtype=dtype),
            data=DataConfig(max_prompt_tokens=PROMPT_TOKENS),
            rollout=RolloutConfig(engine="vllm", max_response_tokens=response_tokens, kv_cache_mib=kv_cache_mib),
            batch=BatchConfig(max_tokens=PROMPT_TOKENS + response_tokens),
            parallel=ParallelConfig(**parallel),
        )
        dist.barrier()


def _write_model(directory: str) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=False)).save_pretrained(directory)
    new_tokenizer().save_pretrained(directory)
    (Path(directory) / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
