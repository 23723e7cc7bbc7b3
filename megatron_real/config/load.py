"""Reads a configuration: a YAML file, overridden by words, becomes a checked `Config`.

And a `Config` becomes plain values again.

    YAML files --base--> tree --overrides--> tree --interpolation--> values
        --types, bounds, checks--> Config

A file may name another one as its `base:`, relative to itself, and then says only what differs.
Words of the command line are typed by the field that they set: where it is text, they are taken
letter by letter.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args, get_origin

from megatron_real.bounds import hints, plain_hint
from megatron_real.config import checks
from megatron_real.config.locate import weights_directory
from megatron_real.config.names import nearest
from megatron_real.config.schema import Config, Given
from megatron_real.numerics import fast_dtype
from megatron_real.objective.objective import Objective
from megatron_real.objective.registry import OBJECTIVES, objective_class

if TYPE_CHECKING:
    from omegaconf import DictConfig

_DEFAULT_OBJECTIVE = "real"
"""The objective where none is named."""
_FEWEST_LETTERS_OF_A_SECRET = 4
"""A shorter value is no secret, and would be found all over a sentence."""
# What other trainers call weights of tokens for the mismatch between engine and trainer: verl (the
# first three), slime, OpenRLHF, TRL, NeMo-RL and ms-swift.
_MISMATCH_WEIGHTS = frozenset([
    "tis_imp_ratio_cap", "rollout_is", "rollout_is_threshold", "use_tis", "tis_clip",
    "tis_clip_low", "enable_vllm_is_correction", "vllm_is_truncated_threshold",
    "vllm_importance_sampling_correction", "vllm_importance_sampling_cap",
    "use_importance_sampling_correction", "truncated_importance_sampling_ratio",
    "rollout_importance_sampling_mode",
])  # fmt: skip
_KINDS = {
    int: "a whole number",
    float: "a number",
    # Without quotes YAML reads 12 as a number, and yes as true.
    str: "text: put it in quotes",
    bool: "true or false",
}


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, applies `key.sub=value` overrides and checks the result.

    Everything is checked that needs no process group. A directory of HF weights stands for a file
    that says nothing but its path.

    Raises:
        ValueError: an unknown key, a wrong type or an impossible combination, in one sentence with
            the remedy.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # A list, because it is read more than once.
    overrides = list(overrides)
    for word in overrides:
        if "=" not in word:
            raise ValueError(
                f"override {word!r} has no '='; write key.sub=value, for example trainer.steps=10"
            )

    if not Path(path).exists():
        raise ValueError(f"there is no config file {str(path)!r}; give the path of a YAML file")

    try:
        if Path(path).is_dir():
            tree = OmegaConf.create({"model": {"path": str(path)}})
        else:
            tree = _read_file(Path(path), ())
        # Before interpolations are resolved: those of the file see what the command line has set.
        tree = _over(tree, _overrides_tree(overrides, tree))
        values: Any = OmegaConf.to_container(tree, resolve=True)
        # Kept beside the values, for config.yaml and for sentences: what stands for a secret is
        # written, and not the secret.
        as_given: Any = OmegaConf.to_container(tree, resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        # Their errors span several lines, of which the first says what is wrong.
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error

    try:
        _settle_model(values)
        config = _build(Config, values, "")
        # With the values as they were built: 8, and not the "8" that the environment had.
        interpolations = dict(_interpolations(as_given, _resolved(config), ""))
        config = dataclasses.replace(config, given=interpolations)
        checks.check_model(config)
    except ValueError as error:
        # What an interpolation stands for may be a secret: the sentence shows the text instead.
        sentence = str(error)
        for entry in dict(_interpolations(as_given, values, "")).values():
            # The sentence may have the value in quotes; the text stands there without them.
            sentence = sentence.replace(repr(entry.value), entry.text)
            if isinstance(entry.value, str) and len(entry.value) >= _FEWEST_LETTERS_OF_A_SECRET:
                sentence = sentence.replace(entry.value, entry.text)
        # Without its cause, whose own text may hold the secret.
        raise ValueError(sentence) from None
    return cast(Config, config)


def _settle_model(values: Any) -> None:
    """Settles what this machine decides about the model.

    Directories take the place of run directories and of hub ids that are cached, and a number
    format that of `auto`: a run, and its resumption elsewhere, must know which it is.
    """
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        return  # _build says what is wrong with it
    model = values["model"]
    if isinstance(model.get("path"), str):
        model["path"] = weights_directory(model["path"])
    if model.get("dtype") == "auto":
        model["dtype"] = fast_dtype()


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as plain values.

    So it is written to run directories, checkpoints and trackers. A value that was given as an
    interpolation, such as `${oc.env:HF_TOKEN}`, is written as it was given: what it stands for may
    be a secret.
    """
    values: dict[str, Any] = _with_interpolations(_resolved(config), config.given, "")
    return values


