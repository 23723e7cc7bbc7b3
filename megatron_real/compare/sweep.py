"""A sweep: a base configuration, variants of it, seeds, and how many rollouts a run may use.

    base: quickstart.yaml         # relative to this file
    out: runs/compare/sums        # relative to where the command is started, as trainer.run_dir
    seeds: [1, 2, 3]
    budget: 30720                 # rollouts of each run; default: those of the base
    variants:
      real: {}                    # the first variant is the one that the others are compared with
      grpo:
        objective: {name: grpo, clip: 0.2}

All runs share prompts, their order, the evaluation and the verifier; a variant that sets one of
these is refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_real import config as configuration
from megatron_real.config import Config, to_plain
from megatron_real.config.names import nearest
from megatron_real.conversion.convert import check_model
from megatron_real.runs.changes import changes
from megatron_real.runs.claim import Earlier
from megatron_real.runs.directory import RunDirectory
from megatron_real.runs.replay import check_replay

_KEYS = ("base", "out", "seeds", "budget", "variants")

_OF_THE_SWEEP: Mapping[str, str] = {
    "trainer.run_dir": "each run has a directory below the sweep's `out`",
    "trainer.seed": "it comes from the sweep's `seeds`",
    "trainer.steps": "it follows from the sweep's `budget`",
}
"""Settings that neither a variant nor the command line may have, with the reason."""

_SHARED: Mapping[str, str] = {
    "data.": "all variants are trained on the same prompts",
    "evaluation.": "all variants are evaluated alike",
    "labels.": "all answers are judged alike",
    "rollout.refill_rounds": "a variant with refills would draw more rollouts than the others",
    "rollout.replay": "all variants draw their own rollouts",
}
"""Settings, or sections, that a variant may not have, with the reason.

The base and the command line may have them.
"""

_A_VARIANTS_OWN = ("labels.permute",)
"""Settings of these sections that a variant may have.

They are controls, which leave the evaluation as it is.
"""

_WITHOUT_EFFECT = (
    "checkpoint.",
    "labels.workers",
    "model.weights",
    "trainer.export",
    "trainer.hang_minutes",
    "trainer.max_hours",
    "trainer.mlflow",
    "trainer.peak_tflops",
    "trainer.profile",
    "trainer.tensorboard",
    "trainer.timeout_minutes",
    "trainer.trackio",
    "trainer.wandb",
)
"""Settings that may differ between the sweep and a run that was made earlier.

No figure depends on them.
"""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: a variant with a seed."""

    variant: str
    """Name of the variant."""
    seed: int
    """trainer.seed."""
    base: Path
    """YAML file that the run is started with."""
    overrides: tuple[str, ...]
    """`key.sub=value` words that make it this run."""
    config: Config
    """The configuration that file and overrides give."""

    @property
    def name(self) -> str:
        """Returns what the run is called in sentences."""
        return f"{self.variant}, seed {self.seed}"

    @property
    def directory(self) -> RunDirectory:
        """Returns where the run is."""
        return RunDirectory(self.config.trainer.run_dir)


@dataclass(frozen=True)
class Sweep:
    """A sweep of which everything has been checked that can be checked without torch."""

    out: Path
    """Directory of the runs and of the table."""
    variants: tuple[str, ...]
    """Names of the variants; the first is the one that the others are compared with."""
    seeds: tuple[int, ...]
    """One run of each variant for each."""
    budget: int
    """Rollouts of each run."""
    runs: tuple[SweepRun, ...]
    """All variants with the first seed, then all with the second: the comparison is whole early."""


def is_sweep(file: str | Path) -> bool:
    """Returns whether a file is a sweep: a YAML file with variants, which no configuration has."""
    path = Path(file)
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    return re.search(r"(?m)^variants\s*:", text) is not None


