"""What a value is where it is written, in a YAML file or on the command line: text stays as it is spelled.

A key that the schema types as text keeps ``2026_11_30``, ``1e5``, ``0x10``, ``on`` and ``12:30`` as they stand, which
YAML and Hydra read as numbers, booleans and times. Only ``null`` means none. On the command line such a value needs no
quotes beyond the shell's, unless it begins with one or has the form of a list or a mapping; then, and where a value of
any other key cannot be read, the error shows what to type. Called by ``compose``; knows the schema's types, no file.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf._utils import get_yaml_loader

from rlpost.config import Config, walk_fields
from rlpost.errors import ConfigError, explain

TEXT, TEXTS = ("str", "Optional[str]"), ("list[str]",)  # types of the schema that are text, and lists of it
GRAMMAR = frozenset("'\"\\,=#()[]{}$")  # characters that mean something in a value that is not text
STRING, NULL, MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"


@dataclass(frozen=True, slots=True)
class Setting:
    """``key=value`` of the command line with its value read; ``sign`` is ``+``, ``++`` or ``~`` before the key."""

    key: str
    value: Any
    line: str
    sign: str = ""


# -- YAML ----------------------------------------------------------------------------------------------------------


def read_yaml(text: str) -> Any:
    """The value of a YAML file in the schema's form; an empty file is an empty mapping. Raises yaml.YAMLError."""
    # OmegaConf's own loader reads 1e-4 as a number, which plain YAML does not.
    loader = get_yaml_loader()(text)
    try:
        node = loader.get_single_node()
        loaded = None if node is None else loader.construct_document(_as_spelled(node, Config))
    finally:
        loader.dispose()
    return {} if loaded is None else loaded


def _as_spelled(node: yaml.Node, schema: type) -> yaml.Node:
    """A copy of a mapping's node in which the scalars of keys typed as text are text."""
    if not isinstance(node, yaml.MappingNode):
        return node
    types = _types_of(schema)
    pairs = []
    for key, value in node.value:
        if key.tag == MERGE:
            merged = [_as_spelled(one, schema) for one in value.value] if isinstance(value, yaml.SequenceNode) else None
            value = _as_spelled(value, schema) if merged is None else _copy(value, merged)
        elif isinstance(key, yaml.ScalarNode) and key.value in types:
            value = _value_as_spelled(value, types[key.value])
        pairs.append((key, value))
    return _copy(node, pairs)


def _value_as_spelled(value: yaml.Node, kind: str | type) -> yaml.Node:
    if isinstance(kind, type):
        return _as_spelled(value, kind)
    if kind in TEXT and isinstance(value, yaml.ScalarNode) and value.tag != NULL:
        return yaml.ScalarNode(STRING, value.value, value.start_mark, value.end_mark, style=value.style)
    if kind in TEXTS and isinstance(value, yaml.SequenceNode):
        return _copy(value, [_value_as_spelled(item, "str") for item in value.value])
    return value


def _copy(node: Any, value: Any) -> Any:
    return type(node)(node.tag, value, node.start_mark, node.end_mark, node.flow_style)


@functools.cache
def _types_of(schema: type) -> dict[str, str | type]:
    """Field -> its section's class, or its type as the schema writes it."""
    types: dict[str, str | type] = {}
    for one in fields(schema):
        default = one.default_factory() if one.default_factory is not MISSING else None
        types[one.name] = type(default) if is_dataclass(default) else str(one.type)
    return types


# -- the command line ----------------------------------------------------------------------------------------------


