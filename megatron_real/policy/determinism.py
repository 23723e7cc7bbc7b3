"""Algorithms that give the same bits each time: trainer.deterministic.

Without it, a GPU adds in whatever order its blocks finish: in the backward passes of attention and
of the embedding, and where NCCL chooses its algorithm anew. A resumed run then agrees to rounding.
On a CPU every run is deterministic.
"""

from __future__ import annotations

import os

import torch

_ENVIRONMENT = {
    # TransformerEngine's attention; megatron-core refuses deterministic_mode without it.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    # cuBLAS: workspaces of a fixed size, or streams share one. torch refuses to multiply without.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # NCCL: one algorithm for every size and every start; Megatron-LM asks for one by name, too.
    "NCCL_ALGO": "Ring",
}
"""Variable -> value, where it is not set to another that is deterministic too."""
_ALSO_DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": (":16:8",),
    "NCCL_ALGO": ("Tree", "CollnetDirect", "CollnetChain", "^NVLS"),
}


def allow_only_deterministic() -> None:
    """Sets what torch, TransformerEngine, cuBLAS and NCCL read.

    It must run before the first CUDA call and before the first process group. megatron-core's own
    switch, `deterministic_mode`, is in the model's configuration (PolicySettings). An operation of
    torch that has no deterministic algorithm warns, and is named.

    Raises:
        ValueError: a variable of the environment asks for the opposite.
    """
    for name, value in _ENVIRONMENT.items():
        present = os.environ.setdefault(name, value)
        if present != value and present not in _ALSO_DETERMINISTIC.get(name, ()):
            raise ValueError(
                f"trainer.deterministic=true needs {name}={value}, and the environment has "
                f"{present}; unset it, or set trainer.deterministic=false"
            )

    # warn_only: an operation that has no deterministic algorithm is reported and does not end the
    # run.
    torch.use_deterministic_algorithms(True, warn_only=True)
    # It would also fill every new tensor, which decides nothing where all of them are written
    # before they are read.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
