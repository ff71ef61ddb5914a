"""Composes a run's configuration: groups, a recipe and the command line, into one typed :class:`Config`.

Owns the precedence (schema < groups < recipe < groups named on the command line < single keys on the command
line) and the strictness: a key that the schema does not know, or a value of the wrong type, is a one-line
ConfigError, wherever it appears. Never checks whether values make sense together (``rlpost.preflight.checks`` does).
Called by ``cli`` and by tests. Hydra resolves the defaults lists; recipes are its group ``recipe``, which maps to
``recipes/``. What a key typed as text is given stays as it is spelled (``rlpost.config.spelling``), and ``~`` is
expanded here, once, for every key that names a file or folder.
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
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlpost.config import Config, locations, look_up, walk_fields
from rlpost.config.spelling import Setting, read_override, read_yaml
from rlpost.errors import ConfigError, explain

GROUPS = ("model", "data", "reward", "algo", "rollout", "engine", "train", "cluster", "logging")
PATH_KEYS = (  # name a file or folder; model.path and resume may name something else, which never begins with ~
    "model.path",
    "data.chat_template",  # or hold the template itself
    "data.train.path",
    "data.eval.path",
    "reward.cache_dir",
    "sft.output",
    "sft.init",
    "sft.tokenizer",
    "cluster.shards_dir",
    "cluster.scratch_dir",
    "runs_dir",
    "resume",
    "ledger_dir",
)


def load_config(overrides: list[str]) -> Config:
    """The typed configuration of ``recipe=... [overrides]``, interpolations resolved.

    Raises ConfigError, one line: no recipe or an unknown one, ``+recipe=``, an unknown key (the message names the
    nearest key and the file), a value of the wrong type, an unknown option of a group.
    """
    recipe, rest = take_recipe(overrides)
    choices, values = _split([read_override(override, GROUPS) for override in rest])
    name, origin = register_recipe(recipe)
    try:
        with initialize_config_dir(config_dir=str(locations.find_conf()), version_base="1.3"):
            chosen = [f"~{group}" if option is None else f"{group}={option}" for group, option in choices.items()]
            config = _open(compose("config", [f"recipe={name}", *chosen]))
            for group, option in choices.items():
                _choose(config, group, _open(compose(f"{group}/{option}")) if option else OmegaConf.create())
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"{origin}: {_first_line(error)}") from None
    for setting in values:
        _apply(config, setting)
    for missing in _missing_keys(OmegaConf.to_container(config, resolve=False)):
        raise ConfigError(explain(missing, "???", "a value: ??? says that one must be given", f"set {missing}=VALUE"))
    for key, value in (("name", Path(recipe).stem), ("recipe", recipe)):
        if config.get(key) is None:
            # A file may have ${ in its name, which is no interpolation.
            config = _merge(config, OmegaConf.create({key: value.replace("${", "\\${")}))
    cfg = _build(config)
    expand_paths(cfg)
    return cfg


def expand_paths(cfg: Config) -> None:
    """``~`` and ``~USER`` in every key of PATH_KEYS, in place. Raises ConfigError for a user who does not exist."""
    for key in PATH_KEYS:
        given = look_up(cfg, key)
        if not isinstance(given, str) or not given.startswith("~") or locations.is_template_text(given):
            continue
        path = locations.expand_home(given)
        if path.startswith("~") and not Path(path).exists():
            do = f"write ./{given} for a folder or file of that name"
            raise ConfigError(explain(key, given, "~ or ~USER with a user of this machine", do))
        section, _, name = key.rpartition(".")
        setattr(look_up(cfg, section) if section else cfg, name, path)


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
    path = Path(locations.expand_home(recipe))
    if not path.is_file():
        if path.suffix in (".yaml", ".yml"):
            raise ConfigError(explain("recipe", recipe, "a file that is there", "check the path"))
        near = difflib.get_close_matches(recipe, shipped, n=1, cutoff=0.5)
        do = f"did you mean {near[0]}?" if near else "or give the path of your own YAML file"
        raise ConfigError(explain("recipe", recipe, f"one of {_names(shipped)}", do))
    _check_file(path)
    option = "file/own"  # Hydra reads an option's name by its grammar, which a file's name need not follow
    _store(option, _read(path))
    return option, str(path)


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
        loaded = OmegaConf.to_container(OmegaConf.create(read_yaml(path.read_text(encoding="utf-8"))), resolve=False)
    # ValueError: not UTF-8, or a whole number of thousands of digits; RecursionError: a value that holds itself.
    except (OSError, ValueError, RecursionError, yaml.YAMLError, OmegaConfBaseException) as error:
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


def _split(settings: list[Setting]) -> tuple[dict[str, str | None], list[Setting]]:
    """Choices among the options of a group (``algo=gspo``), and values of single keys."""
    choices: dict[str, str | None] = {}
    values = []
    for setting in settings:
        group, value = setting.key, setting.value
        if group not in GROUPS or isinstance(value, dict):
            values.append(setting)
            continue
        options = _options(group)
        if setting.sign:
            do = f"write {group}=OPTION, without a sign"
            raise ConfigError(explain(group, setting.line, f"one of {', '.join(options)}", do))
        if value is not None and str(value) not in options:
            raise ConfigError(explain(group, value, f"one of {', '.join(options)}", _nearest_option(value, options)))
        choices[group] = None if value is None else str(value)
    return choices, values


def _apply(config: DictConfig, setting: Setting) -> None:
    key, value = setting.key, setting.value
    if setting.sign == "~":
        do = f"set {key}=null, or leave it out of the recipe"
        raise ConfigError(explain("override", setting.line, "key=value", do))
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    for unknown in _unknown_keys(nested):
        raise ConfigError(_unknown(unknown))
    try:
        # Another function's arguments do not fit this one: a mapping with _target_ replaces, others merge.
        replaces = isinstance(value, dict) and "_target_" in value
        OmegaConf.update(config, key, value, merge=not replaces, force_add=True)
    except (OmegaConfBaseException, RecursionError) as error:
        do = _first_line(error) + ("; write \\${ where no other key is meant" if "${" in str(value) else "")
        raise ConfigError(explain("override", setting.line, "key=value", do)) from None


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
    except RecursionError:
        raise ConfigError("configuration: lists or mappings are nested too deeply; flatten them") from None
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


def _missing_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys whose value is OmegaConf's sign for one that must be given; a merge would leave them out."""
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _missing_keys(value, f"{prefix}{key}.")
        elif isinstance(value, str) and value == "???":
            yield f"{prefix}{key}"


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