def read_override(line: str, groups: Collection[str] = ()) -> Setting:
    """One override; its key may be unknown. Raises ConfigError for a value that cannot be read, or several.

    ``groups``: keys that choose an option by its name.
    """
    signed, equals, raw = line.partition("=")
    key = signed.lstrip("+~")
    sign = signed[: len(signed) - len(key)]
    kind = _kind_of(key)
    if equals and sign != "~" and kind in TEXT:
        return Setting(key, _read_text(raw.strip(" \t"), line, key), line, sign)
    try:
        parsed = OverridesParser.create().parse_override(line)
    except (HydraException, ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raw = raw.strip(" \t")
        texts = _read_texts(raw) if equals and kind in TEXTS else None
        if texts is not None:
            return Setting(key, texts, line, sign)
        is_grammar = isinstance(error, HydraException)
        if equals and key and raw and is_grammar and not GRAMMAR.intersection(raw):
            return Setting(key, raw, line, sign)  # a letter or sign that Hydra's grammar lacks
        if equals and raw[:1] == "{" and (isinstance(kind, type) or kind.startswith(("dict", "Optional[dict"))):
            mapping = _read_mapping(raw, kind)
            if mapping is not None:
                return Setting(key, mapping, line, sign)
        reason = str(error).strip().splitlines()[0]
        free = kind in ("", "Any", "Optional[Any]") and key not in groups
        do = _advise_text(signed, raw) if free and raw else reason
        raise ConfigError(explain("override", line, "key=value", do if equals else "give each as key=value")) from None
    if parsed.is_sweep_override():
        do = "start one run for each value"
        if kind in ("", "Any", "Optional[Any]"):
            do += f"; for one text {_advise_text(signed, raw)}"
        raise ConfigError(explain("override", line, "one value", do))
    return Setting(parsed.key_or_group, _read_parsed(parsed, raw, kind), line, sign)


def _read_text(raw: str, line: str, key: str) -> str | None:
    if raw.lower() == "null":
        return None
    if raw[:1] not in tuple("'\"[{"):
        return raw
    signed = line.partition("=")[0]
    try:
        parsed = OverridesParser.create().parse_override(f"{key}={raw}")
    except HydraException:
        parsed = None
    if raw[0] in "'\"":
        if parsed is not None and isinstance(parsed._value, QuotedString):
            value = parsed.value()
            assert isinstance(value, str)
            return value
    elif parsed is None or not isinstance(parsed.value(), list | dict):
        return raw
    got = "a list" if raw[0] == "[" else "a mapping" if raw[0] == "{" else "a quote that does not enclose the value"
    raise ConfigError(explain(key, line, f"text, not {got}", f"for this very text {_advise_text(signed, raw)}"))


def _read_texts(raw: str) -> list[str] | None:
    """A list of scalars, each as it is spelled; None where it is none."""
    if not (raw[:1] == "[" and raw[-1:] == "]"):
        return None
    if not any(sign in raw[1:-1] for sign in "'\"[]{}\\"):
        return [item.strip() for item in raw[1:-1].split(",")]
    try:
        node = yaml.compose(raw, Loader=yaml.SafeLoader)  # for its quotes
    except yaml.YAMLError:
        return None
    scalars = isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value)
    return [item.value for item in node.value] if scalars else None


def _read_mapping(raw: str, kind: str | type) -> dict[Any, Any] | None:
    """A mapping by YAML's rules, for letters and signs that Hydra's grammar lacks; None where it is none."""
    loader = get_yaml_loader()(raw)
    try:
        node = loader.get_single_node()
        loaded = loader.construct_document(_as_spelled(node, kind) if isinstance(kind, type) else node)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None
    finally:
        loader.dispose()
    return loaded if isinstance(loaded, dict) else None


def _read_parsed(parsed: Override, raw: str, kind: str | type) -> Any:
    """Hydra's value; where the key holds text further down, as it is spelled there."""
    if parsed.is_delete():
        return None
    value = parsed.value()
    if kind in TEXTS and isinstance(value, list) and not all(isinstance(item, str) for item in value):
        return _read_texts(raw) or value
    if isinstance(kind, type) and isinstance(value, dict):
        try:
            node = yaml.compose(raw, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            return value
        return _respell(value, node, kind)
    return value


def _respell(value: dict[Any, Any], node: yaml.Node | None, schema: type) -> dict[Any, Any]:
    """Of a mapping on the command line, the values of keys typed as text that Hydra did not read as text."""
    written = {k.value: v for k, v in node.value} if isinstance(node, yaml.MappingNode) else {}
    types, respelled = _types_of(schema), dict(value)
    for key, item in value.items():
        kind, there = types.get(key, ""), written.get(key)
        if isinstance(kind, type) and isinstance(item, dict):
            respelled[key] = _respell(item, there, kind)
        elif kind in TEXT and isinstance(item, bool | int | float) and isinstance(there, yaml.ScalarNode):
            respelled[key] = there.value
    return respelled


@functools.cache
def _kinds() -> dict[str, str | type]:
    return {key.name: type(key.default) if is_dataclass(key.default) else key.type for key in walk_fields()}


def _kind_of(key: str) -> str | type:
    """The type of a key of the schema, a section's class; "" for what lies below a free-form key, or is unknown."""
    return _kinds().get(key, "")


def _advise_text(signed_key: str, raw: str) -> str:
    """What to type in a shell so that the value is this very text, where one printed line can say it."""
    if not raw.isprintable():
        return "write the value in a recipe file"
    return "type " + shlex.quote(f"{signed_key}={QuotedString(raw, Quote.double).with_quotes()}")