def load_sweep(
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    num_ranks: int | None = 1,
    to_run: bool = True,
) -> Sweep:
    """Reads a sweep and checks every run of it.

    Args:
        overrides: `key.sub=value` words for all runs.
        num_ranks: processes of each run; None leaves the parallel layout unchecked.
        to_run: also check the models' weights, and the directories of runs that are there already.

    Raises:
        ValueError: one sentence with the remedy; nothing has been written.
    """
    path = Path(file)
    # Each value is checked as it is read, so that an error names the file and the key.
    values = _read(path)
    base = path.parent / _text(path, values, "base")
    out = Path(_text(path, values, "out"))
    seeds = _seeds(path, values.get("seeds"))
    variants = _variants(path, values.get("variants"))

    for word in overrides:
        name = word.partition("=")[0]
        _refuse_setting("the command line", name, _OF_THE_SWEEP)
        if name.startswith("objective"):
            raise ValueError(
                f"the command line sets {name} for all variants; set it in the variants of {path}"
            )

    # After the command line's words, which may change what a step draws.
    budget = _budget(path, values.get("budget"), base, overrides)

    runs: list[SweepRun] = []
    for name, own_overrides in variants.items():
        for word in own_overrides:
            _refuse_setting(f"variant {name} of {path}", word.partition("=")[0], _OF_THE_SWEEP)
            _refuse_setting(f"variant {name} of {path}", word.partition("=")[0], _SHARED)
        try:
            # The variant's words come last: of two that set the same, the later one counts.
            of_variant = _runs_of(name, base, (*overrides, *own_overrides), out, seeds, budget)
            if to_run:
                # What `train` checks before it begins.
                for run in of_variant:
                    if num_ranks is not None:
                        configuration.check_world(run.config, num_ranks)
                    check_model(run.config.model.path, run.config.model.weights)
                    check_replay(run.config)
            runs += of_variant
        # The checks know one configuration and not its variant.
        except ValueError as error:
            raise ValueError(f"variant {name}: {error}") from error

    runs.sort(key=lambda run: seeds.index(run.seed))  # stable: variants keep their order

    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give another out in {path}")
    if to_run:
        for run in runs:
            _check_earlier(run)

    return Sweep(out, tuple(variants), seeds, budget, tuple(runs))


def _read(path: Path) -> dict[str, Any]:
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        raise ValueError(f"there is no sweep {str(path)!r}; give the path of a YAML file")
    try:
        tree = OmegaConf.load(path)
    # OmegaConf lets PyYAML's errors through as they are.
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, DictConfig):
        raise ValueError(
            f"{path} holds a list, not a sweep; begin with a line like 'base: my.yaml'"
        )

    # Not resolved: an interpolation is the business of each run.
    values: Any = OmegaConf.to_container(tree, resolve=False)
    for key in values:
        if key not in _KEYS:
            raise ValueError(f"{path}: unknown key {key}{nearest(str(key), _KEYS)}")
    return dict(values)


def _text(path: Path, values: Mapping[str, Any], key: str) -> str:
    value = values.get(key)
    if not isinstance(value, str) or not value:
        example = "out: runs/compare/first"
        if key == "base":
            example = "base: my.yaml"
        raise ValueError(f"{path}: {key} is {value!r}; give a path, for example {example}")
    return value


def _seeds(path: Path, value: Any) -> tuple[int, ...]:
    numbers: list[Any] = []
    if isinstance(value, list):
        numbers = value
    # type, not isinstance: true is no seed.
    if not numbers or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(
            f"{path}: seeds is {value!r}; give whole numbers, such as seeds: [1, 2, 3]"
        )
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{path}: seeds is {value!r}; each seed may be there once")
    return tuple(numbers)


def _variants(path: Path, value: Any) -> dict[str, tuple[str, ...]]:
    """Reads the words of each variant, by its name.

    Raises:
        ValueError: they are no variants, or a name cannot be a directory's.
    """
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            f"{path}: variants is {value!r}; give each variant a name and the settings in which it "
            "differs"
        )

    variants = {}
    for key, settings in value.items():
        name = str(key)
        # No slash, and no dot in front: the name is that of one directory below out.
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(
                f"{path}: the variant {name!r} names a directory; use letters, digits and . _ + -"
            )
        if settings is not None and not isinstance(settings, Mapping):
            raise ValueError(
                f"{path}: variant {name} is {settings!r}; it takes sections of a configuration, "
                "or {}"
            )
        variants[name] = tuple(_words(settings or {}))
    return variants


