"""What the benchmarks of the rollouts share: a small Qwen2 with a tokenizer on disk,
and a configuration with vLLM.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from bench_model import shared_directory, write_model
from make_tiny_model import new_tokenizer

from megatron_real.config import (
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
)

VOCAB = 32768
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
}
PROMPT_TOKENS = 64


@contextlib.contextmanager
def configured(
    *, dtype: Any, response_tokens: int, kv_cache_mib: int, **parallel: Any
) -> Iterator[Config]:
    """Joins the world; the configuration of a random model in a directory that
    all ranks see while it lasts.
    """
    with shared_directory() as path:
        write_model(path, **SHAPE)
        if dist.get_rank() == 0:
            new_tokenizer().save_pretrained(path)
            (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
        dist.barrier()
        yield Config(
            model=ModelConfig(path=str(path), dtype=dtype),
            data=DataConfig(max_prompt_tokens=PROMPT_TOKENS),
            rollout=RolloutConfig(
                engine="vllm", max_response_tokens=response_tokens, kv_cache_mib=kv_cache_mib
            ),
            batch=BatchConfig(max_tokens=PROMPT_TOKENS + response_tokens),
            parallel=ParallelConfig(**parallel),
        )
