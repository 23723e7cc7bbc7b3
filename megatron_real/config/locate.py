"""Where the weights are that a value names.

That is a directory, a run's export, or a model of the hub that is in the cache.
"""

from __future__ import annotations

import re
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def weights_directory(word: str, key: str = "model.path") -> str:
    """Returns the directory of HF weights that `word` names.

    A word that names none is returned as it is.

    Args:
        word: a directory of HF weights, a run directory, or a hub id such as `Qwen/Qwen2.5-1.5B`.
        key: the setting that has the value, for the sentences.

    Raises:
        ValueError: a run directory without exported weights, or a hub id that is not cached.
    """
    path = Path(word)
    if is_run_directory(path):
        export = path / "hf"
        if not (export / "config.json").is_file():
            raise ValueError(
                f"{key} is {word!r}, a run that has exported no weights yet; convert a checkpoint "
                f"of it by `megatron-real convert to-hf {word} OUT`, and give OUT"
            )
        return str(export)

    # A directory goes before a hub id of the same spelling.
    if path.exists() or not _HUB_ID.fullmatch(word):
        return word

    cached = cached_model(word)
    if cached is not None:
        return str(cached)
    if path.parent.is_dir():
        return word  # a mistyped path rather than a hub id

    raise ValueError(
        f"{key} is {word!r}, which is neither a directory nor a model in the hub's cache; download "
        f"it where there is a network (`hf download {word}`), or give a directory of HF weights"
    )


def cached_model(hub_id: str) -> Path | None:
    """Returns the snapshot of a hub model in the cache of this machine; None where it has none."""
    from huggingface_hub import try_to_load_from_cache

    # A string is a path; other values say that the hub, or the cache, does not have the file.
    config = try_to_load_from_cache(hub_id, "config.json")
    if not isinstance(config, str):
        return None
    return Path(config).parent


def is_run_directory(path: Path) -> bool:
    """Returns whether a run has written there."""
    return (path / "config.yaml").is_file() and (path / "status.json").is_file()
