"""The shapes that ship with the package are those of the published models."""

from __future__ import annotations

import pytest

from megatron_real.weights.architecture import Architecture
from megatron_real.weights.published import PUBLISHED, published_model

# Numbers of parameters that the Hub shows for the published safetensors of
# deepseek-ai/DeepSeek-R1-Distill-*.
PARAMETERS = {
    "r1-distill-qwen-1.5b": 1_777_088_000,
    "r1-distill-qwen-7b": 7_615_616_512,
    "r1-distill-llama-8b": 8_030_261_248,
    "r1-distill-qwen-14b": 14_770_033_664,
    "r1-distill-qwen-32b": 32_763_876_352,
    "r1-distill-llama-70b": 70_553_706_496,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_parameters(name: str) -> None:
    assert Architecture.read(published_model(name)).num_parameters == PARAMETERS[name]


def test_an_unknown_name_is_refused_with_those_that_are_shipped() -> None:
    with pytest.raises(ValueError, match=r"r1-distill-qwen-7b"):
        published_model("r1-distill-qwen-8b")
