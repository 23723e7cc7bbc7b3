"""The kernels of the log-prob head, compiled for GPUs that this machine does not have.

pytest -s --all prints the table of docs/benchmarks.md: registers, bytes of spills and shared memory
of each kernel.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.amount import core

triton = pytest.importorskip("triton")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.skipif(
    not all((BINARIES / name).exists() for name in ("ptxas", "cuobjdump")),
    reason="this triton comes without ptxas and cuobjdump",
)


def compiled(kernel: str, dtype: str, architecture: int) -> Any:
    """Returns the kernel as Triton compiles it for an architecture (90 is sm_90)
    and logits of a dtype.

    Pointers, row stride and columns are multiples of 16, as torch's buffers and whole chunks of
    8192 columns are.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megatron_real.policy import logit_kernels

    types = {
        "logits": f"*{dtype}", "gradient": f"*{dtype}", "row_stride": "i32", "target": "*i64",
        "lse": "*fp32", "picked": "*fp32", "num_columns": "i32", "first": "i32",
        "inverse_temperature": "fp32", "BLOCK": "constexpr",
    }  # fmt: skip
    function = {"fold": logit_kernels.fold_kernel, "gradient": logit_kernels.gradient_kernel}[
        kernel
    ]
    block = logit_kernels.FOLD_BLOCK
    warps = logit_kernels.FOLD_WARPS
    if kernel == "gradient":
        configuration = logit_kernels.GRADIENT_CONFIGURATIONS[0]
        block = configuration.kwargs["BLOCK"]
        warps = configuration.num_warps
    aligned = {
        (function.arg_names.index(name),): [["tt.divisibility", 16]]
        for name in ("logits", "gradient", "row_stride", "target", "lse", "picked", "num_columns")
        if name in function.arg_names
    }
    source = ASTSource(
        fn=function,
        signature={name: types[name] for name in function.arg_names},
        constexprs={"BLOCK": block},
        attrs=aligned,
    )
    return triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps}
    )


def resources(binary: bytes, tmp_path: Path) -> dict[str, int]:
    """Returns what the assembler allots: registers of a thread (REG), its bytes of LOCAL and STACK
    memory, and a program's SHARED bytes.
    """
    file = tmp_path / "kernel.cubin"
    file.write_bytes(binary)
    command = [str(BINARIES / "cuobjdump"), "--dump-resource-usage", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}


# Recipes train in bf16, and their GPUs are of sm_90: by default each kernel is compiled for that.
@pytest.mark.parametrize("architecture", core([80, 90, 100], kept=[90]))
@pytest.mark.parametrize("kernel", ["fold", "gradient"])
@pytest.mark.parametrize("dtype", core(["bf16", "fp32"], kept=["bf16"]))
def test_the_kernels_compile_without_register_spills(
    kernel: str, dtype: str, architecture: int, tmp_path: Path
) -> None:
    result = compiled(kernel, dtype, architecture)
    used = resources(result.asm["cubin"], tmp_path)
    spilled = used["STACK"] + used["LOCAL"]
    print(
        f"| {kernel} | {dtype} | sm_{architecture} | {used['REG']} | {spilled} | {used['SHARED']} |"
    )

    assert spilled == 0, f"{used}: registers spill to memory"
    # 64 registers in 8 warps leave room for four programs on a multiprocessor, which hide each
    # other's loads.
    assert used["REG"] <= 64, used
    assert "ld.global.v4" in result.asm["ptx"], "a load is not of 16 bytes"

    if dtype == "bf16" and kernel == "gradient":
        # The interpreter cuts off what the hardware rounds: that it is rounded to the nearest can
        # be seen here alone.
        assert "cvt.rn.bf16" in result.asm["ptx"]
