"""The number format that a machine computes quickly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from megatron_real import config, numerics
from megatron_real.weights.published import published_model


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16", "bf16"),
        ("flags\t\t: fpu amx_bf16", "bf16"),
        ("Features\t: fp asimd bf16", "bf16"),
        ("flags\t\t: fpu avx2 avx512f", "fp32"),
        ("", "fp32"),
    ],
)
def test_a_cpu_without_bf16_instructions_computes_in_fp32(
    tmp_path: Path, flags: str, dtype: str
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{flags}\n")
    cpuinfo = tmp_path / "cpuinfo"
    assert numerics.fast_dtype(gpu=tmp_path / "none", cpuinfo=cpuinfo) == dtype
    assert numerics.fast_dtype(gpu=cpuinfo, cpuinfo=cpuinfo) == "bf16"


def test_auto_becomes_the_dtype_that_config_yaml_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in ("fp32", "bf16"):
        module = sys.modules[
            "megatron_real.config.load"
        ]  # whose name the package gives to a function
        monkeypatch.setattr(module, "fast_dtype", lambda dtype=dtype: dtype)
        loaded = config.load(published_model("r1-distill-qwen-7b"), ["model.dtype=auto"])
        assert loaded.model.dtype == dtype
        assert config.to_dict(loaded)["model"]["dtype"] == dtype
