"""Composes a run's configuration: groups, a recipe and the command line, into one typed :class:`Config`.

Owns the precedence (schema < groups < recipe < groups named on the command line < single keys on the command line) and
the strictness: a key that the schema does not know, or a value of the wrong type, is a one-line ConfigError, wherever
it appears. Never checks whether values make sense together (``rlpost.preflight.checks`` does). Called by ``cli`` and by
tests. Hydra resolves the defaults lists; recipes are its group ``recipe``, which maps to ``recipes/``.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlpost.config import Config, locations, walk_fields
from rlpost.errors import ConfigError, explain

GROUPS = ("model", "data", "reward", "algo", "rollout", "engine", "train", "cluster", "logging")


def load_config(overrides: list[str]) -> Config:
    """The typed configuration of ``recipe=... [overrides]``, interpolations resolved.

    Raises ConfigError, one line: no recipe or an unknown one, ``+recipe=``, an unknown key (the message names the
    nearest key and the file), a value of the wrong type, an unknown option of a group.
    """
    recipe, rest = take_recipe(overrides)
    choices, values = _split(_parse(rest))
    name, origin = register_recipe(recipe)
    try:
        with initialize_config_dir(config_dir=str(locations.find_conf()), version_base="1.3"):
            chosen = [f"~{group}" if option is None else f"{group}={option}" for group, option in choices.items()]
            config = _open(compose("config", [f"recipe={name}", *chosen]))
            for group, option in choices.items():
                _choose(config, group, _open(compose(f"{group}/{option}")) if option else OmegaConf.create())
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{origin}: {_first_line(error)}") from None
    for override in values:
        _apply(config, override)
    for key, value in (("name", Path(recipe).stem), ("recipe", recipe)):
        if config.get(key) is None:
            config = _merge(config, OmegaConf.create({key: value}))
    return _build(config)


def to_yaml(cfg: Config) -> str:
    """The whole resolved configuration as YAML; ``recipe=FILE`` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def list_recipes() -> dict[str, str]:
    """``GROUP/NAME`` -> description, for every recipe that ships."""
    return {name: str(_read(path).get("description", "")) for name, path in _recipe_files().items()}


# -- the recipe ----------------------------------------------------------------------------------------------------


def take_recipe(overrides: list[str]) -> tuple[str, list[str]]:
    """(the value of ``recipe=``, the other overrides)."""
    recipe, rest = None, []
    for override in overrides:
        key, equals, value = override.partition("=")
        if key.lstrip("+~") != "recipe":
            rest.append(override)
        elif key != "recipe" or not equals or not value:
            raise ConfigError(
                explain("recipe", override, "recipe=GROUP/NAME", "write it without a sign; it selects and adds no key")
            )
        elif recipe is not None:
            raise ConfigError(explain("recipe", override, "one recipe", f"recipe={recipe} was already given"))
        else:
            recipe = value
    if recipe is None:
        raise ConfigError(f"recipe: none given; expected recipe=GROUP/NAME; choose one of {_names(_recipe_files())}")
    return recipe, rest


def register_recipe(recipe: str) -> tuple[str, str]:
    """Registers the shipped recipes and a user's file with Hydra; returns (option of group ``recipe``, its origin)."""
    shipped = _register_shipped()
    if recipe in shipped:
        _check_file(shipped[recipe])
        return recipe, str(shipped[recipe])
    path = Path(recipe).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(recipe, shipped, n=1, cutoff=0.5)
        do = f"did you mean {near[0]}?" if near else "or give the path of your own YAML file"
        raise ConfigError(explain("recipe", recipe, f"one of {_names(shipped)}", do))
    if not path.is_file():
        raise ConfigError(explain("recipe", recipe, "an existing file", "check the path"))
    _check_file(path)
    _store("file/" + path.stem, _read(path))
    return "file/" + path.stem, str(path)


def _recipe_files() -> dict[str, Path]:
    root = locations.find_recipes()
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.rglob("*.yaml"))}


@functools.cache
def _register_shipped() -> dict[str, Path]:
    """All of them, because a recipe may build on another: ``defaults: [/recipe/math/arithmetic, _self_]``."""
    shipped = _recipe_files()
    for name, path in shipped.items():
        _store(name, _read(path))
    return shipped


def _store(name: str, node: Mapping[str, Any]) -> None:
    group, _, leaf = f"recipe/{name}".rpartition("/")
    store = ConfigStore.instance()
    store.store(group=group, name=leaf, node=OmegaConf.create(dict(node)), package="_global_", provider="recipes")


def _read(path: Path) -> dict[str, Any]:
    try:
        # OmegaConf's own loader reads 1e-4 as a number, unlike plain YAML.
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise ConfigError(explain(str(path), type(loaded).__name__, "a mapping of keys", "see recipes/ for examples"))
    return {str(key): value for key, value in loaded.items()}


def _check_file(path: Path) -> None:
    """Reports unknown keys and wrong types in a recipe file, with the file's name."""
    body = {key: value for key, value in _read(path).items() if key != "defaults"}
    for key in _unknown_keys(body):
        raise ConfigError(f"{path}: {_unknown(key)}")
    try:
        _merge(OmegaConf.structured(Config), OmegaConf.create(body))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {_wrong_type(error)}") from None


# -- the command line ----------------------------------------------------------------------------------------------


