"""The HF <-> Megatron mapping: rows are in their places, and shards join to what they were cut
from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_real.weights.architecture import Architecture
from megatron_real.weights.hf import HfWeights
from megatron_real.weights.mapping import Coordinates, Entry, entries, hf_shapes
from megatron_real.weights.stored import OpenFiles, torch_dtype


def shard(
    entry: Entry, weights: HfWeights, architecture: Architecture, rank: int, tp: int
) -> Tensor:
    """Returns what tensor-parallel rank `rank` of `tp` loads."""
    coordinates = Coordinates(rank, tp)
    rectangle = entry.shard(coordinates, padded_rows=architecture.padded_vocab(tp))
    piece = weights.megatron_piece(entry, rectangle)
    assert coordinates.on(entry.over) == ((rank, tp) if entry.over == "tp" else (0, 1))
    with OpenFiles() as files:
        data = piece.read(files, block_bytes=1000)
    return torch.frombuffer(data, dtype=torch_dtype(piece.dtype)).reshape(piece.shape)


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("qwen2", {}),
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
        ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    ],
    ids=["qwen2", "llama", "llama-biases", "qwen3-tied"],
)
def test_every_tensor_is_mapped_once_and_back(
    tiny_model: Callable[..., Path], family: str, sizes: dict[str, object], tp: int
) -> None:
    weights = HfWeights(tiny_model(family, num_key_value_heads=4, num_hidden_layers=2, **sizes))
    architecture = Architecture.read(weights.directory)
    assert {name: tensor.shape for name, tensor in weights.tensors.items()} == hf_shapes(
        architecture
    )
    assert (
        sum(tensor.shape[0] * tensor.columns for tensor in weights.tensors.values())
        == architecture.num_parameters
    )

    seen = []
    for entry in entries(architecture):
        shards = [shard(entry, weights, architecture, rank, tp) for rank in range(tp)]
        assert len({s.shape for s in shards}) == 1
        for name, shape, back in zip(entry.parts, entry.shapes, entry.join(shards), strict=True):
            assert torch.equal(weights.read(name), back[: shape[0]]), name
            seen.append(name)

    assert sorted(seen) == sorted(weights.names)


def test_qkv_rows_are_grouped_by_kv_head() -> None:
    """With 2 KV heads and 4 query heads of size 1, each group holds two q rows, then k, then v."""
    numbers = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 4,
        "intermediate_size": 4,
    }
    rest = {"num_hidden_layers": 1, "vocab_size": 8, "max_position_embeddings": 8}
    architecture = Architecture.from_config(
        {"architectures": ["Qwen2ForCausalLM"], **numbers, **rest}
    )
    entry = next(e for e in entries(architecture) if e.key.endswith("linear_qkv.bias"))

    # (part, first row, number of rows), with the parts q, k and v.
    assert entry.spans == [(0, 0, 2), (1, 0, 1), (2, 0, 1), (0, 2, 2), (1, 1, 1), (2, 1, 1)]

    joined = entry.join([torch.tensor([1.0, 2, 10, 100, 3, 4, 20, 200])])
    assert [part.tolist() for part in joined] == [[1, 2, 3, 4], [10, 20], [100, 200]]


def test_a_rank_reads_only_its_own_slices(tiny_model: Callable[..., Path]) -> None:
    """The bytes that two ranks read add up to the file's data, with norms read twice and padding
    not at all.
    """
    weights = HfWeights(tiny_model("qwen2"))
    architecture = Architecture.read(weights.directory)
    read = [0, 0]

    class Counting(OpenFiles):
        def read_into(self, file: Path, offset: int, block: memoryview) -> None:
            read[rank] += len(block)
            super().read_into(file, offset, block)

    for rank in range(2):
        with Counting() as files:
            for entry in entries(architecture):
                own = entry.shard(Coordinates(rank, 2), padded_rows=architecture.padded_vocab(2))
                for _ in weights.megatron_piece(entry, own).blocks(files, 2**16):
                    pass
    norms = (2 * architecture.num_layers + 1) * architecture.hidden_size

    # The tiny model is float64: 8 bytes a number.
    assert sum(read) == 8 * (architecture.num_parameters + norms)
    assert read[0] > read[1], "the vocabulary of 101 is padded to 256: rank 1 has zeros only"


def test_missing_and_truncated_files_are_named(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"has no model.safetensors"):
        HfWeights(tmp_path)
    whole = (tiny_model("qwen2") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"model.safetensors has \d+ bytes where its header says \d+"
    ):
        HfWeights(tmp_path)
    with pytest.raises(ValueError, match="has no tensor lm_tail"):
        HfWeights(tiny_model("qwen2")).read("lm_tail")
