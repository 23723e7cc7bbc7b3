"""The prompts of a run: data.train or the mixture of data.sources, and data.heldout."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from megatron_real.config import Config, DataConfig
from megatron_real.config.sources import SourceConfig, data_sources
from megatron_real.prompts.dataset import load_prompts
from megatron_real.prompts.mixture import mixed, pass_rates, sometimes_solved
from megatron_real.records import Prompt


def training_prompts(config: Config, tokenizer: Any) -> list[Prompt]:
    """Returns the prompts of data.train, or one epoch of the mixture of data.sources.

    Raises:
        ValueError: data or pass rates cannot be read, or leave nothing; one sentence.
    """
    data = config.data
    sources = data_sources(data) or {"": SourceConfig(data.train, data.train_split)}
    # Before the sets are tokenised: a wrong path is said at once.
    rates = None
    if data.pass_rates:
        rates = pass_rates(Path(data.pass_rates))

    sets: dict[str, list[Prompt]] = {}
    for name, source in sources.items():
        sets[name] = _prompts(source, data, tokenizer)
    if rates is not None:
        sets = {name: sometimes_solved(prompts, rates) for name, prompts in sets.items()}

    if not data.sources:
        return sets[""]
    weights = {name: source.weight for name, source in sources.items()}
    return mixed(sets, weights, seed=config.trainer.seed)


def heldout_prompts(config: Config, tokenizer: Any) -> list[Prompt]:
    """Returns the prompts of data.heldout; none where there is no evaluation.

    Raises:
        ValueError: as `load_prompts`.
    """
    data = config.data
    if not data.heldout:
        return []
    return _prompts(SourceConfig(data.heldout, data.heldout_split), data, tokenizer)


def _prompts(source: SourceConfig, data: DataConfig, tokenizer: Any) -> list[Prompt]:
    """Returns the prompts of one set, each with the set's own suffix and verifier."""
    # "" is a suffix too: a set that asks for none must not get the run's.
    suffix = data.suffix
    if source.suffix is not None:
        suffix = source.suffix
    prompts = load_prompts(
        source.path,
        tokenizer,
        split=source.split,
        suffix=suffix,
        max_tokens=data.max_prompt_tokens,
    )
    return [dataclasses.replace(prompt, verifier=source.verifier) for prompt in prompts]
