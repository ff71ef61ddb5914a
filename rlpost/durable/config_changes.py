"""What a resume changes in the configuration: key by key, for a person; refused where determinism would be lost."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rlpost.config.locations import expand_home
from rlpost.config.resolve import WRITTEN_OUT
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
LATE_IN_DETERMINISTIC_MODE = ("canary_threshold", "eval.max_response_tokens", "cluster.cpus_per_worker")
HOW = ("resume", "recipe")  # differs by nature


@dataclass(frozen=True, slots=True)
class Change:
    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.before!r} -> {self.now!r}"


def changed_keys(before: str, now: str) -> list[Change]:
    """Leaves that differ between two configurations in YAML; a key that one of them lacks counts as None."""
    old, new = dict(_leaves(yaml.safe_load(before))), dict(_leaves(yaml.safe_load(now)))
    keys = [*new, *(key for key in old if key not in new)]
    changes = [Change(key, old.get(key), new.get(key)) for key in keys if key not in HOW]
    return [change for change in changes if _as_path(change.before) != _as_path(change.now)]


def _as_path(value: Any) -> Any:
    """Runs of version 0.1 wrote ``~`` as it was given."""
    return expand_home(value) if isinstance(value, str) else value


def was_left_open(change: Change, *, deterministic: bool) -> bool:
    """Whether the key was open in a run of version 0.1, which is no change: only since then is a run's configuration
    resolved as a whole (``config.resolve``). In deterministic mode most of it was written out before, too."""
    keys = LATE_IN_DETERMINISTIC_MODE if deterministic else WRITTEN_OUT
    return change.key in keys and change.before in (None, "auto")


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