def to_plain(config: Config) -> dict[str, Any]:
    """Returns the same as a file gives it back: lists for tuples."""
    return dict(json.loads(json.dumps(to_dict(config))))


def _resolved(config: Config) -> dict[str, Any]:
    """Returns every setting by section, what was given as an interpolation resolved."""
    values = dataclasses.asdict(config)
    del values["given"]
    # An objective's name is an attribute of its class, and no field.
    values["objective"] = {"name": config.objective.name, **values["objective"]}
    return values


def _read_file(path: Path, derived: tuple[Path, ...]) -> DictConfig:
    """Returns the tree of a YAML file, laid over that of its base.

    Args:
        path: the file.
        derived: the files that led here, each naming the next as its base.

    Raises:
        ValueError: the bases go in a circle, one of them is missing, or the file holds a list.
    """
    from omegaconf import DictConfig, OmegaConf

    # Resolved: the same file may be named in several ways.
    chain = (*derived, path.resolve())
    if path.resolve() in derived:
        names = " -> ".join(file.name for file in chain)
        raise ValueError(
            f"the bases of {chain[0]} go in a circle: {names}; remove one of the base:"
        )

    tree = OmegaConf.load(path)
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{path} holds a list, not sections; begin with a line like 'model:'")
    for section in [key for key, value in tree.items() if value is None]:
        del tree[section]  # its lines are all commented out: it differs in nothing from the base

    base = tree.pop("base", None)
    if base is None:
        return tree

    file = path.parent / str(base)
    if not file.is_file():
        raise ValueError(f"{path}: base is {base!r}, but there is no file {file}")
    return _over(_read_file(file, chain), tree)


def _over(below: DictConfig, above: DictConfig) -> DictConfig:
    """Returns `above` laid over `below`: section by section, value by value.

    A list replaces a list. Where `above` names another objective, the settings of the one below are
    not for it and are left out.
    """
    from omegaconf import OmegaConf

    name = OmegaConf.select(above, "objective.name")
    name_below = OmegaConf.select(below, "objective.name", default=_DEFAULT_OBJECTIVE)
    if name is not None and name != name_below:
        # OmegaConf would merge both objectives' settings, and the new one refuse the old one's.
        below = OmegaConf.masked_copy(below, [str(key) for key in below if key != "objective"])
    return cast("DictConfig", OmegaConf.merge(below, above))


def _overrides_tree(overrides: Sequence[str], below: DictConfig) -> DictConfig:
    """Returns the tree that `key.sub=value` words stand for.

    Args:
        overrides: of the command line.
        below: the file's tree, which they override.
    """
    from omegaconf import OmegaConf

    # Which settings are text depends on the objective, which the last word for it names.
    objective_name = OmegaConf.select(below, "objective.name", default=_DEFAULT_OBJECTIVE)
    for word in overrides:
        key, _, value = word.partition("=")
        if key == "objective.name":
            objective_name = value

    tree = OmegaConf.create({})
    for word in overrides:
        key, _, value = word.partition("=")
        if _is_text(key.split("."), str(objective_name)):
            # Letter by letter: OmegaConf would read 1e5 as a number and {a} as a section.
            nested: Any = value
            for name in reversed(key.split(".")):
                nested = {name: nested}
            layer = OmegaConf.create(nested)
        else:
            layer = OmegaConf.from_dotlist([word])
        # Word by word: of two for one setting the later counts.
        tree = cast("DictConfig", OmegaConf.merge(tree, layer))
    return tree


def _is_text(path: list[str], objective_name: str) -> bool:
    """Returns whether the setting at `path` is text."""
    if path == ["objective", "name"]:
        return True

    # Walks down the dataclasses along the path.
    section: Any = Config
    if path[0] == "objective" and objective_name in OBJECTIVES:
        section = objective_class(objective_name)
        path = path[1:]
    for name in path[:-1]:
        section = plain_hint(hints(section).get(name))
        # Below a mapping such as rollout.vllm no types are known.
        if not dataclasses.is_dataclass(section):
            return False
    return bool(path) and plain_hint(hints(section).get(path[-1])) is str


def _interpolations(as_given: Any, value: Any, path: str) -> Iterator[tuple[str, Given]]:
    """Yields path, text and value of everything that was given as an interpolation.

    Args:
        as_given: a value of the tree, interpolations not resolved.
        value: the same, resolved.
        path: of the value, with dots.
    """
    if isinstance(as_given, str) and "${" in as_given:
        yield path, Given(text=as_given, value=value)
    elif isinstance(as_given, Mapping):
        for name, below in as_given.items():
            yield from _interpolations(below, value[name], _below(path, name))
    elif isinstance(as_given, list):
        for i, below in enumerate(as_given):
            yield from _interpolations(below, value[i], _below(path, i))


