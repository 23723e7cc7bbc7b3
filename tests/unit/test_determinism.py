"""trainer.deterministic: which settings it makes, and that no environment variable undoes them
silently.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_real.config import Config, TrainerConfig
from megatron_real.policy.determinism import allow_only_deterministic
from megatron_real.policy.policy import PolicySettings

NAMES = ("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # remembered, and put back
        del os.environ[name]
    # This module's only name is a property of its class, so it has no type.
    deterministic: Any = torch.utils.deterministic
    fills = deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    deterministic.fill_uninitialized_memory = fills


def test_every_library_is_set_to_be_deterministic() -> None:
    allow_only_deterministic()
    assert [os.environ[name] for name in NAMES] == ["0", ":4096:8", "Ring"]
    assert torch.are_deterministic_algorithms_enabled()
    for deterministic in (False, True):
        settings = PolicySettings.of(Config(trainer=TrainerConfig(deterministic=deterministic)))
        assert settings.megatron["deterministic_mode"] is deterministic


def test_another_deterministic_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    allow_only_deterministic()
    assert os.environ["NCCL_ALGO"] == "Tree"


def test_the_opposite_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "1")
    with pytest.raises(ValueError, match="needs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0"):
        allow_only_deterministic()