def _parse(overrides: list[str]) -> list[Override]:
    parsed = []
    for override in overrides:
        try:
            one = OverridesParser.create().parse_override(override)
        except HydraException as error:
            do = _first_line(error) if "=" in override else "write every override as key=value"
            raise ConfigError(explain("override", override, "key=value", do)) from None
        if one.is_sweep_override():
            raise ConfigError(explain("override", override, "one value", "start one run for each value"))
        parsed.append(one)
    return parsed


def _split(parsed: list[Override]) -> tuple[dict[str, str | None], list[Override]]:
    """Splits into options chosen for groups (``algo=gspo``) and values of single keys."""
    choices: dict[str, str | None] = {}
    values = []
    for override in parsed:
        group, value = override.key_or_group, None if override.is_delete() else override.value()
        if group not in GROUPS or isinstance(value, dict):
            values.append(override)
            continue
        options = _options(group)
        if override.is_delete() or override.is_add() or override.is_force_add():
            do = f"write {group}=OPTION, without a sign"
            raise ConfigError(explain(group, override.input_line, f"one of {', '.join(options)}", do))
        if value is not None and str(value) not in options:
            raise ConfigError(explain(group, value, f"one of {', '.join(options)}", _nearest_option(value, options)))
        choices[group] = None if value is None else str(value)
    return choices, values


def _apply(config: DictConfig, override: Override) -> None:
    key = override.key_or_group
    if override.is_delete():
        do = f"set {key}=null, or leave it out of the recipe"
        raise ConfigError(explain("override", override.input_line, "key=value", do))
    nested: Any = override.value()
    for part in reversed(key.split(".")):
        nested = {part: nested}
    for unknown in _unknown_keys(nested):
        raise ConfigError(_unknown(unknown))
    try:
        # Another function's arguments do not fit this one: a mapping with _target_ replaces, others merge.
        value = override.value()
        replaces = isinstance(value, dict) and "_target_" in value
        OmegaConf.update(config, key, value, merge=not replaces, force_add=True)
    except OmegaConfBaseException as error:
        raise ConfigError(explain("override", override.input_line, "key=value", _first_line(error))) from None


def _choose(config: DictConfig, group: str, chosen: DictConfig) -> None:
    """An option named on the command line owns every key that any option of its group sets.

    The recipe was written for another option: its ``algo.clip_high`` would distort ``algo=gspo``, and its data
    generator would remain beside ``data=gsm8k``. Such keys take the chosen option's value, or else the schema's
    default; keys that no option sets (``train.lr``) keep the recipe's value.
    """
    defaults = {key.name: key.default for key in walk_fields()}
    for key in _keys_set_by(group):
        OmegaConf.update(config, key, OmegaConf.select(chosen, key, default=defaults[key]), merge=False, force_add=True)


@functools.cache
def _keys_set_by(group: str) -> tuple[str, ...]:
    """Keys of the schema that some option's file of this group sets, in the schema's order."""
    files = [_read(locations.find_conf() / group / f"{option}.yaml") for option in _options(group)]
    keys = [key.name for key in walk_fields() if not is_dataclass(key.default)]
    return tuple(key for key in keys if any(_sets({group: file}, key) for file in files))


def _sets(node: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (locations.find_conf() / group).glob("*.yaml"))


def _nearest_option(value: Any, options: list[str]) -> str:
    near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.4)
    return f"did you mean {near[0]}?" if near else "choose one of them"


# -- strictness ----------------------------------------------------------------------------------------------------


def _build(config: DictConfig) -> Config:
    for key in _unknown_keys(OmegaConf.to_container(config, resolve=False)):
        raise ConfigError(_unknown(key))
    try:
        typed = OmegaConf.to_object(_merge(OmegaConf.structured(Config), config))
    except OmegaConfBaseException as error:
        raise ConfigError(_wrong_type(error)) from None
    assert isinstance(typed, Config)
    return typed


def _unknown_keys(node: Any, schema: type = Config, prefix: str = "") -> Iterator[str]:
    """Dotted keys of ``node`` that the schema does not have; anything goes below a free-form key."""
    known = {f.name: f for f in fields(schema)}
    for key, value in node.items():
        if key not in known:
            yield f"{prefix}{key}"
            continue
        factory = known[key].default_factory
        default = factory() if factory is not MISSING else None
        if is_dataclass(default) and isinstance(value, Mapping):
            yield from _unknown_keys(value, type(default), f"{prefix}{key}.")


def _unknown(key: str) -> str:
    known = [known.name for known in walk_fields()]
    same_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near = same_leaf or difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    siblings = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
    near = near or difflib.get_close_matches(key, siblings, n=1, cutoff=0.0)
    do = f"did you mean {' or '.join(near)}?" if near else "see `rlpost config --keys`"
    return f"unknown key {key}; {do}"


def _wrong_type(error: OmegaConfBaseException) -> str:
    return f"{error.full_key or 'configuration'}: {_first_line(error)}; see `rlpost config --keys {error.full_key}`"


def _merge(base: DictConfig, over: DictConfig) -> DictConfig:
    merged = OmegaConf.merge(base, over)
    assert isinstance(merged, DictConfig)
    return merged


def _open(config: DictConfig) -> DictConfig:
    """Hydra closes what it composes to new keys; strictness is ours (``_unknown_keys``), so open it."""
    OmegaConf.set_struct(config, False)
    return config


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def _names(recipes: Mapping[str, Path]) -> str:
    return ", ".join(recipes)
