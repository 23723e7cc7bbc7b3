"""The rollout stage and its engines; the lifecycle's names are NeMo-Aligner's."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable

from megatron_real.config import Config, check_engine
from megatron_real.config.engines import AUTO, ENGINES, candidates
from megatron_real.rollout.engines.engine import Engine
from megatron_real.rollout.stage import RolloutStage

__all__ = ["Engine", "RolloutStage", "build_engine", "close_engines", "takes_over"]


def build_engine(config: Config, *, say: Callable[[str], None]) -> Engine:
    """Builds the engine that the configuration names, on all ranks together.

    Args:
        say: tells the user which engine it is, and why.

    Raises:
        ValueError: it is not installed, or does not take the model.
    """
    name = config.rollout.engine
    explanation = ""
    if name == AUTO:
        name, reason = _first_that_works(config)
        explanation = f" (rollout.engine={AUTO}: {reason})"

        # Built anew, so that the configuration's own checks judge what `auto` has become.
        try:
            rollout = dataclasses.replace(config.rollout, engine=name)
            config = dataclasses.replace(config, rollout=rollout)
            if ENGINES[name].sized_kv_cache:
                check_engine(config)
        except ValueError as error:
            raise ValueError(
                f"rollout.engine={AUTO} became {name} ({reason}), but {error}"
            ) from error

    # Imported only now: every engine's module has `missing` and `build`, and vLLM's takes seconds.
    module = importlib.import_module(ENGINES[name].module)
    missing = module.missing(config)
    if missing:
        raise ValueError(
            f"rollout.engine={name}, but {missing}; install {ENGINES[name].package}, or set "
            "another rollout.engine"
        )

    say(f"rollouts by {name}{explanation}")
    # Noted at once: whatever fails later, `close_engines` ends it.
    engine: Engine = module.build(config, say=say)
    _open_engines.append(engine)
    return engine


def takes_over(config: Config, engine: Engine) -> bool:
    """Returns whether engines answer prompts that wait for other ones (backlog.py).

    Who answers then depends on the clock, and so does what is decoded together, by which answers
    may differ in rounding: not where a run is to give the same bits each time.
    """
    rollout = config.rollout
    num_servers = len(rollout.servers) or rollout.num_servers
    one_server = ENGINES[engine.name].own_processes and num_servers == 1
    return not (one_server or config.trainer.deterministic)


def close_engines() -> None:
    """Ends the engines that this process has built, before it leaves its process groups."""
    while _open_engines:
        # Off the list first: an engine whose end fails is not ended a second time.
        _open_engines.pop().close()


_open_engines: list[Engine] = []
"""A job that fails while it is built returns no engine that could be closed."""


def _first_that_works(config: Config) -> tuple[str, str]:
    """Returns the first automatic engine that misses nothing, and why it is that one.

    Raises:
        ValueError: every engine misses something; says what.
    """
    reasons: list[str] = []
    for name, traits in candidates(AUTO).items():
        if config.model.dtype not in traits.dtypes:
            reasons.append(f"{name} knows no {config.model.dtype}")
            continue
        missing = importlib.import_module(traits.module).missing(config)
        if not missing:
            return name, "; ".join(reasons) or f"{traits.package} is installed"
        reasons.append(missing)
    raise ValueError(f"rollout.engine={AUTO} found no engine: {'; '.join(reasons)}")
