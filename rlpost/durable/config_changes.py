"""What a resume changes in the configuration: key by key, for a person; refused where determinism would be lost."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rlpost.errors import RunError, explain

# Keys that say where and how a run is done and watched, not what it computes; ``*`` stands for all below.
HARMLESS = (
    "name",
    "description",
    "runs_dir",
    "resume",
    "ledger_dir",
    "watchdog_s",
    "checkpoint.*",
    "logging.*",
    "sft.*",
)
HOW = ("resume", "recipe")  # differs by nature


@dataclass(frozen=True, slots=True)
class Change:
    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.now!r}"


def changed_keys(before: str, now: str) -> list[Change]:
    """Leaves that differ between two resolved configurations in YAML; a key that one of them lacks counts as None."""
    old, new = dict(_leaves(yaml.safe_load(before))), dict(_leaves(yaml.safe_load(now)))
    keys = [*new, *(key for key in old if key not in new)]
    return [Change(k, old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k) and k not in HOW]


def is_harmless(key: str) -> bool:
    """Whether the key has no say in what a run computes."""
    return is_among(key, HARMLESS)


def is_among(key: str, names: Collection[str]) -> bool:
    """Whether ``names`` has the key, or a beginning of it with ``*`` behind."""
    return any(key == name or (name.endswith("*") and key.startswith(name[:-1])) for name in names)


def refuse_changes(changes: Sequence[Change]) -> None:
    """Raises RunError for a change after which a deterministic run would not be the one it was."""
    for change in changes:
        if not is_harmless(change.key):
            do = "give it as it was, or use another name"
            raise RunError(
                explain(f"resuming with deterministic=true: {change.key}", change.now, repr(change.before), do)
            )


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and (node or not prefix):
        for key, value in node.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node