def _with_interpolations(value: Any, given: Mapping[str, Given], path: str) -> Any:
    """Returns `value` with the texts that were given in place of what they stand for.

    What has changed since stays.
    """
    if path in given and given[path].value == value:
        return given[path].text
    if isinstance(value, Mapping):
        return {
            name: _with_interpolations(below, given, _below(path, name))
            for name, below in value.items()
        }
    if isinstance(value, (list, tuple)):
        items = [
            _with_interpolations(below, given, _below(path, i)) for i, below in enumerate(value)
        ]
        # A list stays a list, and a tuple a tuple.
        return type(value)(items)
    return value


def _below(path: str, name: object) -> str:
    if not path:
        return str(name)
    return f"{path}.{name}"


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Makes the dataclass `cls` of plain values.

    Args:
        cls: Config, one of its sections, or an objective.
        values: by the name of the field.
        prefix: the path of the section with a dot behind it, for the sentences; "" for Config.

    Raises:
        ValueError: an unknown name or a value of a wrong type.
    """
    # Annotations, not defaults: they say the type of a setting whose default is None.
    known = dict(hints(cls))
    if cls is Config:
        del known["given"]  # no setting

    arguments = {}
    for name, value in values.items():
        # Before the names that are merely unknown: the nearest one would lead astray.
        if name in _MISMATCH_WEIGHTS and name not in known:
            raise ValueError(
                f"unknown key {prefix}{name}; the mismatch between engine and trainer is not "
                "weighted away here: watch the mismatch metrics, or set rollout.exclude_mismatch"
            )
        if name not in known:
            raise ValueError(f"unknown key {prefix}{name}{nearest(str(name), known)}")

        hint = plain_hint(known[name])
        if cls is Config and name == "objective":
            arguments[name] = _build_objective(value)
        elif dataclasses.is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"{prefix}{name} is {value!r}; it is a section and takes keys below it"
                )
            arguments[name] = _build(cast(type, hint), value, f"{prefix}{name}.")
        else:
            arguments[name] = _typed(value, hint, f"{prefix}{name}")

    return cls(**arguments)


def _build_objective(values: Any) -> Objective:
    """Makes the objective that `name` names.

    Raises:
        ValueError: an unknown name, a setting of another objective, or a value of a wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"objective is {values!r}; it is a section and takes keys below it")
    settings = dict(values)
    name = str(settings.pop("name", _DEFAULT_OBJECTIVE))
    cls = objective_class(name)

    for setting in map(str, settings):
        if setting in hints(cls):
            continue
        # A setting of another objective is a likelier slip than a wrong letter.
        owners = [owner for owner in OBJECTIVES if setting in hints(objective_class(owner))]
        if owners:
            raise ValueError(
                f"objective.{setting} is a setting of {', '.join(owners)}, not of {name}; "
                f"set objective.name={owners[0]}, or leave it out"
            )
        known = ["name", *hints(cls)]
        raise ValueError(f"unknown key objective.{setting} of {name}{nearest(setting, known)}")

    return cast(Objective, _build(cls, settings, "objective."))


def _typed(value: Any, hint: Any, name: str) -> Any:
    """Returns `value` as the annotation `hint` wants it.

    Args:
        value: from a file or the command line.
        hint: without bounds.
        name: of the setting, for the sentences.

    Raises:
        ValueError: it is of another type.
    """
    origin = get_origin(hint)
    choices = get_args(hint)
    if origin is Literal:
        # True equals 1, and is no choice of 0, 1 and 2.
        if value not in choices or type(value) is bool:
            raise ValueError(f"{name} is {value!r}; it takes one of {', '.join(map(str, choices))}")
        return value

    # X | None, in this order.
    if type(None) in choices:
        if value is None:
            return None
        return _typed(value, choices[0], name)

    if origin is tuple:
        # A single value stands for a list of one, as on the command line.
        items = value
        if not isinstance(value, list):
            items = [value]
        return tuple(_typed(item, choices[0], name) for item in items)

    # bool is an int to Python, and no number to a reader.
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-6 as a string
        except ValueError:
            pass
    # A key without a value is null in YAML; for a text that means the empty one.
    elif hint is str and value is None:
        return ""
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    elif origin is not None and isinstance(value, Mapping):
        return dict(value)

    raise ValueError(f"{name} is {value!r}; it takes {_KINDS.get(hint, 'keys and values')}")
