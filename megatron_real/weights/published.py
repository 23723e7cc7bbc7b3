"""Shapes of published models, shipped with the package for `plan` and `rehearse`.

They need no more of a model than its sizes, so that nothing has to be downloaded.

Each is a folder `published_models/NAME` with a config.json of the model's sizes, read by the same
`Architecture.read` as any other directory of HF weights. The sizes are those of the six
DeepSeek-R1-Distill models (huggingface.co/deepseek-ai); tests/unit/test_published.py holds their
numbers of parameters against those that the model cards give. Needs no torch.
"""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).with_name("published_models")

PUBLISHED = (
    "r1-distill-qwen-1.5b",
    "r1-distill-qwen-7b",
    "r1-distill-llama-8b",
    "r1-distill-qwen-14b",
    "r1-distill-qwen-32b",
    "r1-distill-llama-70b",
)
"""Names of the models whose shapes are shipped, by size."""


def published_model(name: str) -> Path:
    """Returns the directory of a published model's config.json.

    It is a value for model.path that has no weights.

    Example:
        path = published_model("r1-distill-qwen-7b")
        config = configuration.load(file, [*overrides, f"model.path={path}"])

    Raises:
        ValueError: no such model is shipped.
    """
    if name not in PUBLISHED:
        raise ValueError(
            f"no shapes of a model {name!r} are shipped; take one of {', '.join(PUBLISHED)}, or "
            "give model.path, a directory with the model's config.json"
        )
    return _FOLDER / name