def _words(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the `key.sub=value` words that stand for settings of a YAML file."""
    for name, value in settings.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _words(value, f"{path}.")
        elif value is None and not prefix:
            continue  # a section whose lines are all commented out
        elif isinstance(value, str):
            yield f"{path}={value}"
        else:
            yield f"{path}={json.dumps(value)}"


def _refuse_setting(where: str, name: str, reasons: Mapping[str, str]) -> None:
    if name in _A_VARIANTS_OWN:
        return
    for setting, reason in reasons.items():
        # A section is refused as a whole, a setting by its own name.
        section = setting.endswith(".") and name.startswith(setting)
        if name == setting or name == setting.rstrip(".") or section:
            raise ValueError(f"{where} sets {name}, but {reason}; leave it out")


def _budget(path: Path, value: Any, base: Path, overrides: Iterable[str]) -> int:
    if value is None:
        config = configuration.load(base, overrides)
        return config.trainer.steps * _rollouts_per_step(config)
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: budget is {value!r}; give a number of rollouts above 0")
    return value


def _rollouts_per_step(config: Config) -> int:
    return config.rollout.num_prompts * config.rollout.group_size


def _runs_of(
    variant: str,
    base: Path,
    overrides: tuple[str, ...],
    out: Path,
    seeds: Iterable[int],
    budget: int,
) -> list[SweepRun]:
    """Returns the runs of a variant, one for each seed.

    Raises:
        ValueError: the configuration is refused, or the budget is no whole number of steps.
    """
    config = configuration.load(base, overrides)
    per_step = _rollouts_per_step(config)

    # Equal rollouts, not equal steps: a variant may draw more or fewer in a step.
    steps, rest = divmod(budget, per_step)
    if rest or not steps:
        raise ValueError(
            f"a step draws {per_step} rollouts, which do not divide the budget of {budget}; take a "
            f"budget of {max(1, steps) * per_step} rollouts, or another rollout.num_prompts"
        )

    runs = []
    for seed in seeds:
        run_dir = str(out / variant / f"seed-{seed}")
        trainer = dataclasses.replace(config.trainer, steps=steps, seed=seed, run_dir=run_dir)
        of_run = dataclasses.replace(config, trainer=trainer)
        # The same settings as words: the run's process loads base and overrides, not this object.
        settings = (f"trainer.steps={steps}", f"trainer.seed={seed}", f"trainer.run_dir={run_dir}")
        runs.append(SweepRun(variant, seed, base, (*overrides, *settings), of_run))
    return runs


def _check_earlier(run: SweepRun) -> None:
    """Refuses a directory of another run, or of this one under other settings.

    Its figures would be mixed with the present ones.

    Raises:
        ValueError: names the setting and the remedy.
    """
    earlier = Earlier.read(run.directory)
    if earlier.config is None:
        return

    # A run of an earlier version did what is the default of settings that it did not have.
    defaults = dataclasses.replace(Config(), objective=type(run.config.objective)())
    not_default = {name for name, _, _ in changes(to_plain(defaults), to_plain(run.config))}

    for name, before, now in changes(earlier.config, to_plain(run.config)):
        is_new = before is None and name not in not_default
        # A job on a cluster gives whole paths. An empty text would resolve to the working
        # directory, and names no file.
        is_same_path = False
        if isinstance(before, str) and isinstance(now, str) and before and now:
            is_same_path = Path(before).resolve() == Path(now).resolve()

        if is_new or is_same_path or name.startswith(_WITHOUT_EFFECT):
            continue
        raise ValueError(
            f"{run.directory.path} was made with {name}={before!r}, and the sweep says {now!r}; "
            f"give another out, or delete {run.directory.path} to run it anew"
        )
