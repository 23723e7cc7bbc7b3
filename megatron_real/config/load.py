"""Reads a configuration: a YAML file, overridden by words, becomes a checked `Config`, and a
`Config` plain values.

    YAML files --base--> tree --overrides--> tree --interpolation--> values --types, bounds, checks--> Config

A file may name another one as its `base:`, relative to itself, and then says only what differs.
Words of the command line are typed by the field that they set: where it is text, they are taken
letter by letter.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
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

_DEFAULT = "real"
"""The objective where none is named."""
_FEWEST_LETTERS_OF_A_SECRET = 4
"""A shorter value is no secret, and would be found all over a sentence."""


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a YAML file, applies `key.sub=value` overrides and checks everything that needs no
    process group.

    A directory of HF weights stands for a file that says nothing but its path.

    Raises:
        ValueError: an unknown key, a wrong type or an impossible combination, in one sentence with
            the remedy.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    words = list(overrides)
    for word in words:
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
        tree = _over(tree, _overrides_tree(words, _objective_name(words, tree)))
        values: Any = OmegaConf.to_container(tree, resolve=True)
        written: Any = OmegaConf.to_container(tree, resolve=False)
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    try:
        _locate_weights(values)
        _choose_dtype(values)
        config = _build(Config, values, "")
        given = dict(_interpolated(written, _resolved(config), ""))
        config = dataclasses.replace(config, given=given)
        checks.check_model(config)
    except ValueError as error:
        sentence = str(error)
        for entry in dict(_interpolated(written, values, "")).values():
            # It may be a secret.
            sentence = sentence.replace(repr(entry.value), entry.text)
            if isinstance(entry.value, str) and len(entry.value) >= _FEWEST_LETTERS_OF_A_SECRET:
                sentence = sentence.replace(entry.value, entry.text)
        raise ValueError(sentence) from None
    return cast(Config, config)


def _locate_weights(values: Any) -> None:
    """Puts directories in the place of run directories and of hub ids that are cached."""
    model = values.get("model") if isinstance(values, dict) else None
    if isinstance(model, dict) and isinstance(model.get("path"), str):
        model["path"] = weights_directory(model["path"])


def _choose_dtype(values: Any) -> None:
    """Puts a number format in the place of `auto`: a run, and its resumption elsewhere, must know
    which it is.
    """
    model = values.get("model") if isinstance(values, dict) else None
    if isinstance(model, dict) and model.get("dtype") == "auto":
        model["dtype"] = fast_dtype()


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as plain values, as it is written to run directories, checkpoints
    and trackers.

    A value that was given as an interpolation, such as `${oc.env:HF_TOKEN}`, is written as it was
    given: what it stands for may be a secret.
    """
    written: dict[str, Any] = _as_given(_resolved(config), config.given, "")
    return written


def to_plain(config: Config) -> dict[str, Any]:
    """Returns the same as a file gives it back: lists for tuples."""
    return dict(json.loads(json.dumps(to_dict(config))))


def _resolved(config: Config) -> dict[str, Any]:
    """Every setting by section, what was given as an interpolation resolved."""
    values = dataclasses.asdict(config)
    del values["given"]
    values["objective"] = {"name": config.objective.name, **values["objective"]}
    return values


def _read_file(path: Path, derived: tuple[Path, ...]) -> DictConfig:
    """The tree of a YAML file laid over that of its base.

    Args:
        derived: the files that led here, each naming the next as its base.
    """
    from omegaconf import DictConfig, OmegaConf

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
    """`above` laid over `below`: section by section, value by value; a list replaces a list.

    Where `above` names another objective, the settings of the one below are not for it and are left
    out.
    """
    from omegaconf import OmegaConf

    name = OmegaConf.select(above, "objective.name")
    if name is not None and name != OmegaConf.select(below, "objective.name", default=_DEFAULT):
        below = OmegaConf.masked_copy(below, [str(key) for key in below if key != "objective"])
    return cast("DictConfig", OmegaConf.merge(below, above))


def _objective_name(words: Iterable[str], tree: DictConfig) -> str:
    """The objective of a file's tree under these words."""
    from omegaconf import OmegaConf

    name = OmegaConf.select(tree, "objective.name", default=_DEFAULT)
    for word in words:
        key, _, value = word.partition("=")
        if key == "objective.name":
            name = value
    return str(name)


def _overrides_tree(words: Iterable[str], objective_name: str) -> DictConfig:
    """The tree that `key.sub=value` words stand for."""
    from omegaconf import OmegaConf

    tree = OmegaConf.create({})
    for word in words:
        key, _, value = word.partition("=")
        if _is_text(key.split("."), objective_name):
            nested: Any = value
            for name in reversed(key.split(".")):
                nested = {name: nested}
            layer = OmegaConf.create(nested)
        else:
            layer = OmegaConf.from_dotlist([word])
        tree = cast("DictConfig", OmegaConf.merge(tree, layer))
    return tree


