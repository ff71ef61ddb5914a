"""Which runs are seeds of one experiment, and in which settings the experiments differ. Pure functions.

Two runs belong together if their configurations are equal except for the seed and for keys that change no result:
names, folders, logging, what is kept. Called by ``build``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

SAME_RESULTS = re.compile(
    r"(seed|name|description|runs_dir|ledger_dir|resume|watchdog_s|threads|logging(\..*)?|checkpoint(\..*)?"
    r"|reward\.cache(_dir)?)"
)
MISSING = "(absent)"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"train": {"lr": 1e-4}}`` as ``{"train.lr": "0.0001"}``; values as JSON, except that text is unquoted."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def group_seeds(configs: Sequence[Mapping[str, Any]]) -> list[int]:
    """The experiment of each run, numbered by first appearance. A run without a configuration is its own experiment."""
    seen: dict[str, int] = {}
    numbers = []
    for position, config in enumerate(configs):
        settings = {k: v for k, v in flatten(config).items() if not SAME_RESULTS.fullmatch(k)}
        identity = json.dumps(settings, sort_keys=True) if settings else f"run {position}"
        numbers.append(seen.setdefault(identity, len(seen)))
    return numbers


def differences(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Key -> its value in each run, for keys whose values differ; without names and folders, but with the seed."""
    flats = [flatten(config) for config in configs]
    keys = sorted({key for flat in flats for key in flat})
    rows = {key: [flat.get(key, MISSING) for flat in flats] for key in keys}
    ignored = re.compile(r"name|description|runs_dir|resume")
    return {k: values for k, values in rows.items() if len(set(values)) > 1 and not ignored.fullmatch(k)}


def name_experiments(run_names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """One name for each experiment: the common beginning of its runs' names, made unique if two are equal."""
    names: list[str] = []
    for number in range(max(numbers, default=-1) + 1):
        members = [name for name, of in zip(run_names, numbers, strict=True) if of == number]
        start = (_common_start(members) if len(members) > 1 else "") or members[0]
        names.append(start if start not in names else f"{start} ({number + 1})")
    return names


def _common_start(names: Sequence[str]) -> str:
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    start = re.sub(r"[-_. ]*(seed|s)?[-_. =]*$", "", first[:length])
    return start or first[:length]
