"""The rows of ``data.train`` and ``data.eval``: of one source or of several, from files, the hub or a generator.

Called by ``session``, ``sft``, ``preflight`` and benchmarks. ``prompts.files`` reads files, ``prompts.formats``
converts rows of other tools; ``datasets`` is imported only in the function that needs it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from rlpost.config import Config, DataConfig, SourceConfig, plugins, rule_of
from rlpost.config.locations import resolve_path
from rlpost.errors import ConfigError, DataError, explain
from rlpost.prompts.files import read_path
from rlpost.prompts.formats import convert
from rlpost.prompts.rows import Rows, look_up, plain_rows

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
TAKEN = ("failed", "part")  # metrics are eval/failed/KIND and eval/part/NAME
TEXT_KEYS = ("path", "hub", "subset", "split", "format")


@dataclass(frozen=True, slots=True)
class Source:
    """One of the sources of ``data.train`` or ``data.eval``. ``name``: "" where it is the only one."""

    name: str
    key: str  # of the configuration, for messages
    config: SourceConfig
    format: str
    weight: float | None = None  # share of the draws before normalization; None: its number of rows

    def load(self, prompt_key: str) -> Rows:
        return load_rows(self.config, prompt_key=prompt_key, key=self.key, format=self.format)


def list_sources(data: DataConfig, split: str) -> list[Source]:
    """The sources of ``data.train`` or ``data.eval`` (``split``: "train" or "eval"); reads nothing.

    Raises ConfigError for one that is not described as it must be, and where ``sources`` stands beside a single one.
    """
    key, config = f"data.{split}", getattr(data, split)
    if not config.sources:
        return [Source("", key, config, data.format)]
    for name in (one.name for one in fields(SourceConfig) if one.name != "sources"):
        got, default = getattr(config, name), getattr(SourceConfig(), name)
        if got != default:
            do = "give it to each source"
            if name in ("path", "hub", "generator"):
                do = f"set {key}.{name}=null, or make it one of the sources"
            expected = f"{'nothing' if default is None else default} beside {key}.sources"
            raise ConfigError(explain(f"{key}.{name}", got, expected, do))
    sources = [_read_source(str(name), value, data, split) for name, value in config.sources.items()]
    weighted = [source.name for source in sources if source.weight is not None]
    if 0 < len(weighted) < len(sources):
        expected = "a weight for each source, or for none (then it is the number of rows)"
        got = f"weights for {', '.join(weighted)} only"
        raise ConfigError(explain(f"{key}.sources", got, expected, "add the others"))
    return sources


def _read_source(name: str, value: Any, data: DataConfig, split: str) -> Source:
    key = f"data.{split}.sources.{name}"
    settings = [f.name for f in fields(SourceConfig) if f.name != "sources"]
    known = [*settings, "format", *(["weight"] if split == "train" else [])]
    if not NAME.fullmatch(name) or name in TAKEN:
        do = "rename it: it becomes a part of metric names"
        raise ConfigError(explain(key, name, "a name of letters, digits, and . _ -, and not failed or part", do))
    if not isinstance(value, Mapping):
        raise ConfigError(explain(key, value, "a mapping such as {path: FILE.jsonl}", "write one"))
    unknown = [str(one) for one in value if one not in known]
    if unknown:
        raise ConfigError(explain(key, ", ".join(unknown), f"only {', '.join(known)}", "check the spelling"))
    for one in TEXT_KEYS:
        if not isinstance(value.get(one), str | None):
            raise ConfigError(explain(f"{key}.{one}", value[one], "text", "put it in quotes"))
    if not isinstance(value.get("unique", False), bool):
        raise ConfigError(explain(f"{key}.unique", value["unique"], "true or false", "use one of them"))
    limit, weight = value.get("limit"), value.get("weight")
    if limit is not None and (type(limit) is not int or limit < 1):
        raise ConfigError(explain(f"{key}.limit", limit, "a whole number >= 1, or null", "correct it"))
    if weight is not None and (type(weight) not in (int, float) or not 0 < weight < math.inf):
        raise ConfigError(
            explain(f"{key}.weight", weight, "a number > 0, or null for its number of rows", "correct it")
        )
    format = value.get("format") or data.format
    rule = rule_of(DataConfig, "format")
    if not rule.holds(format):
        raise ConfigError(rule.explain(f"{key}.format", format))
    config = SourceConfig(**{one: value[one] for one in settings if value.get(one) is not None})
    return Source(name, key, config, format, weight)


def load_rows(
    config: SourceConfig, *, prompt_key: str = "prompt", key: str = "data.train", format: str = "columns"
) -> Rows:
    """The rows of a source: its files, else the hub's dataset, else its generator.

    A row is read when it is asked for, and only then a DataError names the line that is malformed.

    Args:
        prompt_key: the column that ``unique`` compares.
        key: the source's key in the configuration, for messages.
        format: ``data.format``.

    Raises DataError for a file that is missing or empty, and ConfigError for no source.
    """
    if config.path is not None:
        rows = read_path(resolve_path(config.path), key=f"{key}.path")
    elif config.hub is not None:
        rows = _load_hub(config, key)
    elif config.generator is not None:
        rows = _generate(config.generator, f"{key}.generator")
    else:
        raise ConfigError(f"{key}: no source; expected one of path, hub, generator; set {key}.path=FILE.jsonl")
    rows = convert(rows, format)
    if config.unique:
        rows = _leave_out_repeats(rows, prompt_key)
    rows = rows if config.limit is None else rows[: config.limit]
    if not len(rows):
        raise DataError(explain(key, "no rows", "at least one", "check the source and its limit"))
    return rows


def load_split(cfg: Config, split: str) -> Iterator[tuple[Source, Rows]]:
    """The sources of ``data.train`` or ``data.eval`` with their rows: for evaluation ``eval.max_prompts`` of each."""
    for source in list_sources(cfg.data, split):
        yield source, load_source(cfg, source, split)


def load_source(cfg: Config, source: Source, split: str) -> Rows:
    rows = source.load(cfg.data.prompt_key)
    return rows[: cfg.eval.max_prompts] if split == "eval" else rows


def name_source(source: Source) -> str:
    """For people: the path, the hub's name, or the generator's."""
    config = source.config
    generator = config.generator
    named = config.path or config.hub
    return named or str(generator.get("_target_") if isinstance(generator, Mapping) else generator)


def _load_hub(source: SourceConfig, key: str) -> Rows:
    from datasets import load_dataset

    name = f"{source.hub}" + (f" ({source.subset})" if source.subset else "")
    try:
        dataset = load_dataset(source.hub, source.subset, split=source.split)
    except Exception as error:  # the library raises its own errors, the hub's, and the network's
        reason = " ".join(str(error).split())
        do = f"check name, subset, split and network, or set {key}.path to a local file"
        raise DataError(f"{key}.hub: cannot load {name}, split {source.split}: {reason}; {do}") from error
    return plain_rows(dataset, name)


def _generate(generator: Any, key: str) -> Rows:
    made = plugins.resolve_target(generator, {}, key)()
    if not isinstance(made, Sequence) or not all(isinstance(columns, Mapping) for columns in made):
        raise DataError(
            explain(key, type(made).__name__, "a list of mappings", "return one mapping of columns per row")
        )
    return plain_rows(made, key)


def _leave_out_repeats(rows: Rows, prompt_key: str) -> Rows:
    seen: set[bytes] = set()
    kept = []
    for index, row in enumerate(rows):
        prompt = json.dumps(look_up(row, prompt_key), sort_keys=True)
        fingerprint = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if fingerprint not in seen:
            seen.add(fingerprint)
            kept.append(index)
    return rows.choose(np.array(kept, np.int64))