def _is_text(path: list[str], objective_name: str) -> bool:
    """Whether the setting at `path` is text."""
    if path == ["objective", "name"]:
        return True
    cls: Any = Config
    if path[0] == "objective" and objective_name in OBJECTIVES:
        cls, path = objective_class(objective_name), path[1:]
    for name in path[:-1]:
        cls = plain_hint(hints(cls).get(name))
        if not dataclasses.is_dataclass(cls):
            return False
    return bool(path) and plain_hint(hints(cls).get(path[-1])) is str


def _interpolated(written: Any, value: Any, path: str) -> Iterator[tuple[str, Given]]:
    """Path -> text and value of everything in the tree `written` that is an interpolation."""
    if isinstance(written, str) and "${" in written:
        yield path, Given(text=written, value=value)
    elif isinstance(written, Mapping):
        for name, below in written.items():
            yield from _interpolated(below, value[name], f"{path}.{name}" if path else str(name))
    elif isinstance(written, list):
        for i, below in enumerate(written):
            yield from _interpolated(below, value[i], f"{path}.{i}")


def _as_given(value: Any, given: Mapping[str, Given], path: str) -> Any:
    """`value` with the texts that were given in place of what they stand for.

    What has changed since stays.
    """
    if path in given and given[path].value == value:
        return given[path].text
    if isinstance(value, Mapping):
        return {
            name: _as_given(below, given, f"{path}.{name}" if path else str(name))
            for name, below in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(_as_given(below, given, f"{path}.{i}") for i, below in enumerate(value))
    return value


# What other trainers call weights of tokens for the mismatch between engine and trainer: verl (the
# first three), slime, OpenRLHF, TRL, NeMo-RL and ms-swift.
_MISMATCH_WEIGHTS = frozenset(
    {
        "tis_imp_ratio_cap",
        "rollout_is",
        "rollout_is_threshold",
        "use_tis",
        "tis_clip",
        "tis_clip_low",
        "enable_vllm_is_correction",
        "vllm_is_truncated_threshold",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_cap",
        "use_importance_sampling_correction",
        "truncated_importance_sampling_ratio",
        "rollout_importance_sampling_mode",
    }
)


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    """Makes the dataclass `cls` of plain values, refusing unknown names and wrong types."""
    known = {name: hint for name, hint in hints(cls).items() if (cls, name) != (Config, "given")}
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown key {prefix}{name}{_remedy(str(name), known)}")
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
    """Makes the objective that `name` names, refusing the settings of others."""
    if not isinstance(values, Mapping):
        raise ValueError(f"objective is {values!r}; it is a section and takes keys below it")
    settings = dict(values)
    name = settings.pop("name", _DEFAULT)
    cls = objective_class(str(name))
    for setting in settings:
        if setting not in hints(cls):
            raise ValueError(_foreign_setting(str(setting), str(name)))
    return cast(Objective, _build(cls, settings, "objective."))


def _foreign_setting(setting: str, name: str) -> str:
    """The sentence about a setting that the objective `name` does not have, but perhaps another
    one.
    """
    owners = [other for other in OBJECTIVES if setting in hints(objective_class(other))]
    if not owners:
        known = ["name", *hints(objective_class(name))]
        return f"unknown key objective.{setting} of {name}{nearest(setting, known)}"
    return (
        f"objective.{setting} is a setting of {', '.join(owners)}, not of {name}; "
        f"set objective.name={owners[0]}, or leave it out"
    )


def _remedy(name: str, known: Iterable[str]) -> str:
    if name in _MISMATCH_WEIGHTS:
        return (
            "; the mismatch between engine and trainer is not weighted away here: watch the "
            "mismatch metrics, or set rollout.exclude_mismatch"
        )
    return nearest(name, known)


def _typed(value: Any, hint: Any, name: str) -> Any:
    """`value` as the annotation `hint` wants it."""
    origin, choices = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in choices or type(value) is bool:
            raise ValueError(f"{name} is {value!r}; it takes one of {', '.join(map(str, choices))}")
        return value
    if type(None) in choices:
        return None if value is None else _typed(value, choices[0], name)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_typed(item, choices[0], name) for item in items)
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-6 as a string
        except ValueError:
            pass
    elif hint is str and value is None:
        return ""
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    elif origin is not None and isinstance(value, Mapping):
        return dict(value)
    raise ValueError(f"{name} is {value!r}; it takes {_KINDS.get(hint, 'keys and values')}")


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "text: put it in quotes",
    bool: "true or false",
}
