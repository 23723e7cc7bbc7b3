"""The HF <-> Megatron mapping: exact round trips, and directories of weights that are broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_real.weights.architecture import Architecture
from megatron_real.weights.hf import HfWeights, write_hf
from megatron_real.weights.mapping import entries


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_every_tensor_once_and_back(tiny_model: Callable[..., Path], family: str, tp: int) -> None:
    weights = HfWeights(tiny_model(family))
    architecture = Architecture.read(weights.directory)
    seen = []
    for entry in entries(architecture):
        tensors = [weights.read(name) for name in entry.hf]
        shards = [entry.shard(tensors, architecture, rank, tp) for rank in range(tp)]
        for name, tensor, back in zip(entry.hf, tensors, entry.join(shards, architecture), strict=True):
            assert torch.equal(tensor, back), name
            seen.append(name)
    assert sorted(seen) == sorted(weights.names)


def test_qkv_rows_are_grouped_by_kv_head() -> None:
    """2 KV heads, 4 query heads of size 1: per group two q rows, then k, then v."""
    numbers = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 4, "intermediate_size": 4}
    rest = {"num_hidden_layers": 1, "vocab_size": 8, "max_position_embeddings": 8}
    architecture = Architecture.from_config({"architectures": ["Qwen2ForCausalLM"], **numbers, **rest})
    entry = next(e for e in entries(architecture) if e.megatron.endswith("linear_qkv.bias"))
    q, k, v = torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20]), torch.tensor([100.0, 200])
    assert entry.shard([q, k, v], architecture, 0, 1).tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


def test_shards_and_index_are_written_and_read(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    source = HfWeights(tiny_model("qwen2"))
    tensors = [(name, source.read(name)) for name in source.names]
    write_hf(tmp_path / "out", tensors, source=source.directory, shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    back = HfWeights(tmp_path / "out")
    assert all(torch.equal(back.read(name), tensor) for name, tensor in tensors)
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_missing_and_truncated_files_are_named(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model.safetensors nor"):
        HfWeights(tmp_path)
    whole = (tiny_model("qwen2") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or corrupt"):
        HfWeights(tmp_path)
    with pytest.raises(ValueError, match="has no tensor lm_tail"):
        HfWeights(tiny_model("qwen2")).read("lm_tail")
