"""Options and models shared by all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the long grids too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    left_out = [item for item in items if item.get_closest_marker("grid")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("grid")]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes, once per set of sizes, an HF directory with a random model whose every weight matters."""
    import torch
    import transformers

    made: dict[tuple[object, ...], Path] = {}

    def make(
        family: str = "qwen2", *, seed: int = 0, moved: float = 0.0, dtype: str = "float64", **sizes: object
    ) -> Path:
        """`moved`: standard deviation of noise on top of the same weights, for a policy that has been updated."""
        key = (family, seed, moved, dtype, str(sorted(sizes.items())))
        if key not in made:
            shape = {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 8,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 101,
                "max_position_embeddings": 256,
                "tie_word_embeddings": False,
                "rms_norm_eps": 1e-6,
            } | sizes
            name = {"qwen2": "Qwen2", "llama": "Llama", "qwen3": "Qwen3"}[family]
            torch.manual_seed(seed)
            config = getattr(transformers, f"{name}Config")(**shape)
            model = getattr(transformers, f"{name}ForCausalLM")(config).double()
            for parameter in model.parameters():  # biases start at 0 and norms at 1: move them too
                parameter.data += torch.randn_like(parameter) * (0.1 if parameter.dim() > 1 else 0.2)
            for parameter in model.parameters():
                parameter.data += moved * torch.randn_like(parameter)
            path = tmp_path_factory.mktemp("model")
            model.to(getattr(torch, dtype)).save_pretrained(path)
            made[key] = path
        return made[key]

    return make
