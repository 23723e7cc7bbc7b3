"""The weight sync with the embedded engine: what is lost or damaged is named,
and a sync that hangs ends the run.

The same with vLLM: tests/integration/test_vllm.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_real.rollout.checksum import checksum
from tests import zygote
from tests.distributed import sync_jobs
from tests.distributed.world import World

ModelMaker = Callable[..., Path]
NAME = "model.layers.1.mlp.down_proj.weight"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_checksum_sees_every_bit_and_every_place(dtype: torch.dtype) -> None:
    tensor = torch.randn(37, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    swapped = tensor.clone()
    swapped[0, 0] = tensor[36, 4]
    swapped[36, 4] = tensor[0, 0]
    negated = tensor.clone()
    negated[7, 3] = -negated[7, 3]

    sums = [checksum(x) for x in (tensor, swapped, negated, tensor[1:], torch.zeros_like(tensor))]
    assert len(set(sums)) == len(sums)
    assert checksum(tensor.clone()) == checksum(tensor.t().contiguous().t()) == sums[0]


def test_every_single_bit_changes_the_checksum() -> None:
    tensor = torch.linspace(-1, 1, 64)
    checksums = {checksum(tensor)}
    for place in range(64):
        for bit in range(32):
            mask = 1 << bit
            if bit == 31:
                mask = -mask  # the sign bit: 2**31 itself is no int32
            flipped = tensor.clone()
            flipped.view(torch.int32)[place] ^= mask
            checksums.add(checksum(flipped))
    assert len(checksums) == 1 + 64 * 32


@pytest.mark.parametrize("num_elements", [16, 1 << 17], ids=["a rest", "whole blocks"])
def test_signs_that_change_in_pairs_change_the_checksum(num_elements: int) -> None:
    """A product alone would lose them: the sign of every second fp32 element is the uppermost bit
    of its 8 bytes.
    """
    tensor = torch.linspace(1, 2, num_elements)
    tensor[[1, 7]] *= -1
    assert checksum(tensor) != checksum(tensor.abs()) != checksum(-tensor)


def test_a_long_tensor_is_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_real.rollout.checksum._BLOCK", 4)
    tensor = torch.arange(21.0)
    moved = torch.cat([tensor[8:16], tensor[:8], tensor[16:]])
    assert checksum(tensor) != checksum(moved)
    assert checksum(tensor[1:]) == checksum(tensor[1:].clone())


# name -> (ranks, parallel sizes, whether the model has a tied head)
LAYOUTS: dict[str, tuple[int, dict[str, Any], bool]] = {
    "dp2": (2, {}, False),
    "dp2-tied": (2, {}, True),
    "tp2": (2, {"tp": 2, "sp": True}, False),
    "pp2": (2, {"pp": 2}, False),
    "pp2-vpp2": (2, {"pp": 2, "vpp": 2}, False),
    "cp2": (2, {"cp": 2}, False),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damage_is_named(world: World, tiny_model: ModelMaker, layout: str) -> None:
    size, parallel, tied = LAYOUTS[layout]
    path = sync_jobs.complete(tiny_model("qwen2", dtype="float32", tie_word_embeddings=tied))
    name = "lm_head.weight" if layout == "dp2" else NAME

    ranks = world.run(
        sync_jobs.damages, size, config=sync_jobs.config_of(path, **parallel), name=name
    )

    for errors in ranks:
        assert errors["good"] == errors["again"] == ""
        assert f"{name} on ranks 0, 1" in errors["element"]
        assert f"{name} on rank 1" in errors["element-on-one-rank"]
        assert f"{name} on rank 1" in errors["dropped"]
        assert f"the engine got nothing for {name}" in errors["missing"]
        assert "the engine has no tensor model.other.weight" in errors["unknown"]
        assert f"{name} has the shape (" in errors["shape"]
        assert f"{name} came twice" in errors["twice"]
        assert "the engine of rank 1 does not compute with the trainer's weights" in errors["probe"]


@pytest.mark.parametrize(
    "parallel", [{}, {"tp": 2, "pp": 2}, {"cp": 2}, {"pp": 2, "vpp": 2}], ids=str
)
def test_the_mismatch_of_each_rollout(
    world: World, tiny_model: ModelMaker, parallel: dict[str, Any]
) -> None:
    """Against transformers in fp32: the given log-probs are its own,
    moved by a known amount for each rollout.
    """
    from transformers import AutoModelForCausalLM

    path = tiny_model("qwen2", dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(path)
    draw = torch.Generator().manual_seed(3)
    answers = []
    expected = []
    for i, response_length in enumerate((3, 1, 7, 5, 2)):
        prompt_length = 4 + i
        ids = torch.randint(2, 101, (prompt_length + response_length,), generator=draw)
        with torch.inference_mode():
            logprobs_LV = (model(ids[None]).logits[0] / sync_jobs.TEMPERATURE).log_softmax(-1)
        response = ids[prompt_length:]
        # The logits at a token predict the next one.
        sampled = logprobs_LV[prompt_length - 1 : -1].gather(1, response[:, None]).squeeze(1)
        offsets = 0.1 * torch.randn(response_length, generator=draw)
        logprobs = sampled + offsets
        prompt = ids[:prompt_length]
        answers.append(tuple(tuple(x.tolist()) for x in (prompt, response, logprobs)))
        expected.append(float(offsets.abs().mean()))

    size = 4 if parallel else 2
    ranks = world.run(
        sync_jobs.mismatch, size, config=sync_jobs.config_of(path, **parallel), answers=answers
    )

    for means in ranks:
        assert means == pytest.approx(expected, abs=1e-5)


@pytest.mark.one_version
def test_a_hanging_sync_reports_where_each_rank_waits(
    tiny_model: ModelMaker, tmp_path: Path
) -> None:
    path = sync_jobs.complete(tiny_model("qwen2", dtype="float32"))
    script = tmp_path / "hang.py"
    script.write_text(
        "from pathlib import Path\n"
        "from megatron_real.parallel.groups import join_world\n"
        "from tests.distributed import sync_jobs\n"
        "join_world(timeout_minutes=5)\n"
        f"config = sync_jobs.config_of(Path({str(path)!r}), tp=2)\n"
        f"sync_jobs.hang(config, {NAME!r})\n"
    )
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
    command += ["--nproc-per-node", "2", str(script)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}

    process = zygote.run(
        command, capture_output=True, text=True, timeout=300, env=environment, check=False
    )

    stderr = process.stderr
    assert process.returncode != 0
    assert "weight sync 2 did not finish in 8 s (rollout.sync.timeout_seconds)" in stderr
    # The norm has no shards, so rank 0 goes past it; the next tensor's all-gather needs rank 1.
    waits = "rank 0 waits for model.layers.2.self_attn.q_proj.weight"
    assert waits in stderr, stderr[-3000:]
    assert "rank 1 waits for model.layers.2.input_layernorm.weight" in stderr
